"""Measures the limits of a machine: memory bandwidth, and the rate of a large matrix product."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mllama_graph.model.placement import Placement

# Larger than any cache. Allocated as weights are, since huge pages are read faster.
READ_BYTES = 1 << 29
REPETITIONS = 5


@dataclass(frozen=True)
class Limits:
    """Memory bandwidth, and operations per second of a large matrix product in fp32 (bf16 on an accelerator)."""

    bytes_per_second: float
    flops: float


def measure(device: torch.device, accelerator: bool, synchronize: Callable[[], None]) -> Limits:
    """Measure the limits as medians of a few repetitions, in about a second. `synchronize` waits for the device."""
    dtype = torch.bfloat16 if accelerator else torch.float32
    wide = Placement.at(device).allocate((READ_BYTES // 4,), torch.float32).fill_(1)
    # A CPU is timed reading; an accelerator is timed copying, which reads and writes.
    reads: list[Callable[[], object]] = [wide.clone] if accelerator else [wide.sum, lambda: torch.dot(wide, wide)]
    moved = READ_BYTES * (2 if accelerator else 1)
    m, k, n = (8192, 8192, 8192) if accelerator else (1024, 1536, 2048)
    a, b = torch.ones(m, k, device=device, dtype=dtype), torch.ones(k, n, device=device, dtype=dtype)
    best = min(_seconds(read, synchronize) for read in reads)
    return Limits(moved / best, 2 * m * k * n / _seconds(lambda: a @ b, synchronize))


def _seconds(work: Callable[[], object], synchronize: Callable[[], None]) -> float:
    times = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
