"""Reads small tensors of safetensors files whole, without torch: scales, zero points and permutations."""

import json
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


@lru_cache(maxsize=64)
def _header(path: Path, changed: int) -> tuple[int, dict[str, Any]]:
    """The offset of a file's data, and its tensors by name. changed: when the file was, so that it is read again."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def read_small(path: Path, name: str) -> np.ndarray:
    """A tensor of a file that safetensors has accepted, BF16 as fp32. Raises UserError for a dtype outside of KINDS."""
    begin, tensors = _header(path, path.stat().st_mtime_ns)
    stored = tensors[name]
    kind, (start, stop) = stored["dtype"], stored["data_offsets"]
    if kind not in KINDS:
        raise UserError(f"{path}: {name} is stored as {kind}; expected {', '.join(KINDS)}.")
    with path.open("rb") as file:
        file.seek(begin + start)
        found = np.frombuffer(file.read(stop - start), KINDS[kind]).reshape(stored["shape"])
    return (found.astype("<u4") << 16).view("<f4") if kind == "BF16" else found
