"""What a machine can do at the most, measured beside what the engine does: reading memory, and a matrix product."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Larger than any cache.
READ_BYTES = 1 << 29
REPETITIONS = 5


@dataclass(frozen=True)
class Limits:
    """Bytes a second that can be read, and fp32 (on an accelerator bf16) operations a second of a large product."""

    bytes_per_second: float
    flops: float


def measure(device: torch.device) -> Limits:
    """Medians of a few repetitions, about a second in all."""
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    wide = torch.ones(READ_BYTES // 4, device=device)
    # A CPU is limited by what it reads; an accelerator's copy reads and writes.
    reads = [lambda: wide.sum(), lambda: torch.dot(wide, wide)] if on_cpu else [lambda: wide.clone()]
    moved = READ_BYTES * (1 if on_cpu else 2)
    m, k, n = (1024, 1536, 2048) if on_cpu else (8192, 8192, 8192)
    a, b = torch.ones(m, k, device=device, dtype=dtype), torch.ones(k, n, device=device, dtype=dtype)
    best = min(_seconds(read, device) for read in reads)
    return Limits(moved / best, 2 * m * k * n / _seconds(lambda: a @ b, device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
