"""A checkpoint whose weights are written down, not trained: it finds a needle in a haystack of any length.

A needle is three ids: a key, its value, and what follows the value. The model's two self-attention layers form an
induction head. The first one looks one position back, and adds the key code of the id before to each position. The
second one looks for the position whose id before has the current id's key code, and returns the id there. Keys are
compared in the slow pairs of rope, which turn little over the whole context only if rope is scaled as configured.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from checkpoints import SPECS, random_weights, write_checkpoint, write_weights
from torch import Tensor

NEEDLES = 12
WIDTH = 128
# Sizes of the codes in the residual stream, whose squares sum to WIDTH, so that norms change little.
SIZE = 4.0
# Places in the residual stream: key codes of the id and of the one before, result codes of the id and of the answer.
CODES = 2 * NEEDLES
KEY, BEFORE, RESULT, ANSWER = (slice(i * CODES, (i + 1) * CODES) for i in range(4))
ONE, FILLING = 4 * CODES, 4 * CODES + 1
# How many times slower rope turns slow pairs, as configured.
SCALED = 8.0
# Pairs of rope that tell one position back from all others, and how far its attention score is above theirs (nats).
FAST_PAIRS, SHARPNESS = 10, 20.0
SPEC = replace(SPECS["base"], hidden=WIDTH, heads=1, kv_heads=1, mlp=32, layers=3, cross_layers=[2], names="new")


@dataclass(frozen=True)
class Haystack:
    """`ids`, with a needle at equal distances, of which the first is at the start; question i has `answers[i]`."""

    ids: tuple[int, ...]
    keys: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


def haystack(length: int) -> Haystack:
    """A haystack of `length` ids."""
    ids = torch.randint(3 * NEEDLES, 300, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    keys, answers = range(NEEDLES), [(NEEDLES + i, 2 * NEEDLES + i) for i in range(NEEDLES)]
    for i in keys:
        at = i * (length - 3) // (NEEDLES - 1)
        ids[at : at + 3] = [i, *answers[i]]
    return Haystack(tuple(ids), tuple(keys), tuple(answers))


def frequency(pair: int) -> float:
    """The unscaled rotation of a pair of rope, in radians per position."""
    return SPEC.rope_theta ** (-2 * pair / WIDTH)


def write(folder: Path, length: int) -> Path:
    """Write the checkpoint for haystacks of up to `length` ids."""
    write_checkpoint(folder, SPEC)
    weights = random_weights(SPEC)
    text = "model.language_model."
    for name in weights:
        if name.startswith(text + "layers.") and name.endswith("norm.weight") or name == text + "norm.weight":
            weights[name].fill_(1)
        if "_proj.weight" in name and name.startswith(text):
            weights[name].zero_()
    weights[text + "embed_tokens.weight"].copy_(embedding())
    one_back(weights, text + "layers.0.self_attn.")
    match(weights, text + "layers.1.self_attn.", length)
    head = weights["lm_head.weight"].zero_()
    head[NEEDLES : 3 * NEEDLES, ANSWER] = 10 * torch.eye(CODES)
    write_weights(folder, weights, 1)
    return folder


def embedding() -> Tensor:
    """Keys and values have a key code, values and what follows them a result code."""
    table = torch.zeros(SPEC.vocab + 8, WIDTH)
    table[: 2 * NEEDLES, KEY] = SIZE * torch.eye(CODES)
    table[NEEDLES : 3 * NEEDLES, RESULT] = SIZE * torch.eye(CODES)
    table[:, ONE] = SIZE
    table[:, FILLING] = (WIDTH - table.square().sum(1)).sqrt()
    return table


def one_back(weights: dict[str, Tensor], layer: str) -> None:
    """Attend to the position before, and add its key code at BEFORE."""
    size = math.sqrt(SHARPNESS * math.sqrt(WIDTH)) / SIZE
    for pair in range(FAST_PAIRS):
        weights[layer + "k_proj.weight"][pair, ONE] = size
        weights[layer + "q_proj.weight"][pair, ONE] = size * math.cos(frequency(pair))
        weights[layer + "q_proj.weight"][pair + WIDTH // 2, ONE] = -size * math.sin(frequency(pair))
    weights[layer + "v_proj.weight"][:CODES, KEY] = torch.eye(CODES)
    weights[layer + "o_proj.weight"][BEFORE, :CODES] = torch.eye(CODES)


def match(weights: dict[str, Tensor], layer: str, length: int) -> None:
    """Attend to the position whose id before has this id's key code, and add its result code at ANSWER."""
    turned = (frequency(pair) / SCALED * length for pair in range(WIDTH // 2))
    first = next(pair for pair, angle in enumerate(turned) if angle < 0.4)
    size = math.sqrt(2 * SHARPNESS * math.sqrt(WIDTH)) / SIZE
    for code in range(CODES):
        place = first + code // 2 + code % 2 * (WIDTH // 2)
        weights[layer + "q_proj.weight"][place, code + KEY.start] = size
        weights[layer + "k_proj.weight"][place, code + BEFORE.start] = size
    weights[layer + "v_proj.weight"][:CODES, RESULT] = torch.eye(CODES)
    weights[layer + "o_proj.weight"][ANSWER, :CODES] = torch.eye(CODES)
