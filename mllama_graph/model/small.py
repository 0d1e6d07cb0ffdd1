"""Reads small tensors of safetensors files whole, without torch: scales, zero points and permutations."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mllama_graph.core.errors import UserError

# Names of dtypes in safetensors headers -> how numpy reads them. BF16 is the upper half of an fp32.
KINDS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: dtype as in KINDS, shape, its first byte and the one after its last."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


@lru_cache(maxsize=64)
def _header(path: Path, changed: int) -> tuple[int, dict[str, Any]]:
    """The offset of a file's data, and its tensors by name. changed: when the file was, so that it is read again."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def place_of(path: Path, name: str) -> Place:
    """Where a tensor lies in a file that safetensors has accepted. A header is parsed once, while it doesn't change."""
    begin, tensors = _header(path, path.stat().st_mtime_ns)
    start, stop = (begin + offset for offset in tensors[name]["data_offsets"])
    return Place(tensors[name]["dtype"], tuple(tensors[name]["shape"]), start, stop)


def read_small(path: Path, name: str) -> np.ndarray:
    """A tensor of a file that safetensors has accepted, BF16 as fp32. Raises UserError for a dtype outside of KINDS."""
    place = place_of(path, name)
    kind = place.kind
    if kind not in KINDS:
        raise UserError(f"{path}: {name} is stored as {kind}; expected {', '.join(KINDS)}.")
    with path.open("rb") as file:
        file.seek(place.start)
        found = np.frombuffer(file.read(place.stop - place.start), KINDS[kind]).reshape(place.shape)
    return (found.astype("<u4") << 16).view("<f4") if kind == "BF16" else found
