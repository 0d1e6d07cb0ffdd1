"""Which graph runs a step: loaded from the store, compiled in the background, or none yet."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from mllama_graph import native
from mllama_graph.plan.buckets import Bucket, choose
from mllama_graph.graphs.workers import Compiler
from mllama_graph.core.config import UserError
from mllama_graph.graphs.cuda_graphs import CapturedStep, Cuda
from mllama_graph.graphs.aot import WEIGHT_PREFIX, GraphSpec, Step, arguments, compile_into, npu_graph, package
from mllama_graph.model.tree import Node, Pages
from mllama_graph.model.ops import Ops
from mllama_graph.graphs.store import PACKAGE, TORCHAIR, GraphStore, bytes_of


@dataclass(frozen=True)
class Record:
    """What became of one graph, for result.json. `source` is hit or compiled."""

    phase: str
    bucket: str
    source: str
    seconds: float
    bytes: int
    key: str


class GraphCompiler:
    """Compiles buckets of one spec into the store, in the background. `say` gets a line for what a person should know."""

    def __init__(self, spec: GraphSpec, store: GraphStore, say: Callable[[str], None]):
        self.spec, self.store, self.say = spec, store, say
        self.records: list[Record] = []
        self.asked: set[Bucket] = set()
        self._workers: Optional[Compiler] = None
        self._lacking = False

    @property
    def pending(self) -> int:
        """Graphs still compiling."""
        return len(self.asked)

    def stored(self, bucket: Bucket) -> Optional[Path]:
        """The bucket's graph where the store holds it whole; one that is altered is reported."""
        path, fault = self.store.find(key := self.spec.key(bucket))
        if fault:
            self.say(f"graph {key} ({bucket}): {fault}; compiling it again")
        return path

    def ask(self, bucket: Bucket) -> bool:
        """Have a bucket compiled, unless it is on its way. False where there is nothing to compile it with, said once."""
        if self.spec.device == "cpu" and (lacking := native.lack()):
            if not self._lacking:
                self.say(f"{lacking} Steps whose graph is not in the store run uncompiled, with torch's kernels where ours are not built: slower.")
            self._lacking = True
            return False
        if bucket not in self.asked:
            self._workers = self._workers or Compiler(compile_into, self.store.written)
            self.asked.add(bucket)
            self._workers.submit(self.spec, bucket, self.spec.key(bucket))
        return True

    def collect(self, timeout: float = 0.0) -> list[tuple[Bucket, Optional[str]]]:
        """(bucket, error or None) of what ended since; waits up to `timeout` seconds for the first."""
        done = self._workers.finished(timeout) if self._workers and self.asked else []
        for bucket, seconds, error in done:
            self.asked.discard(bucket)
            if error:
                self.say(f"{bucket} could not be compiled: {error}")
                continue
            key = self.spec.key(bucket)
            size = bytes_of(self.store.written / key / PACKAGE)
            # Another process that needed the same graph may have been first.
            source = "compiled" if seconds else "hit"
            self.records.append(Record(bucket.phase, str(bucket), source, round(seconds, 3), size, key))
            self.say(f"compiled {bucket} in {seconds:.1f} s" if seconds else f"{bucket} was compiled by another process")
        return [(bucket, error) for bucket, _, error in done]

    def close(self) -> None:
        """Stop compiling."""
        if self._workers:
            self._workers.close()


class Loaded:
    """What one rank can run: the graphs it has loaded, and the same functions uncompiled."""

    def __init__(self, spec: GraphSpec, weights: Node, pages: tuple[Pages, Pages], ops: Ops, store: GraphStore,
                 say: Callable[[str], None]):
        self.spec, self.store = spec, store
        self._compiler = GraphCompiler(spec, store, say)
        self._uncompiled = {phase: Step(phase, weights, spec.shape, ops) for phase in ("vision", "prefill", "decode")}
        self._pages, self._say = pages, say
        self._cuda = Cuda(spec.torch_device) if spec.device == "cuda" else None
        self._weights = {f"{WEIGHT_PREFIX}{name}": value for name, value in weights.state_dict().items()}
        self._ready: dict[Bucket, Callable] = {}

    def compile(self, bucket: Bucket) -> None:
        """Have a graph on its way on a host that has a store of its own."""
        if self._compiler.stored(bucket) is None:
            self._compiler.ask(bucket)

    # As steps are executed: capturing runs the graph.
    @torch.inference_mode()
    def load(self, bucket: Bucket) -> None:
        """Load a stored graph. A host whose store lacks it compiles it, the run waiting.

        Raises RuntimeError where it can't be compiled.
        """
        path = self._compiler.stored(bucket)
        if path is None and not self._compiler.ask(bucket):
            raise RuntimeError(f"{bucket} could not be compiled: there is no C++ compiler on this host")
        while bucket in self._compiler.asked:
            for done, error in self._compiler.collect(timeout=1.0):
                if error:
                    raise RuntimeError(f"{done} could not be compiled: {error}")
        path = path or self._compiler.stored(bucket)
        run = package(path, self._weights, self.spec, self.store.libraries)
        if self._cuda and bucket.phase == "decode":
            example = arguments(bucket, self.spec.example(bucket), *self._pages)
            run = CapturedStep(run, example, self._cuda, self._say)
        self._ready[bucket] = run

    def graph(self, bucket: Bucket, compiled: bool) -> Callable:
        """What runs a step of a bucket."""
        return self._ready[bucket] if compiled else self._uncompiled[bucket.phase]


class LoadedNpu:
    """The same for a rank on an NPU: it compiles what the store lacks when it loads it. Nothing runs uncompiled."""

    def __init__(self, spec: GraphSpec, weights: Node, pages: tuple[Pages, Pages], ops: Ops, store: GraphStore,
                 say: Callable[[str], None]):
        from mllama_graph.ops.npu import npu_ops

        self.spec, self.store, self._weights, self._pages = spec, store, weights, pages
        self._ops, self._say = npu_ops(spec.world_size, dict(spec.options)["mode"]), say
        self._ready: dict[Bucket, Callable] = {}

    # As steps are executed: a graph is compiled for the mode in which it is called.
    @torch.inference_mode()
    def load(self, bucket: Bucket) -> None:
        """Load this rank's graph, or compile it into the store. What can't be lowered raises."""
        key = self.spec.key(bucket)
        with self.store.lock(key):
            path, fault = self.store.find(key)
            if fault:
                self._say(f"graph {key} ({bucket}): {fault}; compiling it again")
            if path is None:
                with self.store.workspace() as workspace:
                    self._ready[bucket] = self._graph(bucket, workspace / TORCHAIR, stored=False)
                    self.store.add(key, self.spec.key_fields(bucket), workspace / TORCHAIR)
            else:
                self._ready[bucket] = self._graph(bucket, path, stored=True)

    def graph(self, bucket: Bucket, compiled: bool) -> Callable:
        """What runs a step of a bucket."""
        assert compiled
        return self._ready[bucket]

    def _graph(self, bucket: Bucket, folder: Path, stored: bool) -> Callable:
        return npu_graph(self.spec, bucket, self._weights, self._pages, self._ops, folder, stored)


class Graphs:
    """Which graph runs a step, decided once for all ranks; each is compiled at most once.

    What a missing graph means is `mode`. background: while it compiles, its steps run through a larger graph that
    exists, else uncompiled: the same functions, the same results, slower. wait: they wait. never: an error.
    `compile` tells hosts with stores of their own that a graph will be wanted; `load` has every rank load it, and
    returns when all have.
    """

    def __init__(self, spec: GraphSpec, store: GraphStore, plan: list[Bucket], cost: Callable[[Bucket], float],
                 reuse: float, mode: str, say: Callable[[str], None], compile: Callable[[Bucket], None],
                 load: Callable[[Bucket], None]):
        self.spec, self.store, self.cost, self.reuse, self.mode, self.say = spec, store, cost, reuse, mode, say
        self.compiler = GraphCompiler(spec, store, say)
        self._compile_elsewhere, self._load_everywhere = compile, load
        self._ready: set[Bucket] = set()
        self._stored: set[Bucket] = set()
        self._failed: set[Bucket] = set()
        if self.compiles:
            self._stored = {bucket for bucket in plan if store.has(spec.key(bucket))}
            if store.warning:
                say(store.warning)

    @property
    def compiles(self) -> bool:
        """Whether this backend compiles at all."""
        return self.spec.backend != "eager"

    @property
    def compiled_by_ranks(self) -> bool:
        """Whether the ranks compile their own graphs, when they load them, instead of worker processes ahead of them."""
        return self.spec.backend == "torchair"

    @property
    def records(self) -> list[Record]:
        """What became of each graph so far."""
        return self.compiler.records

    @property
    def failed(self) -> list[str]:
        """The graphs that could not be compiled."""
        return sorted(map(str, self._failed))

    def want(self, need: Bucket) -> None:
        """Have a graph on its way that holds `need`, ahead of the first step that asks for it."""
        if self.compiled_by_ranks:
            self._serve_from_ranks(need)
        elif self.compiles:
            self._choose(need)

    def serve(self, need: Bucket) -> tuple[Bucket, bool]:
        """The bucket that runs a step needing `need`, and whether its graph is compiled and loaded.

        Raises UserError where graphs must not be compiled and none holds the step.
        """
        if not self.compiles:
            return need, False
        if self.compiled_by_ranks:
            return self._serve_from_ranks(need), True
        self._collect()
        best = self._choose(need)
        while self.mode == "wait" and best in self.compiler.asked:
            self._collect(timeout=1.0)
        larger = choose(need, {*self._ready, *self._stored}, self.cost, math.inf)
        for bucket in (best, larger):
            if bucket in self._ready or self._load(bucket):
                return bucket, True
        return need, False

    def drain(self, progress: Callable[[int, int], None]) -> None:
        """Wait until nothing compiles any more; `progress` gets how many of how many graphs are done."""
        total = self.compiler.pending
        while self.compiler.pending:
            progress(total - self.compiler.pending, total)
            self._collect(timeout=0.5)
        progress(total, total)

    def _serve_from_ranks(self, need: Bucket) -> Bucket:
        """The bucket that suits a need best, loaded by every rank, or compiled by it: the step waits."""
        best = self._best(need, {*self._ready, *self._stored})
        self.load_exactly(best)
        return best

    def load_exactly(self, bucket: Bucket) -> None:
        """Have every rank load its own graph of this bucket, or compile it. Raises UserError where it may not."""
        if bucket in self._ready:
            return
        stored = bucket in self._stored and self.compiler.stored(bucket) is not None
        if not stored:
            if self.mode == "never":
                raise UserError(f"{bucket} is not sound in the graph store, and plan.compile=never. Run task=warmup first.")
            self.say(f"compiling {bucket}")
        start, key = time.perf_counter(), self.spec.key(bucket)
        self._load_everywhere(bucket)
        self._ready.add(bucket)
        path, _ = self.store.find(key)
        self.records.append(Record(bucket.phase, str(bucket), "hit" if stored else "compiled",
                                   round(time.perf_counter() - start, 4), bytes_of(path) if path else 0, key))

    def _best(self, need: Bucket, known: set[Bucket]) -> Bucket:
        """The known graph that suits a need, or a new one for it. Raises UserError where none may be compiled."""
        best = choose(need, known, self.cost, math.inf if self.mode == "never" else self.reuse)
        if best not in known and self.mode == "never":
            raise UserError(f"{best} is not in the graph store, and plan.compile=never. Run task=warmup first.")
        return best

    def _choose(self, need: Bucket) -> Bucket:
        """The graph that suits a need best; asked for where there is none yet."""
        known = {*self._ready, *self._stored, *self.compiler.asked, *self._failed}
        best = self._best(need, known)
        if best in known:
            return best
        if not self.compiler.ask(best):
            self._failed.add(best)
        else:
            self.say(f"compiling {best}" + (
                " in the background; its steps run uncompiled till then" if self.mode == "background" else ""))
            self._compile_elsewhere(best)
        return best

    def _collect(self, timeout: float = 0.0) -> None:
        """Take in what has been compiled since."""
        for bucket, error in self.compiler.collect(timeout):
            (self._failed if error else self._stored).add(bucket)

    def _load(self, bucket: Bucket) -> bool:
        """Load a stored graph; one that is altered is reported and compiled again."""
        if bucket not in self._stored:
            return False
        start, key = time.perf_counter(), self.spec.key(bucket)
        self._stored.discard(bucket)
        path = self.compiler.stored(bucket)
        if path is None:
            if self.mode == "never":
                raise UserError(f"graph {key} ({bucket}) is not sound, and plan.compile=never. Run task=warmup first.")
            self.compiler.ask(bucket)
            while self.mode == "wait" and bucket in self.compiler.asked:
                self._collect(timeout=1.0)
            return self._load(bucket)
        self._load_everywhere(bucket)
        self._ready.add(bucket)
        if not any(record.key == key for record in self.records):
            seconds = round(time.perf_counter() - start, 4)
            self.records.append(Record(bucket.phase, str(bucket), "hit", seconds, path.stat().st_size, key))
        return True
