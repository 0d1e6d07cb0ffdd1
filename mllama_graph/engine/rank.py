"""One rank: its shard of the weights, its pages and its graphs. It executes steps: integers in, token ids out."""

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from mllama_graph.core.errors import PeerGone
from mllama_graph.core.place import Place
from mllama_graph.core.report import Progress
from mllama_graph.engine import batch
from mllama_graph.engine.device import backend_of
from mllama_graph.engine.feedback import Feedback
from mllama_graph.engine.profiler import Profiler
from mllama_graph.engine.sampler import Sampler
from mllama_graph.engine.stats import HostSeconds
from mllama_graph.engine.steps import NOT_FINITE, PENDING, Row, Step, Token, VisionStep
from mllama_graph.graphs.aot import Graph
from mllama_graph.graphs.cuda_graphs import CapturedStep
from mllama_graph.graphs.step import Output, arguments
from mllama_graph.graphs.store import GraphStore
from mllama_graph.graphs.torchair import NpuGraph
from mllama_graph.measure.trace import GRAPH, SAMPLE
from mllama_graph.model.inputs import Pages
from mllama_graph.model.read_ahead import ReadAhead
from mllama_graph.model.tree import Pixels, Weights, build, nothing_mapped
from mllama_graph.model.weights import from_checkpoint, mapped, published, quantising, random_fill
from mllama_graph.ops.transfers import fetched, sent
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedRun


@dataclass(slots=True)
class Launched:
    """A step that the device computes, with what is needed to take its tokens.

    rows: those that get tokens. known: the state of each row's sequence, kept here since the sequence may end before
    the tokens are taken. counts: the number of tokens of each row. places: where the output has the logits of the
    tokens. found: the candidates, if the graph gives any. fetched: waits for the candidates and returns them on the
    host.
    """

    rows: list[Row]
    known: list[batch.Known]
    counts: list[int]
    places: list[int]
    logits: Tensor | None = None
    found: Tensor | None = None
    fetched: Callable[[], Tensor] | None = None


class Rank:
    """Weights, pages and graphs on one device.

    The constructor waits for the other ranks, so all ranks must be constructed at the same time. Raises UserError if
    the device is missing or a library can't be built.
    """

    def __init__(
        self,
        run: ResolvedRun,
        pixels: Pixels,
        place: Place,
        store: dist.Store | None,
        graphs: GraphStore,
        progress: Progress,
    ):
        self.run, self.shape, self.plan, self.place = run, run.shape, run.plan, place
        self.backend = backend_of(run, place)
        self.backend.start()
        self.spec = spec = self.backend.spec()
        make_deterministic(run.deterministic)
        self.backend.prepare(spec, graphs.libraries, progress.say)
        self.collectives = self.backend.join(store, graphs.libraries, progress.say)
        self.ops = self.backend.ops(spec)
        self.weights = self._load(pixels, progress)
        # Pages start as zeros: attention multiplies the values of masked keys by 0, and 0 * NaN is NaN.
        self.pages, self.image_pages = spec.pages(self.backend.placement(spec).zeros)
        self.graphs = self.backend.loaded(
            spec, self.weights, (self.pages, self.image_pages), self.ops, graphs, progress.say
        )
        self.sampler = Sampler(run.shape.text.vocab, spec.shard, self.backend.gather(self.ops), progress.say)
        self.sequences = batch.Sequences()
        self.feedback = Feedback(spec, run.device.simulated)
        self.host = HostSeconds()
        self.profiler: Profiler | None = None
        # Called when a step's inputs are ready: from now on the graph runs, and Python is free for other threads.
        self.on_graph: Callable[[], None] = lambda: None

    def _load(self, pixels: Pixels, progress: Progress) -> Weights:
        """Load this rank's weights from the checkpoint, or fill them with random values."""
        run, spec = self.run, self.spec
        whole, done = run.memory.weights, 0
        ahead = ReadAhead(run.checkpoint, spec.shard) if run.checkpoint else None

        def report(count: int) -> None:
            nonlocal done
            done += count
            if ahead:
                ahead.advance()
            progress.weights(done, whole)

        fill = from_checkpoint(run.checkpoint) if run.checkpoint else random_fill(run.shape, run.seed, spec.store)
        stored = mapped(run.checkpoint) if run.checkpoint else nothing_mapped
        codes = (
            published(run.checkpoint)
            if run.checkpoint and run.checkpoint.quantised
            else quantising(fill, self.backend.rounded, stored)
        )
        placement, layout = self.backend.placement(spec), self.backend.layout
        if ahead:
            ahead.advance()
        weights = build(
            run.shape, pixels, spec.store, placement, fill, report, spec.shard, spec.formats, codes, layout, stored
        )
        _return_freed_memory()
        self.backend.lay_out(weights, spec)
        return weights

    @torch.inference_mode()
    def execute(self, step: Step, bucket: Bucket, compiled: bool) -> list[Token]:
        """Run one step with the graph of a bucket. Returns the sampled tokens, which are the same on every rank.

        Raises PeerGone if another rank does not take part.
        """
        try:
            with self.profiler.step(bucket) if self.profiler else contextlib.nullcontext():
                launched = self._launch(step, bucket, compiled)
                return self._tokens(launched, None if launched.found is None else launched.found.cpu())
        except RuntimeError as error:
            raise self._named(error) from error

    @torch.inference_mode()
    def launch(self, step: Step, bucket: Bucket, compiled: bool, feeds: bool) -> Launched:
        """Begin a step without waiting for the device. See Executor.launch."""
        try:
            launched = self._launch(step, bucket, compiled)
            if launched.found is None:
                return launched
            if feeds:
                self.feedback.take(launched.found)
                for known, place in zip(launched.known, launched.places):
                    known.place = place
            # The copy begins now, since the next step may overwrite the graph's output.
            launched.fetched = fetched(launched.found)
            return launched
        except RuntimeError as error:
            raise self._named(error) from error

    @torch.inference_mode()
    def finish(self, launched: Launched) -> list[Token]:
        """Wait for a step that was launched, and return its tokens as `execute` does."""
        try:
            return self._tokens(launched, launched.fetched and launched.fetched())
        except RuntimeError as error:
            raise self._named(error) from error

    def _named(self, error: RuntimeError) -> Exception:
        """The error itself, or a PeerGone if a failed exchange with other ranks has caused it."""
        fault = self.collectives.fault(error)
        return PeerGone(fault) if fault else error

    def profile(self, begin: bool) -> None:
        """Start profiling this rank, or stop and write the profile to rank<k>/ in the run's folder."""
        if begin:
            folder = self.run.output_dir / f"rank{self.place.rank}"
            self.profiler = Profiler(self.spec, self.backend, folder, self.run.memory, self.run.options)
            self.profiler.begin()
        elif self.profiler:
            self.profiler.end()
            self.profiler = None

    def _marked(self, name: str) -> contextlib.AbstractContextManager[object]:
        return record_function(name) if self.profiler else contextlib.nullcontext()

    def _launch(self, step: Step, bucket: Bucket, compiled: bool) -> Launched:
        """Build a step's inputs and call its graph."""
        start = time.perf_counter()
        self.sequences.update(step)
        graph = self.graphs.graph(bucket, compiled)
        if isinstance(step, VisionStep):
            # The image may not fill its last page; the rest could hold non-finite values of an earlier image.
            self.backend.clear(self.image_pages, step.pages[-1:])
            self._call(graph, bucket, batch.tile_input(step, self.shape, self.plan), start)
            return Launched([], [], [], [])
        asked = [(row, count) for row, count in zip(step.rows, step.outputs) if count]
        rows = [row for row, _ in asked]
        pending = self.feedback.given and any(row.ids[0] == PENDING for row in rows)
        given = batch.text_input(step, self.sequences, bucket, self.plan)
        output = self._call(graph, bucket, given, start, self.feedback.fill if pending else None)
        logits, found = output if isinstance(output, tuple) else (output, None)
        known, counts = [self.sequences[row] for row in rows], [count for _, count in asked]
        return Launched(rows, known, counts, batch.places(step, bucket), logits, found if rows else None)

    def _call(
        self, graph: Graph, bucket: Bucket, given: Any, start: float, fill: Callable[[Any], Any] | None = None
    ) -> Output:
        # An NPU's graph and a captured step take inputs on the host. They prepare them, and copy all of them at once.
        on_host, filled = isinstance(graph, (CapturedStep, NpuGraph)), {}
        if not on_host:
            given = sent(given, self.spec.torch_device)
            given = fill(given) if fill else given
        elif fill:
            filled = {"fill": fill}
        inputs = arguments(bucket, given, *self._pages())
        self.on_graph()
        begin = time.perf_counter()
        with self._marked(GRAPH):
            output = graph(*inputs, **filled)
        self.host.inputs += begin - start
        self.host.graph += time.perf_counter() - begin
        return output

    def _pages(self) -> tuple[Pages, Pages]:
        return self.pages, self.image_pages

    def _tokens(self, launched: Launched, found_WBF: Tensor | None) -> list[Token]:
        """The tokens that are sampled after the last ids of each row; `launched.counts` says how many."""
        if not launched.rows:
            return []
        logits_BV, places = launched.logits, launched.places
        assert logits_BV is not None, "prefill and decode graphs give logits"
        start = time.perf_counter()
        # (row, state of its sequence, n) for each token: it is sampled after id number n of the row.
        each = [
            (row, known, n)
            for row, known, count in zip(launched.rows, launched.known, launched.counts)
            for n in range(len(row.ids) - count, len(row.ids))
        ]
        last = places[-1] + 1
        at: Any = slice(last) if last == len(each) else places
        with self._marked(SAMPLE):
            tokens = self.sampler.tokens(
                lambda: self.backend.logits(logits_BV[:last])[at],
                # Sliced on the host: the whole tensor was copied, since a slice on the device would take a kernel.
                None if found_WBF is None else found_WBF[:, at],
                [known.options(row.start + n + 1) for row, known, n in each],
                [row.start + n + 1 + known.skipped for row, known, n in each],
                [mask for row, count in zip(launched.rows, launched.counts) for mask in _masks(row, count)],
                [known.edit(row.start + n + 1, row.given_after(n)) for row, known, n in each],
            )
        begin = 0
        for row, known, n in zip(launched.rows, launched.known, launched.counts, strict=True):
            own = tokens[begin : begin + n]
            begin += n
            if any(token.id == NOT_FINITE for token in own):
                # Values of masked keys must be finite (see __init__), so the pages are cleared for their next owner.
                # Those before are finite, and other sequences may use them.
                # Of those, the next step writes what followed a rejected proposal once more.
                finite = min(known.finite, row.start) // self.plan.page_size
                self.backend.clear(self.pages, known.pages[finite:].tolist())
            else:
                known.finite = row.start + len(row.ids)
        self.host.sample += time.perf_counter() - start
        return tokens


def _masks(row: Row, count: int) -> tuple[bytes, ...]:
    """The masks of the `count` tokens that are sampled after a row. Scored tokens of a prompt have none."""
    if row.scored:
        return (*(b"",) * row.scored, row.mask)[:count]
    return (row.mask, *(row.later_masks or (b"",) * (count - 1)))


def make_deterministic(deterministic: bool) -> None:
    """Switch torch's deterministic algorithms on or off. Environment variables are set in launch/environment.py."""
    # torch.use_deterministic_algorithms would import Inductor, only to set an option that loaded graphs don't use.
    torch._C._set_deterministic_algorithms(deterministic, warn_only=True)
    torch._C._set_deterministic_fill_uninitialized_memory(False)


def _return_freed_memory() -> None:
    """Return freed heap memory to the operating system, if the C library can do that (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
