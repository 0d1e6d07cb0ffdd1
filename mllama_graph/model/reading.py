"""Reads regions of stored tensors. Files are mapped into memory for one read at a time, which releases their pages."""

import math
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mllama_graph.model.pth import PthFile

# Approximate bytes of a file mapped into memory at once: the memory that loading needs besides the weights.
BLOCK_BYTES = 64 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Region = tuple[slice, ...]


def block_rows(part: Tensor) -> int:
    """Rows of a tensor per block of BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (math.prod(part.shape[1:]) * part.element_size()))


def read_safetensors(path: Path, name: str, region: Region | None = None) -> Tensor:
    """A region of a tensor of a safetensors file, or the whole."""
    with safe_open(path, framework="pt") as file:
        lazy = file.get_slice(name)
        value: Tensor = lazy[region] if region is not None and lazy.get_shape() else lazy[...]
        return value


def read_pth(file: PthFile, name: str) -> Tensor:
    """A tensor of a .pth file, mapped from it: only what is copied from the tensor is read."""
    stored = file.tensors[name]
    raw: np.ndarray = file.storage(stored)
    flat = torch.from_numpy(raw).view(DTYPES[stored.kind])
    return flat.as_strided(stored.shape, stored.stride)
