"""Scenes whose vision features are computed once, to train the language model alone at a third of a step's cost."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllama_graph.tiny.labels import patch_labels
from mllama_graph.tiny.model import Mllama
from mllama_graph.tiny.questions import ask_text
from mllama_graph.tiny.samples import (
    Batch,
    Group,
    Mix,
    label_batch,
    pair_group,
    question_group,
    random_pair,
    random_scene,
)
from mllama_graph.tiny.scenes import Scene
from mllama_graph.tiny.tiling import tile_image

NEW_SINGLES, NEW_PAIRS = 3, 1  # per step


@dataclass
class EncodedScenes:
    """One or two scenes with their vision features."""

    scenes: list[Scene]
    features: Tensor  # [scenes, C, S, vision_output]
    tile_counts: list[int]
    labels: list[np.ndarray]  # patch labels of each scene


@torch.no_grad()
def encode_scenes(model: Mllama, scenes: list[Scene]) -> EncodedScenes:
    """Run the vision encoder on scenes."""
    tiled = [tile_image(s.image) for s in scenes]
    tiles, counts = torch.from_numpy(np.stack([t.tiles for t in tiled])), [t.count for t in tiled]
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_images(tiles, torch.tensor([t.ratio for t in tiled]), torch.tensor(counts))
    return EncodedScenes(scenes, features.float(), counts, [patch_labels(s) for s in scenes])


class Pool:
    """A sliding window over an endless stream of random scenes and pairs of scenes, from which batches are drawn.

    Its content at a step depends on nothing but that step, so that a resumed run draws what an unbroken one draws.
    """

    def __init__(self, model: Mllama, stream: str, singles: int, pairs: int, step: int):
        """Encode the window of `singles` scenes and `pairs` pairs before `step`; `stream` seeds the scenes."""
        self.model, self.stream = model, stream
        self.singles = deque((self.single(NEW_SINGLES * step - n) for n in range(singles, 0, -1)), singles)
        self.pairs = deque((self.pair(NEW_PAIRS * step - n) for n in range(pairs, 0, -1)), pairs)

    def single(self, number: int) -> EncodedScenes:
        """Scene `number` of the stream."""
        return encode_scenes(self.model, [random_scene(random.Random(f"{self.stream} single {number}"))])

    def pair(self, number: int) -> EncodedScenes:
        """Pair `number` of the stream."""
        return encode_scenes(self.model, random_pair(random.Random(f"{self.stream} pair {number}")))

    def batch(self, mix: Mix, step: int, rng: random.Random) -> tuple[Batch, Tensor]:
        """A batch without tiles and the features of its images; then replaces the oldest scenes by those of `step`."""
        singles, pairs = rng.sample(self.singles, mix.scenes), rng.sample(self.pairs, mix.pairs)
        self.singles.extend(self.single(NEW_SINGLES * step + n) for n in range(NEW_SINGLES))
        self.pairs.extend(self.pair(NEW_PAIRS * step + n) for n in range(NEW_PAIRS))
        asked = [(question_group(rng, mix.questions, e.scenes[0]), e) for e in singles]
        asked += [(pair_group(rng, 6, e.scenes), e) for e in pairs]
        groups, encoded = [g for g, _ in asked if g.questions], [e for g, e in asked if g.questions]
        groups += [Group([], [ask_text(rng)]) for _ in range(mix.talks)]
        counts, labels = [n for e in encoded for n in e.tile_counts], [x for e in encoded for x in e.labels]
        batch = label_batch(groups, torch.zeros(0), [], counts, labels, rng)
        return batch, torch.cat([e.features for e in encoded])
