"""The limits of a machine, measured beside the engine: the rates of reading memory and of a large matrix product."""

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
    """Bytes read per second, and operations per second of a large product, in fp32 (in bf16 on an accelerator)."""

    bytes_per_second: float
    flops: float


def measure(device: torch.device, accelerator: bool, synchronize: Callable[[], None]) -> Limits:
    """Medians of a few repetitions, about a second in all. `synchronize` waits for the device."""
    dtype = torch.bfloat16 if accelerator else torch.float32
    wide = torch.ones(READ_BYTES // 4, device=device)
    # A CPU is limited by what it reads; an accelerator's copy reads and writes.
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
