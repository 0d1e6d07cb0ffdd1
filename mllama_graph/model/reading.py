"""Reads regions of stored tensors. Files are mapped into memory for one read at a time, which releases their pages."""

import math
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mllama_graph.model.pth import PthFile
from mllama_graph.model.small import place_of

# Approximate bytes of a file mapped into memory at once: the memory that loading needs besides the weights.
BLOCK_BYTES = 64 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}

Region = tuple[slice, ...]


def block_rows(part: Tensor, size: int = BLOCK_BYTES) -> int:
    """Rows of a tensor per block of `size` bytes."""
    return max(1, size // (math.prod(part.shape[1:]) * part.element_size()))


def read_safetensors(path: Path, name: str, region: Region | None = None) -> Tensor:
    """A region of a tensor of a safetensors file, or the whole, mapped from it: pages are read when they are used."""
    place = place_of(path, name)
    if place.start == place.stop:
        return torch.empty(place.shape, dtype=DTYPES[place.kind])
    first = place.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Private, since torch takes only memory that may be written. Unmapped as soon as no tensor uses it.
        mapped = mmap.mmap(file.fileno(), place.stop - first, access=mmap.ACCESS_COPY, offset=first)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=place.start - first).view(DTYPES[place.kind])
    value = flat.view(place.shape)
    return value[region] if region is not None and place.shape else value


def read_pth(file: PthFile, name: str) -> Tensor:
    """A tensor of a .pth file, mapped from it: only what is copied from the tensor is read."""
    stored = file.tensors[name]
    raw: np.ndarray = file.storage(stored)
    flat = torch.from_numpy(raw).view(DTYPES[stored.kind])
    return flat.as_strided(stored.shape, stored.stride)
