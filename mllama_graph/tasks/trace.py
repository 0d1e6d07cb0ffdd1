"""What weights=meta does: build every rank and trace every graph of the plan from shapes alone, in no memory to speak of.

Ranks of equal shapes share their graphs, so each graph is traced once for all ranks that do; that they do is checked.
"""

import multiprocessing
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mllama_graph.plan.buckets import Bucket
from mllama_graph.model.checkpoint import model_of
from mllama_graph.core.config import Run
from mllama_graph.graphs.dispatch import Record
from mllama_graph.graphs.aot import GraphSpec, prepare_tracing, trace, unfilled
from mllama_graph.core.place import CORES, deaf_children
from mllama_graph.plan.resolve import plan_of
from mllama_graph.engine.rank import graph_spec, graph_store, pick_device, precision_of
from mllama_graph.core.report import Progress, columns, table, write_result
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard, elements, replicated

MB = 1e6


def main(run: Run) -> None:
    """Trace, and print what each rank would hold; nothing is computed and nothing compiled."""
    shape, _ = model_of(run)
    plan, device, progress = plan_of(run, shape), pick_device(run), Progress()
    spec = graph_spec(run, shape, plan, device, precision_of(run, device, None))
    progress.say(f"plan: {plan.describe()}")
    held = [rank_shapes(spec, Shard(rank, run.tp)) for rank in range(run.tp)]
    kinds = {tuple(shapes.items()): rank for rank, shapes in reversed(list(enumerate(held)))}
    jobs = [(bucket, Shard(rank, run.tp)) for rank in kinds.values() for bucket in plan.buckets()]
    records, rows = [], []
    context = multiprocessing.get_context("spawn")
    with deaf_children():
        pool = context.Pool(min(len(CORES), len(jobs)), prepare_tracing, (spec, graph_store(run).written))
    with pool:
        for (bucket, _), (nodes, sums, seconds) in zip(jobs, pool.imap(partial(traced, spec), jobs)):
            records.append(Record(bucket.phase, str(bucket), "traced", round(seconds, 3), 0, spec.key(bucket)))
            rows.append((str(bucket), str(nodes), str(sums), f"{seconds:.1f}"))
            progress.graphs(len(records), len(jobs))
    print(columns(("graph", "operations", "all-reduces", "seconds"), rows))
    width = spec.store.itemsize
    weights = [sum(size.numel() for size in shapes.values()) * width for shapes in held]
    print("\n" + table(_sums(shape, run.tp, width, weights)), flush=True)
    share = f"{run.tp} ranks of equal shapes share their graphs" if len(kinds) == 1 else f"{len(kinds)} kinds of rank"
    progress.say(f"\n{share}; {len(records)} traced")
    write_result(Path(run.output_dir), asdict(run), graphs=[asdict(record) for record in records], metrics={
        "graphs": len(records), "rank_weight_bytes": weights, "model_weight_bytes": elements(shape) * width,
        "replicated_bytes": {part: count * width for part, count in replicated(shape).items()},
        "rank_page_bytes": page_bytes(spec)})


def rank_shapes(spec: GraphSpec, shard: Shard) -> dict[str, torch.Size]:
    """The shapes of a rank's Parameters, by path."""
    with FakeTensorMode():
        tree = unfilled(spec, shard)
    return {path: value.shape for path, value in tree.named_parameters()}


def traced(spec: GraphSpec, job: tuple[Bucket, Shard]) -> tuple[int, int, float]:
    """Operations and all-reduces of a rank's graph, and the seconds that tracing it took."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    with FakeTensorMode():
        program = trace(spec, *job)
    called = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    sums = sum(count for name, count in called.items() if "all_reduce" in name)
    return called.total(), sums, time.perf_counter() - start


def page_bytes(spec: GraphSpec) -> int:
    """Bytes of a rank's K/V pages."""
    with FakeTensorMode():
        return sum(data.numel() * data.element_size() for pool in spec.pages(torch.empty) for pair in pool for data in pair)


def _sums(shape: ModelShape, tp: int, width: int, weights: list[int]) -> list[tuple[str, str]]:
    """How the ranks' bytes add up to the model's."""
    whole, extra = elements(shape) * width, {part: (tp - 1) * n * width for part, n in replicated(shape).items()}
    show = lambda value: f"{value / MB:,.1f} MB"  # noqa: E731
    padding = sum(weights) - whole - sum(extra.values())
    return [("weights of a rank", show(weights[0])), (f"of {tp} ranks", show(sum(weights))), ("of the model", show(whole)),
            *((f"{part}, {tp - 1} more times", show(value)) for part, value in extra.items() if tp > 1),
            ("padding of the vocabulary", show(padding))]
