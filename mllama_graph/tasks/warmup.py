"""task=warmup: compile every bucket of the plan into the graph store. Inductor needs neither weights nor their memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Optional

from mllama_graph.plan.buckets import Plan
from mllama_graph.model.checkpoint import Checkpoint, model_of
from mllama_graph.core.config import Run, UserError
from mllama_graph.graphs.dispatch import GraphCompiler
from mllama_graph.plan.resolve import plan_of
from mllama_graph.engine.rank import graph_spec, graph_store, pick_device, precision_of
from mllama_graph.core.report import Progress, write_result
from mllama_graph.model.shape import ModelShape
from mllama_graph.engine.start import processor_of, start_engine


def main(run: Run) -> None:
    """Compile what the store lacks; what is there already is left alone, so that an interrupted warm-up goes on."""
    if run.backend.name == "eager":
        raise UserError("backend=eager compiles nothing, so there is nothing to warm up. Use backend=inductor.")
    shape, checkpoint = model_of(run)
    plan, progress = plan_of(run, shape), Progress()
    if run.backend.name == "torchair":
        _warm_ranks(run, plan, shape, checkpoint, progress)
        return
    device = pick_device(run)
    spec, store = graph_spec(run, shape, plan, device, precision_of(run, device, checkpoint)), graph_store(run)
    progress.say(f"plan: {plan.describe()}")
    if store.warning:
        raise UserError(f"{store.warning} A warm-up would be lost: give a graph_cache= that can be written.")
    buckets = plan.buckets()
    compiler = GraphCompiler(spec, store, progress.say)
    missing = [bucket for bucket in buckets if compiler.stored(bucket) is None]
    progress.say(f"{len(buckets)} graphs, {len(buckets) - len(missing)} in {store.folder}, {len(missing)} to compile")
    try:
        failed = [bucket for bucket in missing if not compiler.ask(bucket)]
        while compiler.pending:
            progress.graphs(len(missing) - compiler.pending, len(missing))
            failed += [bucket for bucket, error in compiler.collect(timeout=0.5) if error]
    finally:
        compiler.close()
    progress.graphs(len(missing), len(missing))
    write_result(Path(run.output_dir), asdict(run), graphs=[asdict(record) for record in compiler.records],
                 metrics={"graphs": len(buckets), "compiled": len(missing) - len(failed), "failed": len(failed)})
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} graphs could not be compiled; the lines above say why.")
    progress.say(f"all {len(buckets)} graphs are in {store.folder}")


def _warm_ranks(run: Run, plan: Plan, shape: ModelShape, checkpoint: Optional[Checkpoint], progress: Progress) -> None:
    """Have every rank compile its graphs by itself, over its own weights: that is how torchair compiles."""
    engine = start_engine(run, plan, shape, checkpoint, processor_of(run, shape, checkpoint), progress)
    graphs, buckets = engine.ranks.graphs, plan.buckets()
    if graphs.store.warning:
        raise UserError(f"{graphs.store.warning} A warm-up would be lost: give a graph_cache= that can be written.")
    for done, bucket in enumerate(buckets):
        progress.graphs(done, len(buckets))
        graphs.load_exactly(bucket)
    progress.graphs(len(buckets), len(buckets))
    engine.ranks.close()
    compiled = sum(record.source == "compiled" for record in graphs.records)
    write_result(Path(run.output_dir), asdict(run), graphs=[asdict(record) for record in graphs.records],
                 metrics={"graphs": len(buckets), "compiled": compiled, "failed": 0})
    progress.say(f"all {len(buckets)} graphs of every rank are in {graphs.store.folder}, {compiled} of them new")
