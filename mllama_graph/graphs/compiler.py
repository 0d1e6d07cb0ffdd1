"""Compiling graphs into the store beside the run, in worker processes.

Workers keep the compiler out of the run: neither its imports nor its hold on the interpreter delay the steps being served.
They hold no weights.
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

# Compiling one graph takes up to about 1 GB with its C++ compiler.
MOST_WORKERS = 4
# Imports the compiler, and is imported by workers alone.
BUILD = "mllama_graph.graphs.build"


@dataclass(frozen=True)
class Record:
    """What became of one graph, for result.json. `source` is hit, compiled or traced."""

    phase: str
    bucket: str
    source: str
    seconds: float
    bytes: int
    key: str


def compile_into(folder: Path, spec: GraphSpec, bucket: Bucket, expected: str) -> float:
    """Put a bucket's graph into the store at `folder`; the seconds of compiling, 0 if another process has done it.

    Raises RuntimeError where `expected`, the key that the run computed, is not the key that this process computes.
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
    """Compiles buckets of one spec into the store, in the background. `say` gets lines that a person should see."""

    def __init__(self, spec: GraphSpec, store: GraphStore, say: Callable[[str], None]):
        self.spec, self.store, self.say = spec, store, say
        self.records: list[Record] = []
        self._pool: WorkerPool | None = None
        self._jobs: dict[Future[float], Bucket] = {}
        # Buckets whose worker may have died of them once; they are tried a second time.
        self._suspects: set[Bucket] = set()
        self._told_why = False

    @property
    def requested(self) -> set[Bucket]:
        """Buckets that are being compiled, or wait for a worker."""
        return set(self._jobs.values())

    @property
    def pending(self) -> int:
        """Number of graphs that are not compiled yet."""
        return len(self._jobs)

    def stored(self, bucket: Bucket) -> Path | None:
        """The bucket's graph where the store holds it whole; an altered entry is reported."""
        name = key(self.spec, bucket)
        path, fault = self.store.find(name)
        if fault:
            self.say(f"graph {name} ({bucket}): {fault}; compiling it again")
        return path

    def compile(self, bucket: Bucket) -> bool:
        """Have a bucket compiled, unless it is already. False where there is no C++ compiler, which is reported once."""
        if self.spec.device == "cpu" and (missing := native.missing_compiler()):
            if not self._told_why:
                self.say(
                    f"{missing} Steps whose graph is not in the store run uncompiled, with torch's kernels where ours are not "
                    "built: slower."
                )
            self._told_why = True
            return False
        if bucket not in self.requested:
            self._submit(bucket)
        return True

    def collect(self, timeout: float = 0.0) -> list[tuple[Bucket, str | None]]:
        """(bucket, error or None) of graphs that ended since; waits up to `timeout` seconds for the first of them."""
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
        """Stop compiling. Entries are written whole, so that none is left half done."""
        if self._pool:
            self._pool.close()

    def _submit(self, bucket: Bucket) -> None:
        if self._pool is None:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.store.written / "inductor")}
            self._pool = WorkerPool(min(os.cpu_count() or 1, MOST_WORKERS), imports=[BUILD], variables=cache)
        future = self._pool.submit(compile_into, self.store.written, self.spec, bucket, key(self.spec, bucket))
        self._jobs[future] = bucket

    def _take(self, bucket: Bucket, future: "Future[float]") -> str | None:
        """Record a job's end; its error or None."""
        if error := future.exception():
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            self.say(f"{bucket} could not be compiled: {text}")
            return text
        seconds, name = future.result(), key(self.spec, bucket)
        # 0 seconds: another process that needed the same graph was first.
        source = "compiled" if seconds else "hit"
        size = bytes_of(self.store.written / name / PACKAGE)
        self.records.append(Record(bucket.phase, str(bucket), source, round(seconds, 3), size, name))
        self.say(f"compiled {bucket} in {seconds:.1f} s" if seconds else f"{bucket} was compiled by another process")
        return None

    def _retry(self, broken: list[Bucket]) -> list[tuple[Bucket, str | None]]:
        """After a worker died, which ends its whole pool: compile the others' buckets in a new pool.

        Which bucket killed it is not known, so each is tried twice.
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
