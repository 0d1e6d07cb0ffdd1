"""Compiling beside the run: worker processes that fill the graph store, one bucket at a time each.

A process of its own keeps the compiler out of the run: neither its seconds of imports nor its hold on the interpreter
touch the steps being served. A worker holds no weights; it ends by itself when its parent is gone.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mllama_graph.core.place import CORES, deaf_children

# Compiling one graph takes up to about 1 GB with its C++ compiler.
MOST_WORKERS = 4
# Serving goes first.
NICENESS = 5

# An idle worker ends as soon as its connection is closed; one that doesn't is killed after this long.
CLOSE_SECONDS = 5

# (folder, spec, bucket, key) -> seconds
CompileInto = Callable[[Path, Any, Any, str], float]


def _work(connection: Connection, compile_into: CompileInto, folder: Path, cores: list[int], parent: int) -> None:
    """A worker: jobs in, (seconds, error) out, until the other end is closed or its process is gone."""
    # A group of its own, which ends as one with the C++ compilers that it starts.
    os.setpgrp()
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.nice(NICENESS)
    # A rank may be bound to a few cores; its workers are not.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    logging.getLogger("torch").setLevel(logging.ERROR)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            done = compile_into(folder, *job), None
        except Exception as error:
            done = 0.0, f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            connection.send(done)
        except OSError:
            return


def _end(signum: int, frame: object) -> None:
    """End the group. The exception, unlike a bare SIGTERM, clears the folder that a graph is built in."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    sys.exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


class Compiler:
    """Worker processes, started as jobs come, at most one a core."""

    def __init__(self, compile_into: CompileInto, folder: Path):
        self._compile_into, self._folder = compile_into, folder
        self._most = min(os.cpu_count() or 1, MOST_WORKERS)
        self._context = multiprocessing.get_context("spawn")
        self._queue: deque[tuple[Any, Any, str]] = deque()
        self._busy: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        self._processes: list[multiprocessing.Process] = []

    def submit(self, spec: Any, bucket: Any, key: str) -> None:
        """Compile a bucket as soon as a worker is free."""
        self._queue.append((spec, bucket, key))
        self._start()

    def finished(self, timeout: float) -> list[tuple[Any, float, str | None]]:
        """(bucket, seconds, error or None) of each job that ended; waits up to `timeout` seconds for the first."""
        done = []
        for connection in wait(list(self._busy), timeout):
            bucket = self._busy.pop(connection)
            try:
                seconds, error = connection.recv()
                self._idle.append(connection)
            except (EOFError, OSError):
                seconds, error = 0.0, "its compiler process died"
            done.append((bucket, seconds, error))
        self._start()
        return done

    def close(self) -> None:
        """End the workers, jobs or not. Entries are written whole, so that none is left half done."""
        for connection in self._idle:
            connection.close()
        for process in self._processes:
            if self._busy:
                process.terminate()
            process.join(CLOSE_SECONDS)
            process.kill()

    def _start(self) -> None:
        while self._queue and (self._idle or len(self._processes) < self._most):
            connection = self._idle.pop() if self._idle else self._spawn()
            job = self._queue.popleft()
            connection.send(job)
            self._busy[connection] = job[1]

    def _spawn(self) -> Connection:
        ours, theirs = self._context.Pipe()
        # A daemon ends with this process; the closed pipe ends it even where this one is killed.
        process = self._context.Process(target=_work, args=(theirs, self._compile_into, self._folder, CORES, os.getpid()), daemon=True)
        with deaf_children():
            process.start()
        theirs.close()
        self._processes.append(process)
        return ours
