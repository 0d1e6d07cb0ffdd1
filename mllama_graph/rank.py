"""One device: weights, pages and graphs, and the execution of steps. Integers in, ids out."""

import ctypes
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from mllama_graph import batch
from mllama_graph.buckets import Bucket, Plan
from mllama_graph.checkpoint import Checkpoint, Pixels, build, from_checkpoint, random_fill
from mllama_graph.config import Run, UserError
from mllama_graph.dispatch import Graphs
from mllama_graph.graphs import GraphSpec, arguments
from mllama_graph.model import sample
from mllama_graph.ops.plain import PLAIN
from mllama_graph.roofline import Memory, bucket_cost, memory, require
from mllama_graph.report import Progress
from mllama_graph.scheduler import AnyStep, PrefillStep, Row, VisionStep
from mllama_graph.shape import ModelShape
from mllama_graph.store import GraphStore, default_store

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What the process itself takes beside weights, pages and workspace: torch and the compiled graphs.
PROCESS_BYTES = 400_000_000


@dataclass(frozen=True)
class Precision:
    """store: of the weights. compute: of activations and pages."""

    store: torch.dtype
    compute: torch.dtype


def precision(run: Run, device: str, stored: torch.dtype) -> Precision:
    """What dtype= means on a device.

    auto is the checkpoint's dtype on an accelerator. On a CPU the weights stay as they are stored and are computed in
    fp32: few CPUs multiply bf16 or fp16 faster than fp32, all read it faster.
    """
    if run.dtype != "auto":
        return Precision(DTYPES[run.dtype], DTYPES[run.dtype])
    return Precision(stored, torch.float32 if device == "cpu" else stored)


def pick_device(run: Run) -> str:
    """The device of device=, checked. Raises UserError where there is none."""
    if run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device. Use device=cpu.")
    return run.device


def available_memory(run: Run, device: str) -> tuple[int, str]:
    """Bytes this run may take, and where the figure comes from."""
    if run.memory_gib is not None:
        return int(run.memory_gib * 2**30), f"memory_gib={run.memory_gib:g}"
    if device == "cuda":
        return torch.cuda.mem_get_info()[0], "free on the CUDA device"
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024, "MemAvailable"
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "physical memory"


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


def graph_spec(run: Run, shape: ModelShape, plan: Plan, device: str, chosen: Precision) -> GraphSpec:
    """What the graphs of a run are compiled for."""
    backend = "inductor" if run.backend.name == "auto" else run.backend.name
    return GraphSpec(shape, plan.page_size, plan.num_pages, plan.num_image_pages, chosen.store, chosen.compute, backend,
                     device, run.threads or torch.get_num_threads(), run.tp, 0,
                     tuple(sorted(run.backend.inductor.items())))


def graph_store(run: Run) -> GraphStore:
    """The store of graph_cache=."""
    return GraphStore(Path(run.graph_cache).expanduser().absolute() if run.graph_cache else default_store())


class Rank:
    """Weights, pages and graphs on one device.

    Raises UserError before anything is allocated where the memory does not suffice.
    """

    def __init__(self, run: Run, shape: ModelShape, plan: Plan, pixels: Pixels, checkpoint: Optional[Checkpoint],
                 progress: Progress):
        self.run, self.shape, self.plan = run, shape, plan
        name = pick_device(run)
        self.device = torch.device(name)
        self.precision = precision(run, name, checkpoint.dtype if checkpoint else torch.bfloat16)
        store, compute = self.precision.store, self.precision.compute
        self.memory: Memory = memory(shape, plan, store.itemsize, compute.itemsize)
        available, where = available_memory(run, name)
        require(self.memory, available - PROCESS_BYTES, where)
        if checkpoint:
            checkpoint.verify()
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.weights(done, self.memory.weights)

        fill = from_checkpoint(checkpoint) if checkpoint else random_fill(run.seed, store)
        self.weights = build(shape, pixels, store, self.device, fill, report)
        _return_freed_memory()
        spec = graph_spec(run, shape, plan, name, self.precision)
        torch.set_num_threads(spec.threads)
        # Zeros, since a masked key still takes part with weight 0, and 0 * NaN is NaN.
        self.pages, self.image_pages = spec.pages(torch.zeros)
        self.graphs = Graphs(
            spec, self.weights, PLAIN, graph_store(run), plan.buckets(),
            cost=lambda bucket: bucket_cost(shape, plan.page_size, bucket), reuse=run.plan.reuse,
            mode=run.plan.compile, say=progress.say)

    @torch.inference_mode()
    def execute(self, step: AnyStep, pixels: Optional[np.ndarray] = None) -> list[Token]:
        """Run one step; a token for each row that is due one. `pixels` are the real tiles of a VisionStep."""
        bucket, graph = self.graphs.serve(self._need(step))
        call = lambda given: graph(*arguments(bucket, given, self.pages, self.image_pages))  # noqa: E731
        if isinstance(step, VisionStep):
            assert pixels is not None
            call(batch.tile_input(step, pixels, self.shape, self.plan, self.device))
            return []
        if isinstance(step, PrefillStep):
            logits = call(batch.prompt_input(step.row, bucket, self.plan, self.device))
            return self._sample(logits, (step.row,)) if step.sample else []
        logits = call(batch.token_input(step.rows, bucket, self.plan, self.device))
        return self._sample(logits[:len(step.rows)], step.rows)

    def _need(self, step: AnyStep) -> Bucket:
        return self.plan.vision() if isinstance(step, VisionStep) else batch.needs(self.plan, step)

    def _sample(self, logits_BV: Tensor, rows: Sequence[Row]) -> list[Token]:
        chosen = [row.sampling for row in rows]
        if all(s.temperature == 0 for s in chosen):
            ids_B = sample.greedy(logits_BV)
        else:
            column = lambda values: torch.tensor(values, device=self.device)  # noqa: E731
            draws = [noise(row.sampling.seed, row.start + len(row.ids)) for row in rows]
            ids_B = sample.draw(
                logits_BV, column([float(s.temperature) for s in chosen]), column([s.top_k for s in chosen]),
                column([float(s.top_p) for s in chosen]), column(draws))
        ids = ids_B.tolist()
        best = max((s.logprobs for s in chosen if s.logprobs is not None), default=None)
        if best is None:
            return [Token(id) for id in ids]
        k = max(1, min(best, self.shape.text.vocab))
        own, top_ids, top = (t.tolist() for t in sample.log_probabilities(logits_BV, ids_B, k))
        return [Token(ids[i]) if s.logprobs is None else
                Token(ids[i], own[i], tuple(top_ids[i][:s.logprobs]), tuple(top[i][:s.logprobs]))
                for i, s in enumerate(chosen)]


def _return_freed_memory() -> None:
    """Hand freed heap pages back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
