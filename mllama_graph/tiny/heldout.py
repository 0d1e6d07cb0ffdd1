"""Held-out questions: scenes of seeds that training never draws, balanced over kinds, languages and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from mllama_graph.tiny.questions import KINDS, LANGUAGES, Question, ask, ask_text, ask_two, name
from mllama_graph.tiny.samples import Group, draw_pairs
from mllama_graph.tiny.scenes import COLORS, PAIRS, SEEN, SHAPES, UNSEEN, Scene, draw_number, draw_scene, random_number

# Classes of answers within a kind that occur equally often.
VARIETIES = {
    "count": ("0", "1", "2", "3", "4"),
    "position": tuple(d + w for d in ("left", "right", "above", "below") for w in "01"),
    "two": ("0", "1"),
    "present": ("0", "1", "2"),
    "absent": ("color", "pair"),
    "color": tuple(COLORS),
}
UNSEEN_KINDS = tuple(k for k in KINDS if not k.startswith("digits") and k != "text")


def held_out_pairs(rng: random.Random, count: int, unseen: bool) -> list[tuple[str, str]]:
    """(colour, shape) pairs for one scene; with `unseen`, at least one of them never occurs in training."""
    if not unseen:
        return draw_pairs(rng, count, SEEN)
    pairs = draw_pairs(rng, count, PAIRS)
    if count and not any(p in UNSEEN for p in pairs):
        new = rng.choice([p for p in UNSEEN if p not in pairs])
        pairs = [new if p == pairs[0] else p for p in pairs] if rng.random() < 0.3 else [new, *pairs[1:]]
    return pairs


def draw_for(kind: str, variety: str, rng: random.Random, unseen: bool) -> list[Scene]:
    """Scenes about which a question of this kind and class is likely to be possible."""
    if kind == "text":
        return []
    if kind.startswith("digits"):
        return [draw_number(rng, random_number(rng, int(kind[-1])))]
    if kind == "two":
        return [draw_scene(rng, held_out_pairs(rng, rng.randint(1, 2), unseen)) for _ in range(2)]
    if kind == "count":
        return [draw_scene(rng, held_out_pairs(rng, rng.randint(1 if unseen else int(variety), 4), unseen))]
    count = {"what1": 1, "what2": 2, "what3": 3, "position": rng.randint(2, 3)}.get(kind, rng.randint(1, 3))
    return [draw_scene(rng, held_out_pairs(rng, count, unseen))]


def names_unseen(question: Question, scenes: list[Scene]) -> bool:
    """Whether the answer or the thing that the question names is a pair that never occurs in training."""
    if question.kind == "absent":
        return True
    if question.kind == "color":
        return any(s.pair in UNSEEN and s.shape == asked_shape(question) for s in scenes[0].shapes)
    return any(name(c, s, question.language) in question.answers[0] for c, s in UNSEEN)


def asked_shape(question: Question) -> str:
    """The shape that a colour question names."""
    return next(s for s in SHAPES if name("", s, question.language) in question.text)


def held_out_group(kind: str, variety: str, language: str, rng: random.Random, unseen: bool) -> Group:
    """One question of this kind and answer class, with its scenes."""
    allowed = frozenset(PAIRS if unseen else SEEN)
    while True:
        scenes = draw_for(kind, variety, rng, unseen)
        for _ in range(6):
            q: Question | None
            if kind == "text":
                q = ask_text(rng)
            elif kind == "two":
                q = ask_two(scenes, rng, language)
            else:
                q = ask(kind.rstrip("123"), scenes[0], rng, language, allowed)
            if q and q.kind == kind and (kind == "text" or q.language == language) and variety in ("", q.variety):
                if not unseen or names_unseen(q, scenes):
                    return Group(scenes, [q])


def held_out(each: int, unseen: bool) -> Iterator[Group]:
    """`each` questions of every kind, deterministic; languages and answer classes alternate."""
    for kind in UNSEEN_KINDS if unseen else KINDS:
        classes = VARIETIES.get(kind, ("",))
        if unseen and kind == "color":
            classes = tuple(color for color, _ in UNSEEN)
        for i in range(each):
            rng = random.Random(f"held out {kind} {i} {unseen}")
            yield held_out_group(kind, classes[i // 2 % len(classes)], LANGUAGES[i % 2], rng, unseen)


def write_requests(folder: Path, each: int) -> Path:
    """Write a requests file of `each` held-out questions per kind with their answers, and their images beside it.

    Kinds named `new ...` ask about (colour, shape) pairs that never occur in training. Returns the file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "requests.jsonl"
    with path.open("w", encoding="utf8") as file:
        for unseen, prefix in ((False, ""), (True, "new ")):
            for number, group in enumerate(held_out(each, unseen)):
                question = group.questions[0]
                id = f"{prefix}{question.kind} {number}".replace(" ", "-")
                images = [f"{id}-{n}.png" for n in range(len(group.scenes))]
                for file_name, scene in zip(images, group.scenes):
                    scene.image.save(folder / file_name)
                line = {
                    "id": id,
                    "kind": prefix + question.kind,
                    "prompt": question.text,
                    "images": images,
                    "answer": list(question.answers),
                    "max_new_tokens": 64,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path
