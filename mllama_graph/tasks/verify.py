"""task=verify: lowers the graphs for an NPU from shapes alone, and checks them by the rules of ascend/rules.py.

Graphs of buckets of one class differ only in sizes. The smallest and the largest bucket of each class are lowered with
all layers, and their graphs must be equal except for sizes. Every bucket, and one bucket of each class for the last
rank, is lowered for a model with one layer of each kind.
"""

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mllama_graph.core.errors import RankFailed, UserError
from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.core.machine import CORES
from mllama_graph.core.report import Progress, growing_columns, write_result
from mllama_graph.core.workers import WorkerPool
from mllama_graph.engine.device import backend_of
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import Plan
from mllama_graph.plan.cores import BSH_ALONE, Forms
from mllama_graph.plan.cost import bucket_cost, floor_of
from mllama_graph.plan.latency import Model, latency_of
from mllama_graph.plan.resolve import ResolvedRun

# A worker process takes up to 1 GB, and lowers on one core.
WORKERS = 2
# Operations counted as fused.
FUSED = (
    "FusedInferAttentionScore",
    "ScatterPaKvCache",
    "AddRmsNorm",
    "RmsNorm",
    "LayerNormV4",
    "RotaryMul",
    "SwiGlu",
    "GeluV2",
    "WeightQuantBatchMatmulV2",
    "QuantBatchMatmulV3",
    "DynamicQuant",
)
SUM = "HcomAllReduce"
HEAD = (
    "graph",
    "lowered",
    "operations",
    "fused",
    "weights MB",
    "all-reduces",
    "lint",
    "seconds",
    "modelled ms",
    "cores",
)


@dataclass(frozen=True)
class Job:
    """A graph to lower: its bucket and rank, for the whole model or for one layer of each kind.

    forms: of its attention to pages. canvas: tiles of a whole image.
    """

    bucket: Bucket
    whole: bool
    rank: int = 0
    forms: Forms = BSH_ALONE
    canvas: int = 4

    @property
    def kind(self) -> tuple[object, ...]:
        """The class of the graph."""
        return kind(self.bucket, self.forms, self.canvas)


@dataclass
class Judged:
    """The verdict on a graph. findings: (rule, message). structure: the digests of ascend/structure.py."""

    job: Job
    seconds: float
    findings: list[tuple[str, str]]
    operations: int = 0
    fused: int = 0
    sums: int = 0
    weight_bytes: int = 0
    structure: dict[str, str] = field(default_factory=dict)


def main(run: ResolvedRun) -> None:
    """Lower and check all graphs, and print each verdict as it is reached.

    Raises RankFailed where a graph breaks a rule.
    """
    progress, begun = Progress(), time.perf_counter()
    if run.precision.compute == "fp32":
        raise UserError("dtype=fp32: task=verify judges graphs for an NPU, which takes bf16 or fp16. Use dtype=bf16.")
    spec = backend_of(run).spec()
    progress.say(f"plan: {run.plan.describe()}")
    counts = Counter(bucket.phase for bucket in run.plan.buckets())
    progress.say(f"graphs: {', '.join(f'{count} {phase}' for phase, count in counts.items())}")
    wanted, judged = jobs(spec, run.plan), []

    def kept() -> Iterator[Judged]:
        for found in lower(run, spec, wanted, progress):
            judged.append(found)
            yield found

    for line in growing_columns(HEAD, rows(spec, kept(), run.hardware), widths(wanted)):
        print(line, flush=True)
    findings, seconds = all_findings(judged), time.perf_counter() - begun
    for finding in findings:
        print(f"\n{finding}")
    sys.stdout.flush()
    progress.say(ranks_line(run.tp))
    progress.say(
        f"modelled memory of a rank: {run.memory.describe()}; {run.hardware.name} has "
        f"{run.hardware.memory_bytes / 1e9:.0f} GB"
    )
    progress.say(f"{len(judged)} graphs lowered in {seconds:.0f} s, {len(findings)} findings")
    write_result(
        run.output_dir,
        run.asked,
        status="error" if findings else "ok",
        graphs=records(judged),
        metrics={"graphs": len(judged), "findings": findings, "seconds": round(seconds, 1)},
    )
    if findings:
        raise RankFailed(
            f"{len(findings)} findings in the graphs for an NPU; the first: {' at '.join(findings[0].splitlines())}"
        )


def kind(bucket: Bucket, forms: Forms = BSH_ALONE, canvas: int = 4) -> tuple[object, ...]:
    """The class of a bucket. Buckets of one class have the same graph except for sizes. canvas: tiles of a whole image.

    A vision graph of one tile lacks operations that move tiles, and one of all tiles those that add padding tiles.
    """
    prompts = bucket.prompts or bucket
    past, several = (prompts.phase == "prefill" and more for more in (prompts.pages > 0, prompts.rows > 1))
    tiles = min(bucket.tiles, 2), bucket.tiles == canvas
    return bucket.phase, bucket.image_pages > 0, past, several, *tiles, forms.text.name, forms.image.name


def jobs(spec: GraphSpec, plan: Plan) -> list[Job]:
    """The graphs to lower, the longest jobs first."""
    classes: dict[tuple, list[Bucket]] = {}
    canvas = spec.shape.vision.max_tiles
    for bucket in plan.buckets():
        classes.setdefault(kind(bucket, spec.forms_of(bucket), canvas), []).append(bucket)

    def cost(bucket: Bucket) -> float:
        return bucket_cost(spec.shape, spec.page_size, bucket)

    ends = [(max(buckets, key=cost), min(buckets, key=cost)) for buckets in classes.values()]
    largest_and_least = dict.fromkeys(bucket for pair in ends for bucket in pair)
    last = [buckets[0] for buckets in classes.values()] if spec.world_size > 1 else []
    given = [(largest_and_least, True, 0), (plan.buckets(), False, 0), (last, False, spec.world_size - 1)]
    return [
        Job(bucket, whole, rank, spec.forms_of(bucket), canvas) for buckets, whole, rank in given for bucket in buckets
    ]


def lower(run: ResolvedRun, spec: GraphSpec, wanted: list[Job], progress: Progress) -> Iterator[Judged]:
    """Lower and check every graph in worker processes, in order. Raises RankFailed where one of them dies."""
    # Otherwise every process that uses the simulated device warns that its memory is rounded up.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    pool = WorkerPool(min(WORKERS, len(CORES)), _begin, (run,))
    try:
        for done, future in enumerate([pool.submit(judge, spec, job) for job in wanted]):
            progress.graphs(done, len(wanted))
            yield future.result()
        progress.graphs(len(wanted), len(wanted))
    except BrokenProcessPool as error:
        raise RankFailed(
            "a process that lowers graphs died, as the system ends one when memory runs out "
            f"(each of {WORKERS} takes up to 1 GB)"
        ) from error
    finally:
        pool.close()


def _begin(run: ResolvedRun) -> None:
    torch.set_num_threads(1)
    backend_of(run).start()


def judge(spec: GraphSpec, job: Job) -> Judged:
    """Lower a graph and check it."""
    from mllama_graph.ascend.capture import CaptureError, capture, shortened, shortened_formats
    from mllama_graph.ascend.graph import Context, LoweredGraph
    from mllama_graph.ascend.graphdef import count_operations
    from mllama_graph.ascend.lint import lint
    from mllama_graph.ascend.structure import structure

    begun = time.perf_counter()
    own = replace(spec, rank=job.rank)
    if not job.whole:
        short = shortened(spec.shape)
        own = replace(own, shape=short, formats=shortened_formats(spec.formats, spec.shape, short))
    try:
        captured = capture(own, job.bucket)
    except CaptureError as error:
        return Judged(job, time.perf_counter() - begun, [("lowering", str(error))])
    findings = [(found.rule, found.message) for found in lint(captured, Context(own, job.bucket))]
    found = count_operations(captured.graph)
    return Judged(
        job,
        time.perf_counter() - begun,
        findings,
        found.total(),
        sum(found[name] for name in FUSED),
        found[SUM],
        LoweredGraph(captured).weight_bytes,
        structure(captured),
    )


def all_findings(judged: list[Judged]) -> list[str]:
    """The findings of all graphs, and differences within a class. A finding that many graphs share is reported once."""
    first: dict[tuple, Judged] = {}
    alike: dict[tuple[str, str], list[str]] = {}
    for found in judged:
        like = first.setdefault((found.job.kind, found.job.whole), found)
        parts = difference(like.structure, found.structure) if found.structure and like.structure else []
        told = [*found.findings, *(("structure", f"not in every graph of its class: {line}") for line in parts)]
        for name, message in told:
            alike.setdefault((name, re.sub(r"_?\d+", "", message)), []).append(f"{name}: {found.job.bucket}: {message}")
    return [f"{told[0]}{f' (and in {len(told) - 1} more graphs)' if len(told) > 1 else ''}" for told in alike.values()]


def difference(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """For each of two structures, the first operation that the other one lacks; empty where they are equal."""
    return [
        next(told for digest, told in a.items() if digest not in b)
        for a, b in ((one, other), (other, one))
        if a.keys() - b.keys()
    ]


def rows(spec: GraphSpec, judged: Iterable[Judged], hardware: HardwareChoice) -> Iterator[tuple[str, ...]]:
    """One row per bucket, as soon as its graph is judged; graphs lowered whole come first, as in `jobs`.

    A bucket lowered only in short form shows the figures of a whole graph of its class. The short form of a bucket
    that has a row, and that of another rank, get rows only for their findings.
    """
    whole: dict[Bucket, Judged] = {}
    standing: dict[tuple[object, ...], Judged] = {}
    for found in judged:
        job, bad = found.job, len(found.findings)
        if job.whole:
            whole[job.bucket] = found
            standing.setdefault(job.kind, found)
        second = not job.whole and (job.bucket in whole or job.rank > 0)
        if second and not bad:
            continue
        of = found if job.whole or second else standing[job.kind]
        seconds, cores = modelled(spec, job.bucket, hardware)
        yield (
            str(job.bucket),
            "whole" if job.whole else f"short, rank {job.rank}" if second else f"as {of.job.bucket}",
            str(of.operations),
            str(of.fused),
            f"{of.weight_bytes / 1e6:,.0f}",
            str(of.sums),
            f"{bad} findings" if bad else "clean",
            f"{found.seconds:.1f}",
            f"{1e3 * seconds:.2f}",
            cores,
        )


def widths(wanted: list[Job]) -> tuple[int, ...]:
    """The widths of the table's columns: those of buckets' names are known before any graph is lowered."""
    name = max(len(str(job.bucket)) for job in wanted)
    return (name, len("as ") + name, *(max(len(title), len("99 findings")) for title in HEAD[2:]))


def records(judged: list[Judged]) -> list[dict[str, Any]]:
    """The records of the graphs for result.json."""
    return [
        {
            "bucket": str(found.job.bucket),
            "whole": found.job.whole,
            "rank": found.job.rank,
            "operations": found.operations,
            "fused": found.fused,
            "sums": found.sums,
            "weight_bytes": found.weight_bytes,
            "seconds": round(found.seconds, 2),
            "findings": found.findings,
        }
        for found in judged
    ]


def modelled(spec: GraphSpec, bucket: Bucket, hardware: HardwareChoice) -> tuple[float, str]:
    """The modelled seconds of a step, and the cores of attention to text and, after a plus, to image pages.

    Hardware without figures for plan/latency.py has a floor, and no cores.
    """
    if not hardware.calibration.cores:
        floor = floor_of(spec.shape, spec.page_size, bucket, spec.storage, spec.world_size, hardware)
        return floor.seconds, "-"
    model = Model(spec.shape, spec.storage, spec.world_size, hardware)
    found = latency_of(model, spec.page_size, bucket, spec.forms_of(bucket))
    return found.seconds, found.described_cores


def ranks_line(tp: int) -> str:
    """A line on the ranks whose graphs were not lowered."""
    if tp == 1:
        return "1 rank"
    return (
        f"{tp} ranks: the graphs of rank 0 stand for all ranks, which differ only in weights; rank {tp - 1} was "
        "compared in short form"
    )
