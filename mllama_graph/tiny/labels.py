"""Labels for the auxiliary losses of training: what patches, image tokens and words stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mllama_graph.tiny.questions import ZH_COLORS, ZH_SHAPES, plural
from mllama_graph.tiny.scenes import COLORS, PAIRS, SHAPES, Scene
from mllama_graph.tiny.text import TextBatch
from mllama_graph.tiny.tiling import GRID, MAX_TILES, PATCH, PATCHES, TILE, choose_canvas, fit_size
from mllama_graph.tiny.tokenizer import encode

CLASSES = {label: i for i, label in enumerate(("", *SHAPES, *"0123456789"))}
COLOR_IDS = {c: i + 1 for i, c in enumerate(COLORS)}
IGNORE = -100  # the label that cross_entropy ignores
SLOTS, DIGIT_SLOTS = 4, 3  # of the readout head: shapes from left to right, digits
# Columns of the labels of a shape word in a question: packed rows of the word, of the start of its sequence and of its
# (first) image token; whether the first image shows such a shape, and how many; if it shows exactly one, its side and
# its rank from the left and from the top, else IGNORE.
ASKED = ("row", "start", "image", "present", "count", "side", "left", "top")
PRESENCE = len(PAIRS) + len(SHAPES) + len(COLORS)


@dataclass
class PointingTargets:
    """Packed rows on one image whose next word depends on a shape or digit, and the patches that show it."""

    rows: Tensor
    images: Tensor  # the image of each row
    patches: Tensor  # [rows, C * S] bool; the CLS tokens of the image if it does not show the shape


def side_of(x: float) -> int:
    """0 (left), 1 (middle) or 2 (right) of a centre at this fraction of the image's width."""
    return 0 if x < 0.4 else 1 if x < 0.6 else 2


def patch_labels(scene: Scene) -> np.ndarray:
    """[C, S - 1, 5]: class, colour, rank from the left, rank from the top, side of what each patch shows.

    0 stands for background. IGNORE stands for padding tiles and for what the scene has no label of: ranks and sides on
    dense pages, ranks from the top and sides on numbers.
    """
    down, across = choose_canvas(*scene.image.size)
    rows, columns = down * GRID, across * GRID
    width, height = fit_size(*scene.image.size)
    canvas = np.zeros((down * TILE, across * TILE), np.uint8)
    canvas[:height, :width] = np.asarray(scene.mask.resize((width, height), 0))
    cells = canvas.reshape(rows, PATCH, columns, PATCH).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
    labels = np.zeros((rows, columns, 5), np.int64)
    ranked = len(scene.glyphs) <= SLOTS and (scene.shapes or scene.number)
    if not ranked:
        labels[..., 2:] = IGNORE
    elif scene.number:
        labels[..., 3:] = IGNORE
    best = np.full((rows, columns), 0.14 * PATCH * PATCH)
    xs, ys = sorted(g.x for g in scene.glyphs), sorted(g.y for g in scene.glyphs)
    for i, glyph in enumerate(scene.glyphs):
        covered = (cells == i + 1).sum(-1)
        most = covered > best
        best[most] = covered[most]
        labels[most, :2] = CLASSES[glyph.label], COLOR_IDS[glyph.color]
        if ranked:
            labels[most, 2] = 1 + xs.index(glyph.x)
            if scene.shapes:
                labels[most, 3:] = 1 + ys.index(glyph.y), 1 + side_of(glyph.x / scene.image.width)
    tiles = labels.reshape(down, GRID, across, GRID, 5).transpose(0, 2, 1, 3, 4).reshape(-1, PATCHES - 1, 5)
    padded = np.full((MAX_TILES, PATCHES - 1, 5), IGNORE)
    padded[: down * across] = tiles
    return padded


def readout_label(scene: Scene) -> list[int]:
    """Class and colour of each shape slot, then the digits plus 1; 0 stands for an empty slot."""
    slots = [v for s in scene.shapes[:SLOTS] for v in (CLASSES[s.shape], COLOR_IDS[s.color])]
    digits = [1 + int(d) for d in scene.number]
    return slots + [0] * (2 * SLOTS - len(slots)) + digits + [0] * (DIGIT_SLOTS - len(digits))


def presence_label(scene: Scene) -> list[float]:
    """[PRESENCE]: 1 for each (colour, shape) pair, shape and colour that the scene shows, else 0."""
    pairs = {s.pair for s in scene.shapes}
    colors, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
    return [
        *(float(p in pairs) for p in PAIRS),
        *(float(s in shapes) for s in SHAPES),
        *(float(c in colors) for c in COLORS),
    ]


@lru_cache(maxsize=1)
def naming_tokens() -> tuple[dict[int, int], dict[int, int]]:
    """Class by token of shape words (singular, plural, Chinese), colour by token of colour words."""
    shapes = {w: CLASSES[s] for s in SHAPES for w in (" " + s, " " + plural(s), ZH_SHAPES[s])}
    colors = {w: COLOR_IDS[c] for c in COLORS for w in (" " + c, ZH_COLORS[c])}
    return {encode(w)[0]: i for w, i in shapes.items()}, {encode(w)[0]: i for w, i in colors.items()}


@lru_cache(maxsize=1)
def digit_tokens() -> frozenset[int]:
    """Token ids of the ten digits."""
    return frozenset(encode(d)[0] for d in "0123456789")


def asked_labels(scene: Scene, prompt: tuple[int, ...], start: int, image: int) -> list[list[int]]:
    """ASKED for each shape word of a prompt that starts at packed row `start`, its image token at `start + image`."""
    shapes, colors = naming_tokens()
    labels = []
    xs, ys = sorted(s.x for s in scene.shapes), sorted(s.y for s in scene.shapes)
    for i in range(image + 1, len(prompt)):
        if prompt[i] not in shapes:
            continue
        color = colors.get(prompt[i - 1], 0)
        found = [s for s in scene.shapes if CLASSES[s.shape] == shapes[prompt[i]] and color in (0, COLOR_IDS[s.color])]
        place = [IGNORE] * 3
        if len(found) == 1:
            place = [side_of(found[0].x / scene.image.width), xs.index(found[0].x), ys.index(found[0].y)]
        labels.append([start + i, start, start + image, int(bool(found)), len(found), *place])
    return labels


def pointing_targets(
    text: TextBatch, targets_T: Tensor, labels: list[np.ndarray], tile_counts: list[int]
) -> PointingTargets:
    """Targets for shape words, and for the rows that predict a digit of a number or the token after it.

    `labels` are the patch labels of the images, `tile_counts` their numbers of tiles without padding.
    """
    (shapes, colors), digits = naming_tokens(), digit_tokens()
    ids, next_ids = text.ids_T.tolist(), targets_T.tolist()
    rows, images, patches = [], [], []
    groups, length = text.single
    for row, place in enumerate(text.cross_T.tolist()):
        if place >= groups * length or not text.sees_T[row]:
            continue
        image = place // length
        if ids[row] in shapes:
            shown = labels[image][:, :, 0] == shapes[ids[row]]
            if ids[row - 1] in colors:
                shown = shown & (labels[image][:, :, 1] == colors[ids[row - 1]])
        elif next_ids[row] in digits or (next_ids[row] != IGNORE and ids[row] in digits):
            written = next(n for n in range(DIGIT_SLOTS + 1) if ids[row - n] not in digits)
            shown = labels[image][:, :, 2] == 1 + written
        else:
            continue
        target = np.zeros((MAX_TILES, PATCHES), bool)
        target[:, 1:] = shown
        if not shown.any():
            target[: tile_counts[image], 0] = True
        rows.append(row)
        images.append(image)
        patches.append(target.reshape(-1))
    stacked = np.stack(patches) if patches else np.zeros((0, MAX_TILES * PATCHES), bool)
    return PointingTargets(
        torch.tensor(rows, dtype=torch.long), torch.tensor(images, dtype=torch.long), torch.from_numpy(stacked)
    )
