"""Selection of the graph that runs a step, once for all ranks, among those loaded, stored or being compiled."""

import math
import time
from collections.abc import Callable

from mllama_graph.core.errors import UserError
from mllama_graph.graphs.compiler import GraphCompiler, Record
from mllama_graph.graphs.key import key
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.store import GraphStore, bytes_of
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import choose


class Graphs:
    """Selects the bucket of each step and has its graph compiled at most once.

    `mode` decides what happens if a graph is missing. background: while it compiles, its steps run in a larger graph
    that exists, else uncompiled: the same functions and results, but slower. wait: the step waits. never: an error.
    `compile` tells hosts with stores of their own that a graph will be needed; `load` has every rank load a graph and
    returns when all have.
    """

    def __init__(
        self,
        spec: GraphSpec,
        store: GraphStore,
        plan: list[Bucket],
        cost: Callable[[Bucket], float],
        reuse: float,
        mode: str,
        say: Callable[[str], None],
        compile: Callable[[Bucket], None],
        load: Callable[[Bucket], None],
    ):
        self.spec, self.store, self.cost, self.reuse, self.mode, self.say = spec, store, cost, reuse, mode, say
        self.compiler = GraphCompiler(spec, store, say)
        self._compile_elsewhere, self._load_everywhere = compile, load
        self._ready: set[Bucket] = set()
        self._stored: set[Bucket] = set()
        self._failed: set[Bucket] = set()
        # The loaded graph of each need, until the set of graphs changes: choosing takes as long as a small decode step.
        self._settled: dict[Bucket, Bucket] = {}
        if self.spec.compiles:
            self._stored = {bucket for bucket in plan if store.has(key(spec, bucket))}
            if store.warning:
                say(store.warning)

    @property
    def compiled_by_ranks(self) -> bool:
        """Whether each rank compiles its own graphs when it loads them, instead of worker processes ahead of time."""
        return self.spec.backend == "torchair"

    @property
    def records(self) -> list[Record]:
        """The outcome for each graph so far."""
        return self.compiler.records

    @property
    def failed(self) -> list[str]:
        """The graphs that could not be compiled."""
        return sorted(map(str, self._failed))

    def prefetch(self, need: Bucket) -> None:
        """Have worker processes compile a graph that holds `need`, before the first step that needs it."""
        if self.spec.compiles and not self.compiled_by_ranks:
            self._choose(need)

    def load_stored(self) -> None:
        """Have every rank load all stored graphs of the plan now, rather than at their first step."""
        for bucket in sorted(self._stored, key=str):
            self._load(bucket)

    def select(self, need: Bucket) -> tuple[Bucket, bool]:
        """The bucket that runs a step of size `need`, and whether its graph is compiled and loaded.

        Raises UserError if graphs must not be compiled and no stored one holds the step.
        """
        if not self.spec.compiles:
            return need, False
        if not self.compiler.pending and (settled := self._settled.get(need)):
            return settled, True
        if self.compiled_by_ranks:
            self._settled[need] = self._select_from_ranks(need)
            return self._settled[need], True
        self._collect()
        best = self._choose(need)
        while self.mode == "wait" and best in self.compiler.requested:
            self._collect(timeout=1.0)
        larger = choose(need, {*self._ready, *self._stored}, self.cost, math.inf)
        for bucket in (best, larger):
            if bucket in self._ready or self._load(bucket):
                if bucket == best:
                    self._settled[need] = bucket
                return bucket, True
        return need, False

    def drain(self, progress: Callable[[int, int], None]) -> None:
        """Wait until no graph is being compiled; `progress` is called with (graphs done, all graphs)."""
        total = self.compiler.pending
        while self.compiler.pending:
            progress(total - self.compiler.pending, total)
            self._collect(timeout=0.5)
        progress(total, total)

    def load_exactly(self, bucket: Bucket) -> None:
        """Have every rank load or compile its own graph of this bucket. Raises UserError if it may not be compiled."""
        if bucket in self._ready:
            return
        stored = bucket in self._stored and self.compiler.stored(bucket) is not None
        if not stored:
            if self.mode == "never":
                raise UserError(
                    f"{bucket} is missing or damaged in the graph store, and plan.compile=never. Run task=warmup first."
                )
            self.say(f"compiling {bucket}")
        start, name = time.perf_counter(), key(self.spec, bucket)
        self._load_everywhere(bucket)
        self._ready.add(bucket)
        self._settled.clear()
        path, _ = self.store.find(name)
        self.records.append(
            Record(
                bucket.phase,
                str(bucket),
                "hit" if stored else "compiled",
                round(time.perf_counter() - start, 4),
                bytes_of(path) if path else 0,
                name,
            )
        )

    def _select_from_ranks(self, need: Bucket) -> Bucket:
        """The best bucket for `need`, after every rank has loaded or compiled its graph; the step waits."""
        best = self._best(need, {*self._ready, *self._stored})
        self.load_exactly(best)
        return best

    def _best(self, need: Bucket, known: set[Bucket]) -> Bucket:
        """The best known bucket for `need`, or the exact one. Raises UserError if no new graph may be compiled."""
        best = choose(need, known, self.cost, math.inf if self.mode == "never" else self.reuse)
        if best not in known and self.mode == "never":
            raise UserError(f"{best} is not in the graph store, and plan.compile=never. Run task=warmup first.")
        return best

    def _choose(self, need: Bucket) -> Bucket:
        """The best bucket for `need`; its compilation is started if its graph does not exist."""
        known = {*self._ready, *self._stored, *self.compiler.requested, *self._failed}
        best = self._best(need, known)
        if best in known:
            return best
        if not self.compiler.compile(best):
            self._failed.add(best)
            return best
        background = (
            " in the background; until it is ready, its steps run uncompiled" if self.mode == "background" else ""
        )
        self.say(f"compiling {best}{background}")
        self._compile_elsewhere(best)
        return best

    def _collect(self, timeout: float = 0.0) -> None:
        """Record the graphs whose compilation has ended."""
        for bucket, error in self.compiler.collect(timeout):
            (self._failed if error else self._stored).add(bucket)
            self._settled.clear()

    def _load(self, bucket: Bucket) -> bool:
        """Load a stored graph; a damaged entry is reported and compiled again."""
        if bucket not in self._stored:
            return False
        start, name = time.perf_counter(), key(self.spec, bucket)
        self._stored.discard(bucket)
        path = self.compiler.stored(bucket)
        if path is None:
            if self.mode == "never":
                raise UserError(f"graph {name} ({bucket}) is damaged, and plan.compile=never. Run task=warmup first.")
            self.compiler.compile(bucket)
            while self.mode == "wait" and bucket in self.compiler.requested:
                self._collect(timeout=1.0)
            return self._load(bucket)
        self._load_everywhere(bucket)
        self._ready.add(bucket)
        if not any(record.key == name for record in self.records):
            seconds = round(time.perf_counter() - start, 4)
            self.records.append(Record(bucket.phase, str(bucket), "hit", seconds, path.stat().st_size, name))
        return True
