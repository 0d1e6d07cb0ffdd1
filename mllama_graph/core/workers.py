"""Worker processes: a ProcessPoolExecutor in a separate process, which can be ended at once with all its children.

The separate process runs `python -m mllama_graph.core.workers FD`. It imports the modules that the workers need and
then forks the workers, so that each module is imported once. The caller's process is never forked, since it may have
threads and an open device. Its main module is not imported a second time.
"""

import contextlib
import importlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from mllama_graph.core.machine import CORES
from mllama_graph.core.paths import PACKAGE

# The caller's own work has priority over the workers.
NICENESS = 5
# Seconds from SIGTERM to SIGKILL: for the workers, which need them to remove temporary folders, and for the whole pool.
GRACE_SECONDS, CLOSE_SECONDS = 2, 5


@dataclass(frozen=True)
class _Setup:
    """Settings of a pool. imports: modules to import before forking. begin, arguments: each worker's first call."""

    workers: int
    cores: Sequence[int]
    imports: Sequence[str]
    begin: Callable[..., None] | None
    arguments: tuple[Any, ...]


class WorkerPool:
    """Processes that run functions at low priority, on all cores of the machine.

    Functions and arguments are pickled. `begin` is called with `arguments` once in each worker. `imports`: modules to
    import once for all workers, since they are slow to import. `variables`: added to the workers' environment. The
    workers end when this process does, however it ends.
    """

    def __init__(
        self,
        workers: int,
        begin: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
        imports: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ):
        ours, theirs = socket.socketpair()
        paths = filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(variables or {})}
        # It gets its own session, so that Ctrl-C does not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._futures: dict[int, Future[Any]] = {}
        self._lock, self._closed = threading.Lock(), False
        self._count = 0
        self._connection.send(_Setup(workers, CORES, tuple(imports), begin, arguments))
        threading.Thread(target=self._take_results, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Run a function in a worker. The future raises BrokenProcessPool if any worker of the pool died."""
        future: Future[Any] = Future()
        with self._lock:
            self._count += 1
            self._futures[self._count] = future
            try:
                self._connection.send((self._count, function, arguments))
            except OSError:
                del self._futures[self._count]
                future.set_exception(BrokenProcessPool("the worker processes are gone"))
        return future

    def close(self) -> None:
        """End the workers and their child processes without waiting for running functions."""
        self._closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _take_results(self) -> None:
        """Body of a thread: sets the results of futures until the worker processes have ended."""
        try:
            while True:
                number, result, error = self._connection.recv()
                future = self._futures.pop(number)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            with self._lock:
                left, self._futures = self._futures, {}
        for future in left.values():
            if not self._closed:
                future.set_exception(BrokenProcessPool("the worker processes are gone"))


def _serve(descriptor: int) -> None:
    """Take functions from the caller and run them in forked workers, until the caller is gone or SIGTERM arrives."""
    connection = Connection(descriptor)
    setup: _Setup = connection.recv()
    os.nice(NICENESS)
    # If the caller is a rank that is pinned to a few cores, this process has inherited that.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, setup.cores)
    for name in setup.imports:
        importlib.import_module(name)
    logging.getLogger("torch").setLevel(logging.ERROR)
    executor = ProcessPoolExecutor(setup.workers, get_context("fork"), _begin, (setup.begin, setup.arguments))
    lock = threading.Lock()

    def answer(number: int, future: "Future[Any]") -> None:
        error = future.exception()
        with lock, contextlib.suppress(OSError):
            connection.send_bytes(_pickled(number, None if error else future.result(), error))

    signal.signal(signal.SIGTERM, _raise_exit)
    with contextlib.suppress(EOFError, OSError, SystemExit):
        while True:
            number, function, arguments = connection.recv()
            try:
                executor.submit(_call, function, arguments).add_done_callback(partial(answer, number))
            except BrokenProcessPool as error:
                with lock:
                    connection.send((number, None, error))
    _end_group()


def _raise_exit(signum: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_group() -> None:
    """End the workers, their children and this process: first SIGTERM, so that they can clean up, then SIGKILL."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < until:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
    os.killpg(0, signal.SIGKILL)


def _pickled(number: int, result: Any, error: BaseException | None) -> bytes:
    """Pickle a message for the caller. An error that can't be pickled is replaced by a RuntimeError with its text."""
    try:
        return pickle.dumps((number, result, error))
    except Exception:
        return pickle.dumps((number, None, RuntimeError(f"{type(error).__name__}: {error}")))


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Initialise a worker."""
    signal.signal(signal.SIGTERM, _exit)
    if begin:
        begin(*arguments)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run a function in a worker. SIGTERM raises SystemExit inside it, so that it removes its temporary folders."""
    try:
        signal.signal(signal.SIGTERM, _raise_exit)
        return function(*arguments)
    except SystemExit:
        os._exit(1)
    finally:
        signal.signal(signal.SIGTERM, _exit)


def _exit(signum: int, frame: object) -> None:
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
