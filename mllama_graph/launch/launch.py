"""Runs a task in this process, or in one process per rank, which this process supervises."""

import gc
import logging
import os
import pkgutil
import signal
import sys
from collections.abc import Callable

from mllama_graph.core.config import TaskOptions
from mllama_graph.core.errors import Interrupted, OutputClosed, PeerGone, UserError
from mllama_graph.core.machine import raise_interrupt
from mllama_graph.core.place import Place, Rendezvous, place_from
from mllama_graph.core.report import output_closed
from mllama_graph.launch.environment import log_to, prepare_environment, simulate_npu
from mllama_graph.launch.supervisor import Supervisor
from mllama_graph.plan.resolve import ResolvedRun, ResolvedTask

log = logging.getLogger(__name__)


def launch(run: ResolvedTask, entry: str, fresh: bool) -> None:
    """Run a task: in this process, or in one process per rank if there are several ranks or `fresh` is true.

    `entry` names the task's function as "module:function". Raises UserError, Interrupted, or RankFailed with the
    message of the first rank that failed.
    """
    place = place_from(os.environ)
    if fresh and place:
        raise UserError(
            "a sweep can't run under torchrun: start it with python run.py -m, and it spawns its ranks itself."
        )
    model = run if isinstance(run, ResolvedRun) else None
    alone = model is None or model.needs != TaskOptions.RANKS or model.only_shapes
    if alone and place and place.world > 1:
        shapes = " weights=meta" if run.needs == TaskOptions.RANKS else ""
        raise UserError(
            f"task={run.task}{shapes} is done by one process. Start it with python run.py, without torchrun."
        )
    ranks = 1 if model is None or alone else model.tp
    simulated = model is not None and model.device.simulated
    if simulated and model:
        simulate_npu(model, place)
    if place is None and (fresh or ranks > 1 or simulated):
        Supervisor(run, entry, ranks).watch()
    else:
        run_here(run, entry, place or Place())


def run_here(run: ResolvedTask, entry: str, place: Place) -> None:
    """Run a task in this process, as rank 0.

    Raises UserError, Interrupted if a signal stopped it, or OutputClosed.
    """
    prepare_environment(run, place)
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        task = _imported(entry)
        task(run)
    except KeyboardInterrupt as error:
        served = isinstance(run, ResolvedRun) and run.question.requests and (run.output_dir / "results.jsonl").exists()
        finished = f"; finished requests are in {run.output_dir / 'results.jsonl'}" if served else ""
        raise Interrupted(f"interrupted{finished}.") from error
    except BrokenPipeError as error:
        if output_closed():
            raise OutputClosed("the reader of the output has ended.") from error
        raise


def _imported(entry: str) -> Callable[[ResolvedTask], None]:
    """The function that `entry` names."""
    # Importing torch creates about a million objects and no garbage. Searching them for cycles would take 0.2 s.
    gc.disable()
    try:
        return pkgutil.resolve_name(entry)
    finally:
        gc.freeze()
        gc.enable()


def join(place: Place) -> int:
    """Run a worker rank that torchrun started, and return the exit code."""
    try:
        work(place, Rendezvous.from_environment())
        return 0
    except Exception as error:
        if logging.getLogger().hasHandlers():
            # Otherwise the stack would go to the terminal.
            log.exception("the rank ended early")
        ours = isinstance(error, (UserError, PeerGone))
        what = str(error) if ours else f"internal error: {type(error).__name__}: {error}"
        print(f"error: rank {place.rank}: {what}", file=sys.stderr, flush=True)
        # Skips the exit handlers of threads and libraries, which may wait for ranks that are gone.
        os._exit(2 if isinstance(error, UserError) else 1)


def work(place: Place, rendezvous: Rendezvous) -> None:
    """Run a worker rank, which rank 0 drives."""
    prepare_environment(None, place)
    from mllama_graph.engine import executor

    def begun(run: ResolvedRun) -> None:
        prepare_environment(run, place)
        if run.output_dir.is_dir():
            log_to(run.output_dir / "ranks" / f"{place.rank}.log")

    executor.work(place, rendezvous, begun)
