"""Exact match of the training model on held-out scenes per kind of question, with controls.

An answer is right if greedy decoding gives each of its tokens and the end-of-turn token. The weights are the moving
average, rounded to bfloat16 as in the exported checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from mllama_graph.tiny.heldout import held_out
from mllama_graph.tiny.layers import Shape
from mllama_graph.tiny.model import Mllama
from mllama_graph.tiny.questions import KINDS, Question
from mllama_graph.tiny.samples import Batch, Group, make_batch
from mllama_graph.tiny.tokenizer import tokenizer


def shuffled(batch: Batch, features: Tensor) -> Tensor:
    """Features in another order: every question sees the image of another group of its batch."""
    single = batch.packed.text.single[0]
    rest = torch.arange(single, len(features))
    return features[torch.cat([torch.arange(single).roll(7), rest.roll(6)])]


@torch.no_grad()
def answers_right(model: Mllama, batch: Batch, control: str) -> list[tuple[Question, bool, list[int]]]:
    """Each question, whether greedy decoding gives its first answer, and the tokens chosen at its rows.

    `control` is empty, "shuffled" (images exchanged) or "no cross-attention" (images hidden).
    """
    features = None
    if len(batch.tiles) and control != "no cross-attention":
        features = model.encode_images(batch.tiles, batch.ratio_I, batch.tiles_I)
        if control == "shuffled":
            features = shuffled(batch, features)
    packed = batch.packed
    chosen = model.lm_head(model.forward_text(packed.text, features, batch.tiles_I).last).argmax(-1)
    return [(q, bool((chosen[a:b] == packed.targets_T[a:b]).all()), chosen[a:b].tolist()) for q, a, b in packed.spans]


def score(
    model: Mllama, groups: list[Group], control: str = ""
) -> tuple[dict[str, float], list[tuple[Question, list[int]]]]:
    """Exact match in % by kind, by language and overall; and the questions with a wrong answer, with its tokens."""
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i].scenes), i * 7919 % 1009))
    for start in range(0, len(order), 40):
        batch = make_batch([groups[i] for i in order[start : start + 40]], [], random.Random(start))
        for q, good, tokens in answers_right(model, batch, control):
            right[q.kind].append(good)
            right["language " + q.language].append(good)
            right["all"].append(good)
            if q.kind in ("count", "position"):
                right[f"{q.kind} {q.variety.rstrip('01') if q.kind == 'position' else q.variety}"].append(good)
            if not good:
                wrong.append((q, tokens))
    return {k: round(100 * sum(v) / len(v), 1) for k, v in right.items()}, wrong


def load_weights(path: Path, which: str) -> Mllama:
    """A model with the weights `average` or `model` of a training checkpoint, rounded to bfloat16, in float32."""
    model = Mllama(Shape())
    model.load_state_dict({k: v.bfloat16().float() for k, v in torch.load(path)[which].items()})
    return model.eval()


def main(argv: list[str]) -> None:
    """Print exact match of a checkpoint, and some of its wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--each", type=int, default=40, help="questions per kind")
    parser.add_argument(
        "--controls", action="store_true", help="also score unseen pairs, shuffled images and no cross-attention"
    )
    parser.add_argument("--wrong", type=int, default=12, help="number of wrong answers to print")
    parser.add_argument("--raw", action="store_true", help="use the last weights instead of their moving average")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_weights(args.checkpoint, "model" if args.raw else "average")
    groups = list(held_out(args.each, False))
    table = {}
    table["held out"], wrong = score(model, groups)
    if args.controls:
        table["unseen pairs"], wrong_unseen = score(model, list(held_out(args.each, True)))
        for control in ("shuffled", "no cross-attention"):
            table[control] = score(model, groups, control)[0]
        wrong += wrong_unseen
    rows = sorted(table["held out"], key=lambda k: (KINDS.index(k) if k in KINDS else 99, k))
    print(f"{'':16}" + "".join(f"{c:>20}" for c in table))
    for row in rows:
        print(f"{row:16}" + "".join(f"{t.get(row, float('nan')):20.1f}" for t in table.values()))
    for q, tokens in random.Random(0).sample(wrong, min(args.wrong, len(wrong))):
        print(f"  {q.kind}: {q.text} wanted {q.answers[0]!r} got {tokenizer().decode(tokens)!r}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
