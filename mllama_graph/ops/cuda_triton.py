"""Triton where it is installed: without it, kernels and operations stay plain functions that are never called."""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.library import triton_op

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU wheels come without it
    # The kernels' signatures name tl.constexpr.
    triton, tl = None, SimpleNamespace(constexpr=None)

# Minimum side of a tensor-core tile in tl.dot.
DOT = 16


def jit(kernel: Callable[..., None]) -> Any:
    """Decorator of kernels."""
    return kernel if triton is None else triton.jit(kernel)


def operation(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of functions that launch kernels: `triton_op` keeps them in exported graphs and in packages."""
    return launch if triton is None else triton_op(f"mllama_graph::{launch.__name__}", mutates_args=())(launch)


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is not below `least`."""
    return 1 << (least - 1).bit_length()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of a CUDA device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count
