"""Runs all ranks in lock-step: the driver, rank 0, decides each step and sends it to the worker ranks."""

import os
from collections import deque
from collections.abc import Callable, Sequence

from mllama_graph.core.errors import PeerGone
from mllama_graph.core.place import Place, Rendezvous, place_from
from mllama_graph.core.report import Progress
from mllama_graph.engine import batch
from mllama_graph.engine.device import backend_of
from mllama_graph.engine.hosts import differing_weights, digests
from mllama_graph.engine.messages import (
    AT_ONCE,
    LAUNCHED,
    LAUNCHED_FEEDING,
    Build,
    Compile,
    Driver,
    End,
    Execute,
    Finish,
    Load,
    Profile,
    Start,
    Workers,
    meet,
)
from mllama_graph.engine.rank import Launched, Rank
from mllama_graph.engine.steps import Step, Token
from mllama_graph.graphs.dispatch import Graphs
from mllama_graph.graphs.store import GraphStore
from mllama_graph.model.tree import Pixels
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cost import bucket_cost
from mllama_graph.plan.memory import require, require_on_host
from mllama_graph.plan.resolve import ResolvedRun


class Executor:
    """The driver's control of all ranks.

    `first`: the buckets that will be needed first; compiler processes compile those that are not stored while the ranks
    are built. `place` and `rendezvous` default to those in the environment. `check` raises if a worker rank has ended.
    Raises UserError before anything is allocated where memory does not suffice.
    """

    def __init__(
        self,
        run: ResolvedRun,
        pixels: Pixels,
        progress: Progress,
        first: Sequence[Bucket] = (),
        place: Place | None = None,
        rendezvous: Rendezvous | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.run, self.plan = run, run.plan
        self.place = place = place or place_from(os.environ) or Place()
        self._check_memory()
        if place.world > 1:
            rendezvous = rendezvous or Rendezvous.from_environment()
        store = meet(place, rendezvous) if rendezvous else None
        self._workers = Workers(place, rendezvous, store, run.timeout, check)
        if self._workers.elsewhere:
            self._workers.send(Start(run, pixels, digests(run.checkpoint)))
            self._workers.confirmed()
            self._workers.send(Build())
        else:
            self._workers.send(Start(run, pixels))
        graph_store = GraphStore(run.store_folder)
        self.graphs = Graphs(
            backend_of(run, place).spec(),
            graph_store,
            self.plan.buckets(),
            cost=lambda bucket: bucket_cost(run.shape, self.plan.page_size, bucket, run.storage),
            reuse=run.reuse,
            mode=run.compile_mode,
            say=progress.say,
            compile=lambda bucket: self._workers.send(Compile(bucket)),
            load=self._load,
        )
        for bucket in first:
            self.graphs.prefetch(bucket)
        self.rank = Rank(run, pixels, place, store, graph_store, progress)
        self._workers.confirmed()

    def execute(self, step: Step) -> list[Token]:
        """Run one step on all ranks. Returns the tokens of its `outputs`."""
        bucket, compiled = self.graphs.select(batch.needs(self.plan, step))
        self._workers.send(Execute(step, bucket, compiled))
        try:
            return self.rank.execute(step, bucket, compiled)
        except PeerGone as error:
            raise self._named(error) from error

    def launch(self, step: Step, feeds: bool) -> Launched:
        """Begin a step on all ranks, whose tokens `finish` takes. One more may be launched before, but not finished.

        feeds: the step after it takes its ids on the device, which are those of greedy rows.
        """
        bucket, compiled = self.graphs.select(batch.needs(self.plan, step))
        self._workers.send(Execute(step, bucket, compiled, LAUNCHED_FEEDING if feeds else LAUNCHED))
        try:
            return self.rank.launch(step, bucket, compiled, feeds)
        except PeerGone as error:
            raise self._named(error) from error

    def finish(self, launched: Launched) -> list[Token]:
        """The tokens of the first step that was launched and not finished, as `execute` returns them."""
        self._workers.send(Finish())
        try:
            return self.rank.finish(launched)
        except PeerGone as error:
            raise self._named(error) from error

    def _named(self, error: PeerGone) -> PeerGone:
        """The error of a failed exchange, with the worker that has ended if one has."""
        lost = self._workers.wait_for_lost()
        return error if lost is None else PeerGone(self._workers.gone(lost))

    def profile(self, begin: bool) -> None:
        """Start profiling on every rank, or stop it and write the profiles."""
        self._workers.send(Profile(begin))
        self.rank.profile(begin)
        self._workers.confirmed()

    def lost_worker(self) -> int | None:
        """A worker rank that has ended, or None. Any thread may ask."""
        return self._workers.lost()

    def gone(self, rank: int) -> str:
        """The message about a worker rank that has ended."""
        return self._workers.gone(rank)

    def close(self) -> None:
        """Disconnect from the worker ranks, which then end. Nothing can be executed afterwards."""
        self._workers.close()

    def _check_memory(self) -> None:
        backend = backend_of(self.run, self.place)
        backend.start()
        free = backend.free_memory()
        if free is None:
            require_on_host(self.run.memory, self.run.memory_gib, self.place.local_world)
        else:
            require(self.run.memory, *free)

    def _load(self, bucket: Bucket) -> None:
        self._workers.send(Load(bucket))
        self.rank.graphs.load(bucket)
        self._workers.confirmed()


def work(place: Place, rendezvous: Rendezvous, begun: Callable[[ResolvedRun], None]) -> None:
    """Run a worker rank until the driver ends. `begun` is called with the run as soon as it is known.

    Raises PeerGone where the driver is silent for longer than the run's timeout, or its host dies, or UserError where
    this host does not fit the driver's.
    """
    store = meet(place, rendezvous)
    driver = Driver(place, store)
    start = driver.first()
    assert isinstance(start, Start)
    if start.weights is not None:
        # One rank per host compares.
        driver.confirm(differing_weights(start.weights, place) if place.local_rank == 0 else "")
        driver.first()
    begun(start.run)
    rank = Rank(start.run, start.pixels, place, store, GraphStore(start.run.store_folder), Progress())
    driver.confirm()
    opened: deque[Launched] = deque()
    while True:
        order, closed = driver.next(start.run.timeout)
        if closed and not place.one_host:
            raise PeerGone("rank 0 or its host has ended")
        if closed or isinstance(order, End):
            # On one host, the supervisor says how rank 0 has ended.
            return
        if isinstance(order, Compile) and place.local_rank == 0:
            rank.graphs.compile(order.bucket)
        elif isinstance(order, Load):
            rank.graphs.load(order.bucket)
            driver.confirm()
        elif isinstance(order, Profile):
            rank.profile(order.begin)
            driver.confirm()
        elif isinstance(order, Execute) and order.how == AT_ONCE:
            rank.execute(order.step, order.bucket, order.compiled)
        elif isinstance(order, Execute):
            opened.append(rank.launch(order.step, order.bucket, order.compiled, order.how == LAUNCHED_FEEDING))
        elif isinstance(order, Finish):
            rank.finish(opened.popleft())
