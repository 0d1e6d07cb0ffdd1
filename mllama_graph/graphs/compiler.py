"""Compilation of graphs into the store by worker processes, concurrently with the run.

Workers keep the compiler out of the run's process: neither its imports nor its use of the GIL delay steps. They hold no
weights.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from mllama_graph import native
from mllama_graph.core.workers import WorkerPool
from mllama_graph.graphs import aot
from mllama_graph.graphs.key import key, key_fields
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.store import PACKAGE, GraphStore, bytes_of, key_of
from mllama_graph.plan.bucket import Bucket

# Compiling one graph takes up to about 1 GB, C++ compiler included.
MOST_WORKERS = 4
# Imports the compiler; only workers import it.
BUILD = "mllama_graph.graphs.build"


@dataclass(frozen=True)
class Record:
    """The outcome for one graph, for result.json. `source` is hit, compiled or traced."""

    phase: str
    bucket: str
    source: str
    seconds: float
    bytes: int
    key: str


def compile_into(folder: Path, spec: GraphSpec, bucket: Bucket, expected: str) -> float:
    """Compile a bucket's graph into the store at `folder`; returns the seconds, 0 if another process has done it.

    Raises RuntimeError if this process computes another key than `expected`, the key that the run computed.
    """
    store, fields = GraphStore(folder), key_fields(spec, bucket)
    aot.prepare_tracing(spec, folder)
    torch.use_deterministic_algorithms(spec.deterministic, warn_only=True)
    if key_of(fields) != expected:
        raise RuntimeError("the engine's source or its environment changed since the run began")
    with store.lock(expected):
        if store.find(expected)[0]:
            return 0.0
        start = time.perf_counter()
        with store.workspace() as workspace:
            aot.compile_package(spec, bucket, workspace / PACKAGE)
            store.add(expected, fields, workspace / PACKAGE)
        return time.perf_counter() - start


class GraphCompiler:
    """Compiles buckets of one spec into the store, in the background. `say` prints a line for the user."""

    def __init__(self, spec: GraphSpec, store: GraphStore, say: Callable[[str], None]):
        self.spec, self.store, self.say = spec, store, say
        self.records: list[Record] = []
        self._pool: WorkerPool | None = None
        self._jobs: dict[Future[float], Bucket] = {}
        # Buckets that were unfinished when a worker died; each is tried a second time.
        self._suspects: set[Bucket] = set()
        self._told_why = False

    @property
    def requested(self) -> set[Bucket]:
        """Buckets that are being compiled or wait for a worker."""
        return set(self._jobs.values())

    @property
    def pending(self) -> int:
        """Number of requested graphs that are not compiled yet."""
        return len(self._jobs)

    def stored(self, bucket: Bucket) -> Path | None:
        """Path of the bucket's graph, or None if the store lacks it; a damaged entry is reported."""
        name = key(self.spec, bucket)
        path, fault = self.store.find(name)
        if fault:
            self.say(f"graph {name} ({bucket}): {fault}; compiling it again")
        return path

    def compile(self, bucket: Bucket) -> bool:
        """Request a bucket's graph, at most once. Returns False if there is no C++ compiler, which is reported once."""
        if self.spec.device == "cpu" and (missing := native.missing_compiler()):
            if not self._told_why:
                self.say(
                    f"{missing} Steps whose graph is not in the store run uncompiled, with torch's kernels if the "
                    "native ones are not built, which is slower."
                )
            self._told_why = True
            return False
        if bucket not in self.requested:
            self._submit(bucket)
        return True

    def collect(self, timeout: float = 0.0) -> list[tuple[Bucket, str | None]]:
        """(bucket, error or None) of each graph that finished since; waits up to `timeout` seconds for the first."""
        done = wait(self._jobs, timeout, FIRST_COMPLETED).done if self._jobs else set()
        ended = [(self._jobs.pop(future), future) for future in done]
        results = [
            (bucket, self._take(bucket, future))
            for bucket, future in ended
            if not isinstance(future.exception(), BrokenProcessPool)
        ]
        if broken := [bucket for bucket, future in ended if isinstance(future.exception(), BrokenProcessPool)]:
            results += self._retry(broken)
        return results

    def close(self) -> None:
        """Stop compiling. Entries are written atomically, so that none is left incomplete."""
        if self._pool:
            self._pool.close()

    def _submit(self, bucket: Bucket) -> None:
        if self._pool is None:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.store.written / "inductor")}
            self._pool = WorkerPool(min(os.cpu_count() or 1, MOST_WORKERS), imports=[BUILD], variables=cache)
        future = self._pool.submit(compile_into, self.store.written, self.spec, bucket, key(self.spec, bucket))
        self._jobs[future] = bucket

    def _take(self, bucket: Bucket, future: "Future[float]") -> str | None:
        """Record a finished job; returns its error or None."""
        if error := future.exception():
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            self.say(f"{bucket} could not be compiled: {text}")
            return text
        seconds, name = future.result(), key(self.spec, bucket)
        # 0 seconds: another process compiled the same graph first.
        source = "compiled" if seconds else "hit"
        size = bytes_of(self.store.written / name / PACKAGE)
        self.records.append(Record(bucket.phase, str(bucket), source, round(seconds, 3), size, name))
        self.say(f"compiled {bucket} in {seconds:.1f} s" if seconds else f"{bucket} was compiled by another process")
        return None

    def _retry(self, broken: list[Bucket]) -> list[tuple[Bucket, str | None]]:
        """Compile unfinished buckets in a new pool, after a worker died and with it the whole pool.

        It is not known which bucket killed the worker, so each is tried twice.
        """
        broken += self._jobs.values()
        self._jobs = {}
        assert self._pool is not None
        self._pool.close()
        self._pool = None
        failed = [bucket for bucket in broken if bucket in self._suspects]
        self._suspects |= set(broken)
        for bucket in broken:
            if bucket not in failed:
                self._submit(bucket)
        for bucket in failed:
            self.say(f"{bucket} could not be compiled: its compiler process died")
        return [(bucket, "its compiler process died") for bucket in failed]
