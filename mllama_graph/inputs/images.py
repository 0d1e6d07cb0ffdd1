"""Prepares pictures for the model: cuts them into uint8 tiles. Uses Pillow and numpy only.

The tiles equal those of transformers' MllamaImageProcessorPil before normalisation, which the vision graph does.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mllama_graph.inputs.image_decoding import decode, naming
from mllama_graph.inputs.image_sources import Source, read_source
from mllama_graph.model.shape import VisionShape


@dataclass(frozen=True)
class TiledImage:
    """One prepared image.

    data: uint8 (tiles, channels, tile, tile), without padding tiles. aspect: aspect-ratio id, counted from 1.
    key: a hash of both.
    """

    data: np.ndarray
    aspect: int
    key: str

    @property
    def count(self) -> int:
        """The number of tiles."""
        return self.data.shape[0]


def prepare_images(sources: Sequence[Source], base: Path, vision: VisionShape) -> tuple[TiledImage, ...]:
    """Read, decode and tile the pictures of a request. Relative paths are looked up in `base` first.

    Raises UserError "picture N (source) can't be read: why", whatever is wrong with one.
    """
    images = []
    for number, source in enumerate(sources, start=1):
        with naming(number, source):
            images.append(tile_image(decode(read_source(source, base)), vision))
    return tuple(images)


def canvas(height: int, width: int, vision: VisionShape) -> tuple[int, int]:
    """The (height, width) in tiles of the canvas for an image.

    Chooses the canvas with the smallest scale that is at least 1, else the largest scale below 1; among equal scales,
    the smallest area (transformers image_processing_pil_mllama.py, get_optimal_tiled_canvas).
    """
    scaled = [(min(h * vision.tile / height, w * vision.tile / width), h * w, (h, w)) for h, w in vision.aspect_ratios]
    larger = [entry for entry in scaled if entry[0] >= 1]
    best = min(entry[0] for entry in larger) if larger else max(entry[0] for entry in scaled)
    return min((entry for entry in scaled if entry[0] == best), key=lambda entry: entry[1])[2]


def fitted(height: int, width: int, canvas_height: int, canvas_width: int, tile: int) -> tuple[int, int]:
    """The (height, width) in pixels that an image is resized to: within its canvas, enlarged to one tile at most."""
    target_height = min(max(height, tile), canvas_height)
    target_width = min(max(width, tile), canvas_width)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)


def tile_image(image: Image.Image, vision: VisionShape) -> TiledImage:
    """Resize an RGB image, pad it with black and cut it into tiles."""
    rows, columns = canvas(image.height, image.width, vision)
    tile = vision.tile
    height, width = fitted(image.height, image.width, rows * tile, columns * tile, tile)
    pixels = np.zeros((rows * tile, columns * tile, 3), dtype=np.uint8)
    pixels[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    data = pixels.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
    data = np.ascontiguousarray(data).reshape(rows * columns, 3, tile, tile)
    aspect = vision.aspect_ratios.index((rows, columns)) + 1
    digest = hashlib.sha256(bytes([aspect]) + data.tobytes()).hexdigest()
    return TiledImage(data, aspect, digest)
