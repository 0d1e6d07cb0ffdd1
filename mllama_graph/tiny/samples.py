"""Training batches: random scenes, questions about them, packed text, and the labels of all losses."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllama_graph.tiny.labels import (
    ASKED,
    IGNORE,
    PointingTargets,
    asked_labels,
    patch_labels,
    pointing_targets,
    presence_label,
    readout_label,
)
from mllama_graph.tiny.questions import LANGUAGES, Question, ask, ask_text, ask_two
from mllama_graph.tiny.scenes import SEEN, Scene, draw_number, draw_page, draw_scene, random_number
from mllama_graph.tiny.text import TextBatch
from mllama_graph.tiny.tiling import tile_image
from mllama_graph.tiny.tokenizer import EOT, IMAGE, encode, render_prompt

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in one sentence.", "你是一个有用的助手。")
SHAPE_KINDS = ("what", "color", "present", "absent", "count", "position")


@dataclass
class Group:
    """Zero to two scenes and the questions about them; without questions, only the readout head learns from it."""

    scenes: list[Scene]
    questions: list[Question]


@dataclass
class PackedText:
    """The packed sequences of a batch with their targets."""

    text: TextBatch
    targets_T: Tensor  # the next token at rows that predict an answer, else IGNORE
    spans: list[tuple[Question, int, int]]  # packed rows [start, end) that predict each answer
    readout_rows: Tensor  # the packed row of the first image token of each group with images
    asked: Tensor  # [n, len(ASKED)]: labels of the shape words in questions


@dataclass
class Batch:
    """The inputs and labels of a training step; images of groups come first, then the dense pages."""

    tiles: Tensor  # [I, C, 3, TILE, TILE]; empty if the vision features were computed before
    ratio_I: Tensor  # aspect-ratio ids; empty with `tiles`
    tiles_I: Tensor  # numbers of tiles without padding
    packed: PackedText
    patch_labels: Tensor  # [I, C, S - 1, 5]
    readout_labels: Tensor  # [groups with images, 2 * SLOTS + DIGIT_SLOTS], of the first image of each
    presence: Tensor  # [groups with images, PRESENCE], of the first image of each
    pointing: PointingTargets


@dataclass(frozen=True)
class Mix:
    """Composition of a batch."""

    pages: int  # dense pages, which only the patch head learns from
    readouts: int  # scenes without questions
    scenes: int
    questions: int  # at most, per scene
    pairs: int  # pairs of scenes
    talks: int  # questions without an image


def draw_pairs(rng: random.Random, count: int, allowed: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """`count` (colour, shape) pairs; half of the time several share shape, colour or both, for counts above 1."""
    style = rng.random()
    pairs = rng.sample(allowed, count)
    if style < 0.5 or count < 2:
        return pairs
    color, shape = rng.choice(allowed)
    if style < 0.7:
        pool = [p for p in allowed if p[1] == shape]
    elif style < 0.85:
        pool = [p for p in allowed if p[0] == color]
    else:
        pool = [(color, shape)]
    repeated = rng.randint(2, count)
    pairs[:repeated] = rng.choices(pool, k=repeated)
    return pairs


def random_scene(rng: random.Random) -> Scene:
    """A scene with a number or with zero to four shapes."""
    count = rng.choices((-1, 0, 1, 2, 3, 4), (75, 4, 7, 22, 22, 22))[0]
    if count < 0:
        return draw_number(rng, random_number(rng, rng.choices((1, 2, 3), (2, 3, 5))[0]))
    return draw_scene(rng, draw_pairs(rng, count, SEEN))


def question_group(rng: random.Random, wanted: int, scene: Scene) -> Group:
    """A scene and up to `wanted` different questions about it (at most two about a number)."""
    allowed = frozenset(SEEN)
    kinds = ["digits"] * 2 if scene.number else rng.choices(SHAPE_KINDS, (0.5, 0.4, 1, 1.2, 3.5, 5), k=3 * wanted)
    questions: dict[str, Question] = {}
    for kind in kinds:
        q = ask(kind, scene, rng, rng.choice(LANGUAGES), allowed)
        if q and len(questions) < wanted:
            questions.setdefault(q.text, q)
    return Group([scene], list(questions.values()))


def random_pair(rng: random.Random) -> list[Scene]:
    """Two scenes, each with one to three shapes of different (colour, shape)."""
    return [draw_scene(rng, rng.sample(SEEN, rng.choices((1, 2, 3), (4, 4, 2))[0])) for _ in range(2)]


def pair_group(rng: random.Random, wanted: int, scenes: list[Scene]) -> Group:
    """Two scenes and up to `wanted` questions about which of them shows a thing; none if they show the same pairs."""
    found = (ask_two(scenes, rng, rng.choice(LANGUAGES)) for _ in range(2 * wanted))
    questions = {q.text: q for q in found if q}
    return Group(scenes, list(questions.values())[:wanted])


def random_pair_group(rng: random.Random, wanted: int) -> Group:
    """Two random scenes and at least one question about them."""
    while not (group := pair_group(rng, wanted, random_pair(rng))).questions:
        pass
    return group


def grid_places(sizes: list[int], base: int = 0) -> list[int]:
    """Flat indices, from `base`, of rows of these sizes in a grid that is padded to the longest."""
    length = max(sizes, default=0)
    return [base + row * length + i for row, size in enumerate(sizes) for i in range(size)]


def pack_text(groups: list[Group], rng: random.Random) -> PackedText:
    """Pack the sequences of groups that are sorted as TextBatch requires."""
    (image,), (end,) = encode(IMAGE), encode(EOT)
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    sees: list[float] = []
    spans: list[tuple[Question, int, int]] = []
    readout_rows: list[int] = []
    asked: list[list[int]] = []
    lengths: list[int] = []
    sizes: dict[int, list[int]] = {0: [], 1: [], 2: []}  # tokens per group, by number of images
    first_images: list[list[int]] = []  # places of the first image tokens within each group of two images
    for group in groups:
        images, group_start = len(group.scenes), len(ids)
        sequences: list[Question | None] = [*group.questions] or [None]
        for q in sequences:
            system = rng.choice(SYSTEM_PROMPTS) if q and rng.random() < 0.04 else ""
            prompt, start = encode(render_prompt(q.text if q else "", images, system)), len(ids)
            first = prompt.index(image) if images else 0
            if q:
                answer = (*encode(q.answers[0]), end)
                tokens = prompt + answer[:-1]
                targets += [IGNORE] * (len(prompt) - 1) + list(answer)
                spans.append((q, start + len(prompt) - 1, start + len(tokens)))
                if images:
                    asked += asked_labels(group.scenes[0], prompt, start, first)
            else:
                tokens = prompt[: first + 1]
                targets += [IGNORE] * len(tokens)
            if images and start == group_start:
                readout_rows.append(start + first)
                first_images += [[]] if images == 2 else []
            if images == 2:
                first_images[-1].append(start + first - group_start)
            if images:
                sees += [0.0] * first + [1.0] * (len(tokens) - first)
            ids += tokens
            positions += range(len(tokens))
            lengths.append(len(tokens))
        sizes[images].append(len(ids) - group_start)
    padded, single, double = ((len(n), max(n, default=0)) for n in (lengths, sizes[1], sizes[2]))
    first_only = torch.zeros(double, dtype=torch.bool)
    for row, places in enumerate(first_images):
        first_only[row, places] = True
    cross = grid_places(sizes[1]) + grid_places(sizes[2], single[0] * single[1])
    text = TextBatch(
        ids_T=torch.tensor(ids),
        position_T=torch.tensor(positions),
        pad_T=torch.tensor(grid_places(lengths)),
        padded=padded,
        cross_T=torch.tensor(cross, dtype=torch.long),
        sees_T=torch.tensor(sees),
        single=single,
        double=double,
        first_only=first_only,
    )
    return PackedText(
        text,
        torch.tensor(targets),
        spans,
        torch.tensor(readout_rows, dtype=torch.long),
        torch.tensor(asked, dtype=torch.long).view(-1, len(ASKED)),
    )


def label_batch(
    groups: list[Group],
    tiles: Tensor,
    ratios: list[int],
    tile_counts: list[int],
    labels: list[np.ndarray],
    rng: random.Random,
) -> Batch:
    """A batch of sorted groups whose images, and dense pages after them, have these tiles and patch labels."""
    packed = pack_text(groups, rng)
    first_scenes = [g.scenes[0] for g in groups if g.scenes]
    return Batch(
        tiles=tiles,
        ratio_I=torch.tensor(ratios),
        tiles_I=torch.tensor(tile_counts),
        packed=packed,
        patch_labels=torch.from_numpy(np.stack(labels)) if labels else torch.zeros(0),
        readout_labels=torch.tensor([readout_label(s) for s in first_scenes]),
        presence=torch.tensor([presence_label(s) for s in first_scenes]),
        pointing=pointing_targets(packed.text, packed.targets_T, labels, tile_counts),
    )


def make_batch(groups: list[Group], pages: list[Scene], rng: random.Random) -> Batch:
    """A batch of these groups, in any order, and dense pages."""
    groups = sorted(groups, key=lambda g: len(g.scenes) or 3)
    scenes = [s for g in groups for s in g.scenes] + pages
    tiled = [tile_image(s.image) for s in scenes]
    tiles = torch.from_numpy(np.stack([t.tiles for t in tiled])) if tiled else torch.zeros(0)
    labels = [patch_labels(s) for s in scenes]
    return label_batch(groups, tiles, [t.ratio for t in tiled], [t.count for t in tiled], labels, rng)


def random_batch(mix: Mix, rng: random.Random) -> Batch:
    """A batch of random scenes, questions and dense pages."""
    groups = [Group([random_scene(rng)], []) for _ in range(mix.readouts)]
    groups += [question_group(rng, mix.questions, random_scene(rng)) for _ in range(mix.scenes)]
    groups += [random_pair_group(rng, 6) for _ in range(mix.pairs)]
    groups += [Group([], [ask_text(rng)]) for _ in range(mix.talks)]
    return make_batch(groups, [draw_page(rng) for _ in range(mix.pages)], rng)
