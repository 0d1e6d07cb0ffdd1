"""weights=meta: builds every rank and traces every graph of the plan from shapes alone, which takes little memory.

Ranks of equal shapes share their graphs, so each graph is traced once for all of them. The shapes are compared first.
"""

import time
from collections import Counter
from dataclasses import asdict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mllama_graph.core.machine import CORES
from mllama_graph.core.report import Progress, columns, table, write_result
from mllama_graph.core.workers import WorkerPool
from mllama_graph.engine.device import backend_of
from mllama_graph.graphs.aot import prepare_tracing, trace
from mllama_graph.graphs.compiler import Record
from mllama_graph.graphs.key import key
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.store import GraphStore
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard, elements, replicated
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedRun

MB = 1e6


def main(run: ResolvedRun) -> None:
    """Trace all graphs, and print what each rank would hold. Nothing is computed or compiled."""
    spec, plan, progress = backend_of(run).spec(), run.plan, Progress()
    progress.say(f"plan: {plan.describe()}")
    held = [rank_shapes(spec, Shard(rank, run.tp)) for rank in range(run.tp)]
    kinds = {tuple(shapes.items()): rank for rank, shapes in reversed(list(enumerate(held)))}
    jobs = [(bucket, Shard(rank, run.tp)) for rank in kinds.values() for bucket in plan.buckets()]
    records, rows = [], []
    pool = WorkerPool(min(len(CORES), len(jobs)), prepare_tracing, (spec, GraphStore(run.store_folder).written))
    try:
        futures = [pool.submit(traced, spec, *job) for job in jobs]
        for (bucket, _), future in zip(jobs, futures):
            nodes, sums, seconds = future.result()
            records.append(Record(bucket.phase, str(bucket), "traced", round(seconds, 3), 0, key(spec, bucket)))
            rows.append((str(bucket), str(nodes), str(sums), f"{seconds:.1f}"))
            progress.graphs(len(records), len(jobs))
    finally:
        pool.close()
    print(columns(("graph", "operations", "all-reduces", "seconds"), rows))
    weights = [sum(size.numel() for size in shapes.values()) * spec.store.itemsize for shapes in held]
    print("\n" + table(_sums(run.shape, run.tp, spec.store.itemsize, weights)), flush=True)
    share = f"{run.tp} ranks of equal shapes share their graphs" if len(kinds) == 1 else f"{len(kinds)} kinds of rank"
    progress.say(f"\n{share}; {len(records)} traced")
    write_result(
        run.output_dir,
        run.asked,
        graphs=[asdict(record) for record in records],
        metrics={
            "graphs": len(records),
            "rank_weight_bytes": weights,
            "model_weight_bytes": elements(run.shape) * spec.store.itemsize,
            "replicated_bytes": {part: count * spec.store.itemsize for part, count in replicated(run.shape).items()},
            "rank_page_bytes": page_bytes(spec),
        },
    )


def rank_shapes(spec: GraphSpec, shard: Shard) -> dict[str, torch.Size]:
    """The shapes of a rank's Parameters, by path."""
    with FakeTensorMode():
        tree = spec.unfilled_weights(shard)
    return {path: value.shape for path, value in tree.named_parameters()}


def traced(spec: GraphSpec, bucket: Bucket, shard: Shard) -> tuple[int, int, float]:
    """The numbers of operations and all-reduces in a rank's graph, and the seconds that tracing it took."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    with FakeTensorMode():
        program = trace(spec, bucket, shard)
    called = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    sums = sum(count for name, count in called.items() if "all_reduce" in name)
    return called.total(), sums, time.perf_counter() - start


def page_bytes(spec: GraphSpec) -> int:
    """Bytes of a rank's K/V pages."""
    with FakeTensorMode():
        return sum(
            data.numel() * data.element_size() for pool in spec.unfilled_pages() for pair in pool for data in pair
        )


def _sums(shape: ModelShape, tp: int, width: int, weights: list[int]) -> list[tuple[str, str]]:
    """The breakdown of the ranks' weight bytes: the model, replicated parts and padding."""
    whole, extra = elements(shape) * width, {part: (tp - 1) * n * width for part, n in replicated(shape).items()}
    padding = sum(weights) - whole - sum(extra.values())
    parts = [
        ("weights of a rank", weights[0]),
        (f"weights of {tp} ranks", sum(weights)),
        ("weights of the model", whole),
        *((f"{part}, {tp - 1} extra copies", value) for part, value in extra.items() if tp > 1),
        ("padding of the vocabulary", padding),
    ]
    return [(name, f"{value / MB:,.1f} MB") for name, value in parts]
