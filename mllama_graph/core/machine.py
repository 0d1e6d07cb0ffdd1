"""Properties of the host: cores, memory and processor; and this process's age. Imports no torch."""

import contextlib
import hashlib
import os
import platform
import signal
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

# The cores that this process may run on, read before a rank is pinned to some of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def block_sigint() -> Iterator[None]:
    """Start child processes with SIGINT blocked: Ctrl-C reaches the whole process group, and their parent handles it.

    Children inherit the blocked mask. Ignoring the signal instead would lose a Ctrl-C in a multithreaded process: any
    thread may receive an ignored signal and drop it, while a blocked one is delivered to another thread or stays
    pending (signal(7)).
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def raise_interrupt(signum: int, frame: object) -> None:
    """Signal handler that ends a task in the same way as Ctrl-C."""
    raise KeyboardInterrupt


def available_memory() -> tuple[int, str]:
    """Available memory in bytes, and the source of the figure."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024, "MemAvailable"
    except (OSError, KeyError):
        return physical_memory(), "physical memory"


def physical_memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@lru_cache
def processor_name(capability: str) -> str:
    """Model name of the CPU, a hash of its instruction-set flags, and `capability`, the vector width that torch uses.

    `capability` is torch.backends.cpu.get_cpu_capability(). Code compiled for one processor may not run on another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        flags = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:8]
        name = f"{fields.get('model name', platform.machine())} flags {flags}"
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name} {capability}"


def identity() -> str:
    """What tells this host from others: processes with the same one share 127.0.0.1 and /dev/shm."""
    found = []
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    for path in ("/proc/self/ns/net", "/dev/shm"):
        with contextlib.suppress(OSError):
            about = os.stat(path)
            found.append(f"{about.st_dev}:{about.st_ino}")
    return " ".join(found) or platform.node()


def process_age() -> float | None:
    """Seconds since this process started, imports included; None if /proc does not provide it."""
    try:
        # Field 22 of proc(5), start time in ticks since boot; counted from the last ")", as the name may hold anything.
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return None
