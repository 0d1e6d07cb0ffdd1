"""Builds the engine of a resolved run."""

import logging
from collections.abc import Callable, Sequence

from mllama_graph.core.place import Place, Rendezvous
from mllama_graph.core.report import Progress
from mllama_graph.engine.draft import Draft
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.executor import Executor
from mllama_graph.engine.ngram import Ngram
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.speculation import Proposer, Speculation
from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.request import Sampling
from mllama_graph.model.tree import Pixels
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedRun

log = logging.getLogger(__name__)


def processor_of(run: ResolvedRun) -> Processor:
    """The processor of the run's checkpoint, with the run's defaults for requests."""
    d = run.defaults
    return Processor(
        run.checkpoint.folder if run.checkpoint else None,
        run.shape,
        d.max_new,
        d.max_input,
        run.plan.max_length,
        Sampling(d.temperature, d.top_p, d.top_k, d.seed),
    )


def pixels_of(processor: Processor) -> Pixels:
    """The pixel normalisation in the checkpoint's image processor configuration."""
    return Pixels(*processor.pixels)


def start_engine(
    run: ResolvedRun,
    processor: Processor,
    progress: Progress,
    first: Sequence[Bucket] = (),
    place: Place | None = None,
    rendezvous: Rendezvous | None = None,
    check: Callable[[], None] = lambda: None,
) -> Engine:
    """Load weights and allocate pages on all ranks; graphs are loaded on first use.

    The last four arguments are passed to Executor.
    """
    for note in (*processor.notes, *run.format_notes, *run.device_notes):
        progress.say(note)
    progress.say(f"plan: {run.plan.describe()}")
    log.info("memory of a rank: %s", run.memory.describe())
    executor = Executor(run, pixels_of(processor), progress, first, place, rendezvous, check)
    speculation: Speculation | None = None
    if run.speculate != "none":
        proposer: Proposer = Ngram()
        if run.draft:
            # A text-only draft needs nothing of its folder but weights.
            seen = run.draft if run.draft.shape.sees else run
            proposer = Draft(Executor(run.draft, pixels_of(processor_of(seen)), progress, place=Place()), progress.say)
        speculation = Speculation(proposer, run.plan, run.device.row_cost)
    return Engine(processor, Scheduler(run.plan, run.limits.batch, run.prefix_cache), executor, speculation)
