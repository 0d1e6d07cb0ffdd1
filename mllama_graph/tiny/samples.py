"""Training batches: scenes, questions on them, packed text, and labels for the two auxiliary heads."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mllama_graph.tiny.model import TextBatch
from mllama_graph.tiny.questions import LANGUAGES, ZH_COLORS, ZH_SHAPES, Question, ask, ask_text, ask_two, plural
from mllama_graph.tiny.scenes import COLORS, SEEN, SHAPES, Scene, draw_number, draw_page, draw_scene
from mllama_graph.tiny.tiling import GRID, MAX_TILES, PATCH, PATCHES, TILE, choose_canvas, fit_size, tile_image
from mllama_graph.tiny.tokenizer import EOT, IMAGE, build_tokenizer, render_prompt

CLASSES = {label: i for i, label in enumerate(("", *SHAPES, *"0123456789"))}
COLOR_IDS = {c: i + 1 for i, c in enumerate(COLORS)}
IGNORE = -100
SLOTS, DIGIT_SLOTS = 4, 3  # what the read-out head names: shapes from left to right, digits
# Packed row of the word, of its sequence's start, of its (first) image token; whether the first image holds the thing;
# how many it holds; its side, its rank from the left and from the top where there is one (else IGNORE).
ASKED = ("row", "start", "image", "present", "count", "side", "left", "top")
PAIRS = tuple((c, s) for c in COLORS for s in SHAPES)
PRESENCE = len(PAIRS) + len(SHAPES) + len(COLORS)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in one sentence.", "你是一个有用的助手。")
SHAPE_KINDS = ("what", "color", "present", "absent", "count", "position")


@dataclass
class Group:
    """One or two scenes (none for text alone) and the questions on them; no question means the read-out only."""

    scenes: list[Scene]
    questions: list[Question]


@dataclass
class Batch:
    """Everything a training step needs; images of groups come first, then the dense pages."""

    tiles: Tensor  # [I, C, 3, TILE, TILE]
    ratio_I: Tensor
    tiles_I: Tensor
    text: TextBatch | None
    targets_T: Tensor  # next token where an answer is to be learned, else IGNORE
    spans: list[tuple[Question, int, int]]  # rows of the packed text that predict each answer
    patch_labels: Tensor  # [I, C, S - 1, 5]: class, colour, rank from the left, rank from the top, side
    readout_rows: Tensor  # the packed rows of first image tokens, one a group
    readout_labels: Tensor  # [groups, SLOTS * 2 + DIGIT_SLOTS]
    presence: Tensor  # [groups, PRESENCE]: which pairs, shapes and colours the (first) image holds
    named_rows: Tensor  # packed rows of shape words in questions and answers on one image
    named_group: Tensor  # their image
    named_target: Tensor  # [rows, C * S]: the patches they mean; the CLS places where the thing is absent
    single_end: int  # packed rows before this one belong to sequences on one image
    asked: Tensor  # [n, 8], a row for each shape word of a question: see ASKED


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The tiny model's tokenizer, built once."""
    return build_tokenizer()


@lru_cache(maxsize=50_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text, special tokens read as such and none added."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def side_of(x: float) -> int:
    """Left, middle or right for a centre at this part of the width."""
    return 0 if x < 0.4 else 1 if x < 0.6 else 2


def patch_labels(scene: Scene) -> np.ndarray:
    """[C, S - 1, 5] for one scene; dense pages have no ranks and sides."""
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
        mine = covered > best
        best[mine] = covered[mine]
        labels[mine, :2] = CLASSES[glyph.label], COLOR_IDS[glyph.color]
        if ranked:
            labels[mine, 2] = 1 + xs.index(glyph.x)
            if scene.shapes:
                labels[mine, 3:] = 1 + ys.index(glyph.y), 1 + side_of(glyph.x / scene.image.width)
    tiles = labels.reshape(down, GRID, across, GRID, 5).transpose(0, 2, 1, 3, 4).reshape(-1, PATCHES - 1, 5)
    padded = np.full((MAX_TILES, PATCHES - 1, 5), IGNORE)
    padded[: down * across] = tiles
    return padded


def readout_label(scene: Scene) -> list[int]:
    """Shape and colour of each slot, then the digits; 0 means nothing there."""
    slots = [v for s in scene.shapes[:SLOTS] for v in (CLASSES[s.shape], COLOR_IDS[s.color])]
    digits = [1 + int(d) for d in scene.number]
    return slots + [0] * (2 * SLOTS - len(slots)) + digits + [0] * (DIGIT_SLOTS - len(digits))


def presence_label(scene: Scene) -> list[float]:
    """1 for every pair, shape and colour that the scene holds."""
    pairs = {s.pair for s in scene.shapes}
    colors, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
    asked = ((PAIRS, pairs), (SHAPES, shapes), (COLORS, colors))
    return [float(thing in there) for things, there in asked for thing in things]


@lru_cache(maxsize=1)
def naming_tokens() -> tuple[dict[int, int], dict[int, int]]:
    """Token to class for shape words (singular, plural, Chinese), token to colour for colour words."""
    shapes = {w: CLASSES[s] for s in SHAPES for w in (" " + s, " " + plural(s), ZH_SHAPES[s])}
    colors = {w: COLOR_IDS[c] for c in COLORS for w in (" " + c, ZH_COLORS[c])}
    return tuple({encode(w)[0]: i for w, i in words.items()} for words in (shapes, colors))


def asked_things(group: Group, prompt: tuple[int, ...], base: int, image: int) -> list[list[int]]:
    """ASKED for every shape word after the image tokens of one prompt that starts at packed row `base`."""
    shapes, colors = naming_tokens()
    scene, rows = group.scenes[0], []
    xs, ys = sorted(s.x for s in scene.shapes), sorted(s.y for s in scene.shapes)
    for i in range(image + 1, len(prompt)):
        if prompt[i] not in shapes:
            continue
        color = colors.get(prompt[i - 1], 0)
        found = [s for s in scene.shapes if CLASSES[s.shape] == shapes[prompt[i]] and color in (0, COLOR_IDS[s.color])]
        place = [IGNORE] * 3
        if len(found) == 1:
            place = [side_of(found[0].x / scene.image.width), xs.index(found[0].x), ys.index(found[0].y)]
        rows.append([base + i, base, base + image, int(bool(found)), len(found), *place])
    return rows


@lru_cache(maxsize=1)
def digit_tokens() -> frozenset[int]:
    """The ten digits' tokens."""
    return frozenset(encode(d)[0] for d in "0123456789")


def named_things(
    text: TextBatch, wanted: Tensor, labels: np.ndarray, ratio_tiles: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows on single images that mean a thing, their images, and the patches of what they mean.

    Such rows are shape words, and those from which a number's digits and its end are to be told.
    """
    (shapes, colors), digits = naming_tokens(), digit_tokens()
    ids, tell, rows, images, targets = text.ids_T.tolist(), wanted.tolist(), [], [], []
    groups, length = text.single
    for row, place in enumerate(text.cross_T.tolist()):
        if place >= groups * length or not text.sees_T[row]:
            continue
        image = place // length
        if ids[row] in shapes:
            found = labels[image, :, :, 0] == shapes[ids[row]]
            if ids[row - 1] in colors:
                found = found & (labels[image, :, :, 1] == colors[ids[row - 1]])
        elif tell[row] in digits or (tell[row] != IGNORE and ids[row] in digits):
            told = next(n for n in range(DIGIT_SLOTS + 1) if ids[row - n] not in digits)
            found = labels[image, :, :, 2] == 1 + told
        else:
            continue
        target = np.zeros((MAX_TILES, PATCHES), bool)
        target[:, 1:] = found
        if not found.any():
            target[: ratio_tiles[image], 0] = True
        rows.append(row)
        images.append(image)
        targets.append(target.reshape(-1))
    stacked = np.stack(targets) if targets else np.zeros((0, MAX_TILES * PATCHES), bool)
    return torch.tensor(rows, dtype=torch.long), torch.tensor(images, dtype=torch.long), torch.from_numpy(stacked)


def draw_pairs(rng: random.Random, count: int, allowed: tuple) -> list[tuple[str, str]]:
    """`count` (colour, shape) pairs; often several share a shape, a colour or both, so that counting has work."""
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


def random_number(rng: random.Random) -> str:
    """One to three digits with no leading zero."""
    length = rng.choices((1, 2, 3), (2, 3, 5))[0]
    first = rng.choice("0123456789" if length == 1 else "123456789")
    return first + "".join(rng.choice("0123456789") for _ in range(length - 1))


def random_scene(rng: random.Random) -> Scene:
    """A scene for questions: a number, or none to four shapes."""
    count = rng.choices((-1, 0, 1, 2, 3, 4), (75, 4, 7, 22, 22, 22))[0]
    return draw_number(rng, random_number(rng)) if count < 0 else draw_scene(rng, draw_pairs(rng, count, SEEN))


def question_group(rng: random.Random, wanted: int, scene: Scene | None = None) -> Group:
    """One scene and up to `wanted` different questions on it (two on a number)."""
    scene, allowed = scene or random_scene(rng), frozenset(SEEN)
    kinds = ["digits"] * 2 if scene.number else rng.choices(SHAPE_KINDS, (0.5, 0.4, 1, 1.2, 3.5, 5), k=3 * wanted)
    questions: dict[str, Question] = {}
    for kind in kinds:
        q = ask(kind, scene, rng, rng.choice(LANGUAGES), allowed)
        if q and len(questions) < wanted:
            questions.setdefault(q.text, q)
    return Group([scene], list(questions.values()))


def pair_scenes(rng: random.Random) -> list[Scene]:
    """Two scenes of one to three different shapes."""
    return [draw_scene(rng, rng.sample(SEEN, rng.choices((1, 2, 3), (4, 4, 2))[0])) for _ in range(2)]


def pair_group(rng: random.Random, wanted: int, scenes: list[Scene] | None = None) -> Group:
    """Two scenes and questions about which of them holds a thing; on given scenes there may be none to ask."""
    while True:
        chosen = scenes or pair_scenes(rng)
        found = (ask_two(tuple(chosen), rng, rng.choice(LANGUAGES)) for _ in range(2 * wanted))
        questions = {q.text: q for q in found if q}
        if questions or scenes:
            return Group(list(chosen), list(questions.values())[:wanted])


def pack_text(groups: list[Group], rng: random.Random) -> tuple[TextBatch, Tensor, list, Tensor, Tensor]:
    """Pack the questions of groups ordered as one image, two images, none."""
    ids, targets, positions, pad, cross, sees = [], [], [], [], [], []
    spans, readout, lengths, group_sizes, asked = [], [], [], ([], []), []
    image, end = tokenizer().token_to_id(IMAGE), tokenizer().token_to_id(EOT)
    first_only: list[list[int]] = []
    group_of, inner = [], []
    for group in groups:
        images, used, marks = len(group.scenes), 0, []
        for index, q in enumerate(group.questions or [None]):
            system = rng.choice(SYSTEM_PROMPTS) if q and rng.random() < 0.04 else ""
            prompt = encode(render_prompt(q.text if q else "", images, system))
            answer = (*encode(q.answers[0]), end) if q else ()
            tokens = prompt + answer[:-1]
            first = prompt.index(image) if images else 0
            if not q:
                tokens = prompt[: first + 1]
            if images and q:
                asked += asked_things(group, prompt, len(ids), first)
            if images and index == 0:
                readout.append(len(ids) + first)
            if images == 2:
                marks.append(used + first)
            if q:
                spans.append((q, len(ids) + len(prompt) - 1, len(ids) + len(tokens)))
            ids += tokens
            targets += [IGNORE] * (len(prompt) - 1) + list(answer) if q else [IGNORE] * len(tokens)
            positions += range(len(tokens))
            sees += [0.0] * first + [1.0] * (len(tokens) - first)
            inner += range(used, used + len(tokens))
            group_of += [(images, len(group_sizes[images - 1]))] * len(tokens) if images else []
            used += len(tokens)
            lengths.append(len(tokens))
        if images:
            group_sizes[images - 1].append(used)
        if images == 2:
            first_only.append(marks)
    length = max(lengths)
    for i, n in enumerate(lengths):
        pad += range(i * length, i * length + n)
    single, double = ((len(g), max(g, default=0)) for g in group_sizes)
    base = single[0] * single[1]
    cross = [g * single[1] + t if k == 1 else base + g * double[1] + t for (k, g), t in zip(group_of, inner)]
    marks = torch.zeros(double, dtype=torch.bool)
    for row, columns in enumerate(first_only):
        marks[row, columns] = True
    tensor = torch.tensor
    text = TextBatch(
        tensor(ids),
        tensor(positions),
        tensor(pad),
        (len(lengths), length),
        tensor(cross, dtype=torch.long),
        tensor(sees[: len(cross)]),
        single,
        double,
        marks,
    )
    things = tensor(asked, dtype=torch.long).view(-1, len(ASKED))
    return text, tensor(targets), spans, tensor(readout, dtype=torch.long), things


def make_batch(groups: list[Group], pages: list[Scene], rng: random.Random) -> Batch:
    """Tiles, packed text and labels of these groups and dense pages."""
    groups = sorted(groups, key=lambda g: len(g.scenes) or 3)
    scenes = [s for g in groups for s in g.scenes] + pages
    text, targets, spans, rows, asked = pack_text(groups, rng)
    tiled = [tile_image(s.image) for s in scenes]
    labels = [patch_labels(s) for s in scenes]
    readouts = [readout_label(g.scenes[0]) for g in groups if g.scenes]
    presence = [presence_label(g.scenes[0]) for g in groups if g.scenes]
    named = named_things(text, targets, np.stack(labels) if labels else np.zeros(0), [t[2] for t in tiled])
    stack = torch.from_numpy(np.stack([t[0] for t in tiled])) if tiled else torch.zeros(0)
    return Batch(
        stack,
        torch.tensor([t[1] for t in tiled]),
        torch.tensor([t[2] for t in tiled]),
        text,
        targets,
        spans,
        torch.from_numpy(np.stack(labels)) if labels else torch.zeros(0),
        rows,
        torch.tensor(readouts),
        torch.tensor(presence),
        *named,
        int((text.cross_T < text.single[0] * text.single[1]).sum()),
        asked,
    )


@dataclass(frozen=True)
class Mix:
    """How many of each a batch holds."""

    pages: int
    readouts: int
    scenes: int
    questions: int
    pairs: int
    talks: int


def training_batch(mix: Mix, rng: random.Random) -> Batch:
    """One random batch."""
    groups = [Group([random_scene(rng)], []) for _ in range(mix.readouts)]
    groups += [question_group(rng, mix.questions) for _ in range(mix.scenes)]
    groups += [pair_group(rng, 6) for _ in range(mix.pairs)]
    groups += [Group([], [ask_text(rng)]) for _ in range(mix.talks)]
    return make_batch(groups, [draw_page(rng) for _ in range(mix.pages)], rng)
