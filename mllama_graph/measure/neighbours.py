"""Other processes on this host: some that keep cores busy on purpose, and how much of the cores others take."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Cores that others may take before a session says that the machine was not quiet: above a desktop's background.
NOTABLE_CORES = 0.15
# Seconds that a process has to reach its loop.
STARTED = 0.3
LOOP = "while True: pass"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes that each take a core, without reading memory, until the context ends."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", LOOP]) for _ in range(count)]
    try:
        if processes:
            time.sleep(STARTED)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Others:
    """Counts the cores that other processes take. Hosts without Linux's /proc count none."""

    def __init__(self) -> None:
        self._start = _seconds()

    def cores(self) -> float:
        """The cores that processes other than this one and its descendants took on average since the last call."""
        before, self._start = self._start, _seconds()
        elapsed, everyone, own = (new - old for new, old in zip(self._start, before))
        return max(0.0, (everyone - own) / elapsed) if elapsed > 0 else 0.0


def _seconds() -> tuple[float, float, float]:
    """Seconds by the clock, and of all cores by all processes (a virtual machine's stolen time included) and by own."""
    try:
        tick = os.sysconf("SC_CLK_TCK")
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
        busy_ticks = sum(fields[:3]) + sum(fields[5:8])
        return time.monotonic(), busy_ticks / tick, _own_ticks() / tick
    except (OSError, ValueError, IndexError):
        return time.monotonic(), 0.0, 0.0


def _own_ticks() -> int:
    """Ticks of this process and its descendants, those that have ended included."""
    parents, ticks = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # From the last ")" on, as the name may hold anything: state, ppid, ..., utime, stime, cutime, cstime.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    own = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= grown
    return sum(ticks.get(pid, 0) for pid in own)
