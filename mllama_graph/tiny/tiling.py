"""Image to tiles: the arithmetic of transformers' MllamaImageProcessorPil with the CLIP statistics."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

TILE = 48
PATCH = 8
MAX_TILES = 4
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Aspect-ratio id i + 1 stands for RATIOS[i], counted in tiles (height, width); id 0 means no image.
RATIOS = [(h, w) for h in range(1, MAX_TILES + 1) for w in range(1, MAX_TILES + 1) if h * w <= MAX_TILES]


def choose_canvas(width: int, height: int) -> tuple[int, int]:
    """Tiles (down, across) of the canvas: smallest scale >= 1, else the largest below 1; ties go to the smaller area."""
    scales = [min(h * TILE / height, w * TILE / width) for h, w in RATIOS]
    enlarging = [s for s in scales if s >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    return min((r for r, s in zip(RATIOS, scales) if s == chosen), key=lambda r: r[0] * r[1])


def fit_size(width: int, height: int, ratio: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of the image inside its canvas."""
    target_w = min(max(width, TILE), ratio[1] * TILE)
    target_h = min(max(height, TILE), ratio[0] * TILE)
    if target_w / width < target_h / height:
        return target_w, min(math.floor(height * (target_w / width)) or 1, target_h)
    return min(math.floor(width * (target_h / height)) or 1, target_w), target_h


def canvas_scale(width: int, height: int) -> float:
    """Canvas pixels per image pixel."""
    return fit_size(width, height, choose_canvas(width, height))[0] / width


def tile_image(image: Image.Image) -> tuple[np.ndarray, int, int]:
    """Cut an RGB image into tiles.

    Returns (tiles [MAX_TILES, 3, TILE, TILE] float32, aspect-ratio id, number of real tiles).
    Inside the canvas the border is black; whole padding tiles are zero after normalisation.
    """
    ratio = choose_canvas(*image.size)
    down, across = ratio
    width, height = fit_size(*image.size, ratio)
    canvas = np.zeros((down * TILE, across * TILE, 3), np.float32)
    canvas[:height, :width] = np.asarray(image.resize((width, height), Image.BILINEAR), np.float32) / 255
    canvas = (canvas - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    tiles = canvas.reshape(down, TILE, across, TILE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
    padded = np.zeros((MAX_TILES, 3, TILE, TILE), np.float32)
    padded[: down * across] = tiles
    return padded, RATIOS.index(ratio) + 1, down * across
