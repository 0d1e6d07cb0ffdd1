"""Vision sizes of the tiny model, and images cut into tiles as in the engine and normalised for training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mllama_graph.inputs import images
from mllama_graph.model.shape import VisionShape, supported_aspect_ratios

MAX_TILES = 4
# Aspect-ratio id i + 1 stands for RATIOS[i], (height, width) in tiles; id 0 stands for no image.
RATIOS = tuple(supported_aspect_ratios(MAX_TILES))
VISION = VisionShape(
    width=128,
    heads=8,
    layers=4,
    global_layers=2,
    mlp=384,
    patch=8,
    tile=48,
    max_tiles=MAX_TILES,
    channels=3,
    features=(1, 3),
    aspect_ratios=RATIOS,
    eps=1e-5,
)
TILE, PATCH, PATCHES = VISION.tile, VISION.patch, VISION.tokens
GRID = TILE // PATCH  # patches along the side of a tile
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def choose_canvas(width: int, height: int) -> tuple[int, int]:
    """Height and width in tiles of the canvas of an image of this size in pixels."""
    return images.canvas(height, width, VISION)


def fit_size(width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels of an image after resizing to its canvas."""
    down, across = choose_canvas(width, height)
    return images.fitted(height, width, down * TILE, across * TILE, TILE)[::-1]


def canvas_scale(width: int, height: int) -> float:
    """Canvas pixels per image pixel."""
    return fit_size(width, height)[0] / width


@dataclass
class TiledImage:
    """An image as the vision encoder takes it."""

    tiles: np.ndarray  # [MAX_TILES, 3, TILE, TILE] float32, zero in padding tiles
    ratio: int  # aspect-ratio id
    count: int  # tiles without padding


def tile_image(image: Image.Image) -> TiledImage:
    """Resize an RGB image to its canvas, pad it there with black, cut it into tiles and normalise them."""
    tiles = images.tile_image(image, VISION)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    padded = np.zeros((MAX_TILES, 3, TILE, TILE), np.float32)
    padded[: tiles.count] = (tiles.data.astype(np.float32) / 255 - mean) / std
    return TiledImage(padded, tiles.aspect, tiles.count)
