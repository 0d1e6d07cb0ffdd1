"""Worker processes: a ProcessPoolExecutor whose workers can be stopped at once, with the processes that they started."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, Optional

from mllama_graph.core.machine import CORES, block_sigint

# What this process does itself goes first.
NICENESS = 5
# A worker that has not ended this many seconds after it was told to is killed.
CLOSE_SECONDS = 5


class _Worker(SpawnProcess):
    """A spawned process that does not import the program's main module again: that may be a script without a guard."""

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    """Starts such processes."""

    Process = _Worker


class WorkerPool:
    """Processes of their own that run functions, at low priority and on all cores of the machine.

    They are spawned, not forked: what runs in them must be importable. `begin` is called once in each worker. A worker
    ends when this process does, however that happens, and takes the processes that it has started along.
    """

    def __init__(self, workers: int, begin: Optional[Callable[..., None]] = None, arguments: tuple[Any, ...] = ()):
        self._executor = ProcessPoolExecutor(workers, _Context(), _begin,
                                             (os.getpid(), CORES, begin, arguments))
        self._processes: set[BaseProcess] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Run a function in a worker. The future raises BrokenProcessPool where any worker of the pool died."""
        before = set(multiprocessing.active_children())
        with block_sigint():
            future = self._executor.submit(function, *arguments)
        self._processes |= set(multiprocessing.active_children()) - before
        return future

    def close(self) -> None:
        """End the workers at once, whatever they are doing."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(CLOSE_SECONDS)
            process.kill()


def _begin(parent: int, cores: list[int], begin: Optional[Callable[..., None]], arguments: tuple[Any, ...]) -> None:
    """Set up a worker, before its first function."""
    # A process group of its own, which ends as one with the C++ compilers that the worker starts.
    os.setpgrp()
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.nice(NICENESS)
    # The parent may be a rank that is bound to a few cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    logging.getLogger("torch").setLevel(logging.ERROR)
    if begin:
        begin(*arguments)


def _end(signum: int, frame: object) -> None:
    """End the process group. The exception, unlike an unhandled SIGTERM, removes temporary folders on the way."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    sys.exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
