"""The tiny model's vision sizes, and pictures cut as the engine cuts them, normalised for the training."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mllama_graph.inputs import images
from mllama_graph.model.shape import VisionShape, supported_aspect_ratios

MAX_TILES = 4
# Aspect-ratio id i + 1 stands for RATIOS[i], counted in tiles (height, width); id 0 means no image.
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
GRID = TILE // PATCH  # patches along a tile's side
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def choose_canvas(width: int, height: int) -> tuple[int, int]:
    """Tiles (down, across) of a picture's canvas."""
    return images.canvas(height, width, VISION)


def fit_size(width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels of a picture inside its canvas."""
    down, across = choose_canvas(width, height)
    return images.fitted(height, width, down * TILE, across * TILE, TILE)[::-1]


def canvas_scale(width: int, height: int) -> float:
    """Canvas pixels per picture pixel."""
    return fit_size(width, height)[0] / width


def tile_image(image: Image.Image) -> tuple[np.ndarray, int, int]:
    """Cut an RGB picture into tiles.

    Returns (tiles [MAX_TILES, 3, TILE, TILE] float32, aspect-ratio id, number of real tiles).
    Inside the canvas the border is black; whole padding tiles are zero after normalisation.
    """
    tiles = images.tile_image(image, VISION)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    padded = np.zeros((MAX_TILES, 3, TILE, TILE), np.float32)
    padded[: tiles.count] = (tiles.data.astype(np.float32) / 255 - mean) / std
    return padded, tiles.aspect, tiles.count
