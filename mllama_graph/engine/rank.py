"""One rank, one device: its part of the weights, pages and graphs, and the execution of steps. Integers in, ids out."""

import contextlib
import ctypes
import io
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from mllama_graph.engine import batch
from mllama_graph.graphs import torchair as lowering
from mllama_graph.plan.buckets import Bucket, Plan
from mllama_graph.model.checkpoint import DTYPES, Checkpoint, Pixels, allocate, build, from_checkpoint, random_fill
from mllama_graph.engine.collectives import Collectives, kind_of, load_native
from mllama_graph.core.config import PeerGone, Run, UserError
from mllama_graph.graphs.cuda_graphs import CapturedStep
from mllama_graph.graphs.dispatch import Loaded, LoadedNpu
from mllama_graph.graphs.aot import GraphSpec, arguments, ops_of
from mllama_graph.model import sample
from mllama_graph.ops import cpu
from mllama_graph.ops.ranks import HOST_GROUP, gather_in
from mllama_graph.core.place import Place
from mllama_graph.plan.resolve import NPUS, precision
from mllama_graph.engine.profiler import GRAPH, SAMPLE, Level, Profiler
from mllama_graph.core.report import Progress
from mllama_graph.plan.cost import Memory
from mllama_graph.engine.scheduler import AnyStep, PrefillStep, Row, VisionStep
from mllama_graph.model.shape import ModelShape
from mllama_graph.graphs.store import GraphStore, store_folder
from mllama_graph.model.table import Shard, elements


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """store: of the weights. compute: of activations and pages."""

    store: torch.dtype
    compute: torch.dtype


def pick_device(run: Run) -> str:
    """The device of device=, checked. Raises UserError where there is none. NPUs are settled before (preflight.py)."""
    if run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device. Use device=cpu.")
    return run.device


@dataclass(frozen=True)
class Token:
    """A sampled id, and log-probabilities of the raw logits where they were asked for."""

    id: int
    logprob: Optional[float] = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def noise(seed: int, position: int) -> float:
    """The draw in [0, 1) for one position of one request: of nothing else, so that neighbours don't matter."""
    return random.Random(f"{seed}/{position}").random()


def graph_spec(run: Run, shape: ModelShape, plan: Plan, device: str, chosen: Precision,
               place: Optional[Place] = None) -> GraphSpec:
    """What the graphs of a run are compiled for; without `place`, for ranks that share this host."""
    place = place or Place(0, run.tp, 0, run.tp)
    backend = "inductor" if run.backend.name == "auto" else run.backend.name
    options = asdict(run.backend.torchair) if backend == "torchair" else run.backend.inductor
    threads = run.threads or min(torch.get_num_threads(), place.threads())
    return GraphSpec(shape, plan.page_size, plan.num_pages, plan.num_image_pages, chosen.store, chosen.compute, backend,
                     device, threads, run.tp, kind_of(run, device, place), "native" if run.backend.kernels == "native" else "plain",
                     run.deterministic, tuple(sorted(options.items())), place.rank)


def graph_store(run: Run) -> GraphStore:
    """The store of graph_cache=."""
    return GraphStore(store_folder(run))


def precision_of(run: Run, device: str, checkpoint: Optional[Checkpoint]) -> Precision:
    """The precision of a run's weights, random ones being those of a bf16 checkpoint."""
    store, compute = precision(run.dtype, device, checkpoint.stored if checkpoint else "bf16")
    return Precision(DTYPES[store], DTYPES[compute])


class Rank:
    """Weights, pages and graphs on one device. All ranks of a run make theirs at the same time, since they join here."""

    def __init__(self, run: Run, shape: ModelShape, plan: Plan, pixels: Pixels, checkpoint: Optional[Checkpoint],
                 place: Place, store: Optional[dist.Store], segment: str, progress: Progress):
        self.run, self.shape, self.plan, self.shard = run, shape, plan, Shard(place.rank, place.world)
        name, graphs = pick_device(run), graph_store(run)
        self.precision = precision_of(run, name, checkpoint)
        if name == "cuda":
            torch.cuda.set_device(place.local_rank)
        elif name in NPUS:
            start_npu(name, place.local_rank, self.precision)
        self.spec = spec = graph_spec(run, shape, plan, name, self.precision, place)
        self.device, on_npu = spec.torch_device, spec.backend == "torchair"
        make_deterministic(run.deterministic)
        if name == "cpu" and place.local_world > 1 and spec.threads <= len(place.cores()):
            os.sched_setaffinity(0, place.cores())
        torch.set_num_threads(spec.threads)
        if spec.kernels == "native":
            load_native("kernels", graphs.libraries, "backend.kernels=plain")
        self.collectives = Collectives(spec.collectives, place, store, segment, run.timeout, name, graphs.libraries)
        # Seconds spent sampling; where work is queued on a device, the wait for the logits is part of it.
        self.sample_seconds = 0.0
        self._done = 0
        whole = elements(shape, self.shard) * self.precision.store.itemsize

        def report(count: int) -> None:
            self._done += count
            progress.weights(self._done, whole)

        dtype = self.precision.store
        fill = from_checkpoint(checkpoint) if checkpoint else random_fill(shape, run.seed, dtype)
        self.weights = build(shape, pixels, dtype, self.device, fill, report, self.shard)
        _return_freed_memory()
        if run.backend.torchair.weight_format == "nz" and on_npu:
            lowering.cast_to_nz(self.weights)
        if spec.kernels == "native":
            cpu.lay_out(self.weights)
        # Zeros, since a masked key still takes part with weight 0, and 0 * NaN is NaN.
        self.pages, self.image_pages = spec.pages(_zeros)
        self.ops = ops_of(spec)
        self.gather = gather_in(HOST_GROUP, place.world) if on_npu and place.world > 1 else self.ops.all_gather
        self.profiler: Optional[Profiler] = None
        kind = LoadedNpu if on_npu else Loaded
        self.graphs = kind(spec, self.weights, (self.pages, self.image_pages), self.ops, graphs, progress.say)

    @torch.inference_mode()
    def execute(self, step: AnyStep, bucket: Bucket, compiled: bool, pixels: Optional[np.ndarray]) -> list[Token]:
        """Run one step through a bucket; a token for each row that is due one, the same on every rank.

        Raises PeerGone where another rank does not take part.
        """
        try:
            with self.profiler.step(bucket) if self.profiler else contextlib.nullcontext():
                return self._execute(step, bucket, self.graphs.graph(bucket, compiled), pixels)
        except RuntimeError as error:
            if fault := self.collectives.fault():
                raise PeerGone(fault) from error
            raise

    def profile(self, planned: Optional[Memory]) -> None:
        """Begin to record what this rank does, `planned` its memory; None ends it and writes the run's rank<k>/."""
        if planned is None:
            self.profiler.end()
            self.profiler = None
            return
        task = self.run.task
        folder = Path(self.run.output_dir) / f"rank{self.shard.rank}"
        self.profiler = Profiler(self.spec, folder, planned, Level(task.level, task.aic_metrics))
        self.profiler.begin()

    def _marked(self, name: str) -> contextlib.AbstractContextManager:
        return record_function(name) if self.profiler else contextlib.nullcontext()

    def _execute(self, step: AnyStep, bucket: Bucket, graph: Callable, pixels: Optional[np.ndarray]) -> list[Token]:
        def call(given) -> Optional[Tensor]:
            with self._marked(GRAPH):
                return graph(*arguments(bucket, given, self.pages, self.image_pages))

        if isinstance(step, VisionStep):
            assert pixels is not None
            call(batch.tile_input(step, pixels, self.shape, self.plan, self.device))
            return []
        if isinstance(step, PrefillStep):
            logits = call(batch.prompt_input(step.row, bucket, self.plan, self.device))
            return self._sample(logits, (step.row,)) if step.sample else []
        # A captured step brings its inputs to the device itself, in one copy.
        device = torch.device("cpu") if isinstance(graph, CapturedStep) else self.device
        logits = call(batch.token_input(step.rows, bucket, self.plan, device))
        return self._sample(logits[:len(step.rows)], step.rows)

    def _sample(self, logits_BV: Tensor, rows: Sequence[Row]) -> list[Token]:
        start = time.perf_counter()
        with self._marked(SAMPLE):
            tokens = self._tokens(logits_BV, rows)
        self.sample_seconds += time.perf_counter() - start
        return tokens

    def _tokens(self, logits_BV: Tensor, rows: Sequence[Row]) -> list[Token]:
        chosen, vocab, gather = [row.sampling for row in rows], self.shape.text.vocab, self.gather
        first = self.shard.rank * self.shard.size(vocab)
        # On an NPU the host samples: kernels outside of a graph are launched one by one.
        logits_BV = sample.own_ids(logits_BV.cpu() if self.device.type == "npu" else logits_BV, first, vocab)
        best = max((s.logprobs for s in chosen if s.logprobs is not None), default=0)
        offered = min(max(best, *(1 if s.temperature == 0 else s.top_k or vocab for s in chosen), 1), vocab)
        value_Bk, id_Bk = sample.candidates(logits_BV, offered, first, gather)
        at_B = torch.zeros(len(rows), dtype=torch.long, device=logits_BV.device)
        if any(s.temperature > 0 for s in chosen):
            column = lambda values: torch.tensor(values, device=logits_BV.device)  # noqa: E731
            draws = [noise(row.sampling.seed, row.start + len(row.ids)) for row in rows]
            at_B = sample.draw(
                value_Bk, column([float(s.temperature) for s in chosen]), column([s.top_k for s in chosen]),
                column([float(s.top_p) for s in chosen]), column(draws))
        ids = id_Bk.gather(-1, at_B[:, None])[:, 0].tolist()
        if all(s.logprobs is None for s in chosen):
            return [Token(id) for id in ids]
        logp_Bk = value_Bk - sample.total(logits_BV, gather)[:, None]
        own, top_ids, top = logp_Bk.gather(-1, at_B[:, None])[:, 0].tolist(), id_Bk.tolist(), logp_Bk.tolist()
        return [Token(ids[i]) if s.logprobs is None else
                Token(ids[i], own[i], tuple(top_ids[i][:s.logprobs]), tuple(top[i][:s.logprobs]))
                for i, s in enumerate(chosen)]


def start_npu(name: str, index: int, chosen: Precision) -> None:
    """Make torch know the NPU, and this rank's one the current; on a machine without one, have graphs interpreted."""
    _import_torch_npu()
    if name == "npu":
        torch.npu.set_device(index)
        return
    from mllama_graph.ascend import interpreter

    interpreter.install(wide=chosen.compute == torch.float32)


def _import_torch_npu() -> None:
    """Registers the device. What it prints of CANN's version goes to the log: stdout is the answer's."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        import torch_npu  # noqa: F401
        import torchair  # noqa: F401
    log.info("torch_npu: %s", said.getvalue().strip() or "imported")
    # torchair takes these signals for itself, closes its engine and goes on: an interrupt must end the run.
    for number, handler in kept.items():
        signal.signal(number, handler)


def free_npu_memory(index: int) -> int:
    """Bytes that an NPU has to give."""
    _import_torch_npu()
    torch.npu.set_device(index)
    return torch.npu.mem_get_info()[0]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that need no kernel of an NPU."""
    if device.type == "npu":
        return torch.zeros(size, dtype=dtype).to(device)
    return allocate(size, dtype, device).zero_()


def make_deterministic(deterministic: bool) -> None:
    """Have torch take deterministic algorithms where it has them; what must stand in the environment is launch's."""
    # The public function imports Inductor, to set a switch there that loaded packages have no use for.
    torch._C._set_deterministic_algorithms(deterministic, warn_only=True)
    torch._C._set_deterministic_fill_uninitialized_memory(False)


def _return_freed_memory() -> None:
    """Hand freed heap pages back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
