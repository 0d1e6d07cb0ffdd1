"""task=warmup: compiles every bucket of the plan into the graph store. With Inductor it needs no weights."""

from dataclasses import asdict

from mllama_graph.core.config import TaskOptions
from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, write_result
from mllama_graph.engine.device import backend_of
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.graphs.compiler import GraphCompiler
from mllama_graph.graphs.store import GraphStore
from mllama_graph.plan.resolve import ResolvedRun


def main(run: ResolvedRun) -> None:
    """Compile the graphs that the store lacks. Stored graphs are kept, so an interrupted warm-up can be continued."""
    progress, buckets = Progress(), run.plan.buckets()
    if run.needs == TaskOptions.RANKS:
        _warm_ranks(run, progress)
        return
    backend = backend_of(run)
    if not backend.spec().compiles:
        raise UserError("backend=eager compiles nothing, so there is nothing to warm up. Use backend=inductor.")
    store = GraphStore(run.store_folder)
    progress.say(f"plan: {run.plan.describe()}")
    _check_store(store)
    backend.start()
    compiler = GraphCompiler(backend.spec(), store, progress.say)
    missing = [bucket for bucket in buckets if compiler.stored(bucket) is None]
    progress.say(f"{len(buckets)} graphs, {len(buckets) - len(missing)} in {store.folder}, {len(missing)} to compile")
    try:
        failed = [bucket for bucket in missing if not compiler.compile(bucket)]
        while compiler.pending:
            progress.graphs(len(missing) - compiler.pending, len(missing))
            failed += [bucket for bucket, error in compiler.collect(timeout=0.5) if error]
    finally:
        compiler.close()
    progress.graphs(len(missing), len(missing))
    write_result(
        run.output_dir,
        run.asked,
        graphs=[asdict(record) for record in compiler.records],
        metrics={"graphs": len(buckets), "compiled": len(missing) - len(failed), "failed": len(failed)},
    )
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} graphs could not be compiled; the lines above say why.")
    progress.say(f"all {len(buckets)} graphs are in {store.folder}")


def _warm_ranks(run: ResolvedRun, progress: Progress) -> None:
    """Have every rank compile its own graphs with its own weights, as torchair requires."""
    engine = start_engine(run, processor_of(run), progress)
    graphs, buckets = engine.executor.graphs, run.plan.buckets()
    _check_store(graphs.store)
    for done, bucket in enumerate(buckets):
        progress.graphs(done, len(buckets))
        graphs.load_exactly(bucket)
    progress.graphs(len(buckets), len(buckets))
    engine.close()
    compiled = sum(record.source == "compiled" for record in graphs.records)
    write_result(
        run.output_dir,
        run.asked,
        graphs=engine.graph_records(),
        metrics={"graphs": len(buckets), "compiled": compiled, "failed": 0},
    )
    progress.say(f"all {len(buckets)} graphs of every rank are in {graphs.store.folder}, {compiled} of them new")


def _check_store(store: GraphStore) -> None:
    """Raises UserError where the graphs would be lost at the end."""
    if store.warning:
        raise UserError(f"{store.warning} A warm-up would be lost: give a graph_cache= that can be written.")
