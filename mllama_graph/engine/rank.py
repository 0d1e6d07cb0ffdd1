"""One rank: its shard of the weights, its pages and its graphs. It executes steps: integers in, token ids out."""

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from mllama_graph.core.errors import PeerGone
from mllama_graph.core.place import Place
from mllama_graph.core.report import Progress
from mllama_graph.engine import batch
from mllama_graph.engine.device import backend_of
from mllama_graph.engine.profiler import Profiler
from mllama_graph.engine.sampler import Sampler
from mllama_graph.engine.steps import NOT_FINITE, Row, Step, Token, VisionStep
from mllama_graph.graphs.aot import Graph
from mllama_graph.graphs.cuda_graphs import CapturedStep
from mllama_graph.graphs.step import Output, arguments
from mllama_graph.graphs.store import GraphStore
from mllama_graph.graphs.torchair import NpuGraph
from mllama_graph.measure.trace import GRAPH, SAMPLE
from mllama_graph.model.inputs import Pages
from mllama_graph.model.tree import Pixels, Weights, build
from mllama_graph.model.weights import from_checkpoint, published, quantising, random_fill
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedRun


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
        # Seconds spent on sampling. On an asynchronous device, they include waiting for the graph to finish.
        self.sample_seconds = 0.0
        self.profiler: Profiler | None = None
        # Called when a step's inputs are ready: from now on the graph runs, and Python is free for other threads.
        self.on_graph: Callable[[], None] = lambda: None

    def _load(self, pixels: Pixels, progress: Progress) -> Weights:
        """Load this rank's weights from the checkpoint, or fill them with random values."""
        run, spec = self.run, self.spec
        whole, done = run.memory.weights, 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.weights(done, whole)

        fill = from_checkpoint(run.checkpoint) if run.checkpoint else random_fill(run.shape, run.seed, spec.store)
        published_files = run.checkpoint if run.checkpoint and run.checkpoint.quantised else None
        codes = (
            published(published_files, self.backend.repack)
            if published_files
            else quantising(fill, self.backend.rounded)
        )
        placement = self.backend.placement(spec)
        weights = build(run.shape, pixels, spec.store, placement, fill, report, spec.shard, spec.formats, codes)
        _return_freed_memory()
        self.backend.lay_out(weights, spec)
        return weights

    @torch.inference_mode()
    def execute(self, step: Step, bucket: Bucket, compiled: bool) -> list[Token]:
        """Run one step with the graph of a bucket. Returns the sampled tokens, which are the same on every rank.

        Raises PeerGone if another rank does not take part.
        """
        self.sequences.update(step)
        try:
            with self.profiler.step(bucket) if self.profiler else contextlib.nullcontext():
                return self._execute(step, bucket, self.graphs.graph(bucket, compiled))
        except RuntimeError as error:
            if fault := self.collectives.fault(error):
                raise PeerGone(fault) from error
            raise

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

    def _execute(self, step: Step, bucket: Bucket, graph: Graph) -> list[Token]:
        # An NPU's graph, and a captured step, take inputs on the host: they prepare them, and copy all at once.
        on_host = isinstance(graph, (CapturedStep, NpuGraph))
        device = torch.device("cpu") if on_host else self.spec.torch_device

        def call(given: object) -> Output:
            inputs = arguments(bucket, given, *self._pages())
            self.on_graph()
            with self._marked(GRAPH):
                return graph(*inputs)

        if isinstance(step, VisionStep):
            # The image may not fill its last page; the rest could hold non-finite values of an earlier image.
            self.backend.clear(self.image_pages, step.pages[-1:])
            call(batch.tile_input(step, self.shape, self.plan, device))
            return []
        logits = call(batch.text_input(step, self.sequences, bucket, self.plan, device))
        asked = [(row, count) for row, count in zip(step.rows, step.outputs) if count]
        return self._sample(logits, asked, batch.places(step, bucket)) if asked else []

    def _pages(self) -> tuple[Pages, Pages]:
        return self.pages, self.image_pages

    def _sample(self, output: Output, asked: list[tuple[Row, int]], places: list[int]) -> list[Token]:
        """The tokens after the last ids of rows, given with their numbers. places: where their logits are."""
        assert output is not None, "prefill and decode graphs give logits"
        start = time.perf_counter()
        logits_BV, found_WBF = output if isinstance(output, tuple) else (output, None)
        # Each row with the numbers of the ids after which tokens are sampled, and their positions.
        after = [(row, n) for row, count in asked for n in range(len(row.ids) - count, len(row.ids))]
        each = [(row, row.start + n + 1) for row, n in after]
        last = places[-1] + 1
        at: Any = slice(last) if last == len(each) else places
        with self._marked(SAMPLE):
            tokens = self.sampler.tokens(
                lambda: self.backend.logits(logits_BV[:last])[at],
                # The whole tensor in one copy: a slice of it would take a kernel.
                None if found_WBF is None else found_WBF.cpu()[:, at],
                [self.sequences[row].options(position) for row, position in each],
                [position + self.sequences[row].skipped for row, position in each],
                [mask for row, count in asked for mask in _masks(row, count)],
                [self.sequences[row].edit(row.start + n + 1, row.given_after(n)) for row, n in after],
            )
        begin = 0
        for row, n in asked:
            known, own = self.sequences[row], tokens[begin : begin + n]
            begin += n
            if any(token.id == NOT_FINITE for token in own):
                # Values of masked keys must be finite (see __init__), so the pages are cleared for their next owner.
                # Those before are finite, and other sequences may use them.
                # Of those, the next step writes what followed a rejected proposal once more.
                finite = min(known.finite, row.start) // self.plan.page_size
                self.backend.clear(self.pages, known.pages[finite:].tolist())
            else:
                known.finite = row.start + len(row.ids)
        self.sample_seconds += time.perf_counter() - start
        return tokens


def _masks(row: Row, count: int) -> tuple[bytes, ...]:
    """The masks of the `count` tokens that are sampled after a row. Those of a prompt have none."""
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
