"""Scenes whose vision features are computed once, to train the text alone: a step costs a third."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllama_graph.tiny.model import Mllama
from mllama_graph.tiny.questions import ask_text
from mllama_graph.tiny.samples import (
    Batch,
    Group,
    Mix,
    named_things,
    pack_text,
    pair_group,
    pair_scenes,
    patch_labels,
    presence_label,
    question_group,
    random_scene,
    readout_label,
)
from mllama_graph.tiny.scenes import Scene
from mllama_graph.tiny.tiling import tile_image

NEW_SINGLES, NEW_PAIRS = 3, 1  # a step


@dataclass
class Entry:
    """One or two scenes with what the vision tower made of them."""

    scenes: list[Scene]
    features: Tensor  # [1 or 2, C, S, vision_output]
    tiles: list[int]
    labels: list[np.ndarray]


@torch.no_grad()
def see_scenes(model: Mllama, scenes: list[Scene]) -> Entry:
    """Run the vision tower; the pictures themselves are not kept."""
    tiled = [tile_image(s.image) for s in scenes]
    stack = torch.from_numpy(np.stack([t[0] for t in tiled]))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.see(stack, torch.tensor([t[1] for t in tiled]), torch.tensor([t[2] for t in tiled]))
    return Entry(scenes, features.float(), [t[2] for t in tiled], [patch_labels(s) for s in scenes])


class Pool:
    """The latest of an endless row of scenes, and of pairs, to draw batches from.

    What it holds at a step depends on that step alone, so that a run that goes on sees what an unbroken one sees.
    """

    def __init__(self, model: Mllama, stream: str, singles: int, pairs: int, step: int):
        """The `singles` scenes and `pairs` pairs of `stream` that stand at `step`."""
        self.model, self.stream = model, stream
        self.singles = deque((self.single(NEW_SINGLES * step - n) for n in range(singles, 0, -1)), singles)
        self.pairs = deque((self.pair(NEW_PAIRS * step - n) for n in range(pairs, 0, -1)), pairs)

    def single(self, number: int) -> Entry:
        """Scene `number` of the stream, seen."""
        return see_scenes(self.model, [random_scene(random.Random(f"{self.stream} single {number}"))])

    def pair(self, number: int) -> Entry:
        """Pair `number` of the stream, seen."""
        return see_scenes(self.model, pair_scenes(random.Random(f"{self.stream} pair {number}")))

    def batch(self, mix: Mix, step: int, rng: random.Random) -> tuple[Batch, Tensor]:
        """A batch without pictures, and the features of its images; then new scenes take the place of the oldest."""
        singles, pairs = rng.sample(self.singles, mix.scenes), rng.sample(self.pairs, mix.pairs)
        self.singles.extend(self.single(NEW_SINGLES * step + n) for n in range(NEW_SINGLES))
        self.pairs.extend(self.pair(NEW_PAIRS * step + n) for n in range(NEW_PAIRS))
        made = [(question_group(rng, mix.questions, e.scenes[0]), e) for e in singles]
        made = [(g, e) for g, e in made if g.questions]
        made += [(g, e) for e in pairs if (g := pair_group(rng, 6, e.scenes)).questions]
        groups, entries = [g for g, _ in made], [e for _, e in made]
        groups += [Group([], [ask_text(rng)]) for _ in range(mix.talks)]
        text, targets, spans, rows, asked = pack_text(groups, rng)
        tiles = [t for e in entries for t in e.tiles]
        labels = np.stack([x for e in entries for x in e.labels])
        return Batch(
            torch.zeros(0),
            torch.zeros(0),
            torch.tensor(tiles),
            text,
            targets,
            spans,
            torch.zeros(0),
            rows,
            torch.tensor([readout_label(e.scenes[0]) for e in entries]),
            torch.tensor([presence_label(e.scenes[0]) for e in entries]),
            *named_things(text, targets, labels, tiles),
            int((text.cross_T < text.single[0] * text.single[1]).sum()),
            asked,
        ), torch.cat([e.features for e in entries])
