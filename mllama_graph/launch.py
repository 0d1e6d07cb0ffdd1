"""Where a task runs: in this process, or in a fresh one that starts with a clean memory and environment."""

import importlib
import multiprocessing
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from mllama_graph.config import Interrupted, Run, UserError


class ChildFailed(Exception):
    """A fresh process ended with an exit code other than 0."""

    def __init__(self, exit_code: int):
        super().__init__(f"the job's process ended with exit code {exit_code}")
        self.exit_code = exit_code


def prepare_environment(run: Run) -> None:
    """What must stand before torch is imported."""
    if run.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(run.threads)


def run_here(run: Run) -> None:
    """Do the task in this process.

    Raises UserError, or Interrupted when it is stopped by a signal.
    """
    prepare_environment(run)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        importlib.import_module(f"mllama_graph.tasks.{run.task.name}").main(run)
    except KeyboardInterrupt as error:
        finished = Path(run.output_dir) / "results.jsonl"
        raise Interrupted(f"interrupted; finished requests are in {finished}." if finished.exists() else "interrupted.") from error


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_fresh(run: Run) -> None:
    """Do the task in a process of its own.

    Raises ChildFailed where that process fails; it has then told why and written result.json. KeyboardInterrupt passes.
    """
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(run,))
    child.start()
    try:
        child.join()
    except KeyboardInterrupt:
        # The child has had the signal too, and tells what became of the job.
        child.join()
        raise
    if child.exitcode:
        _left_without_result(run, child.exitcode)
        raise ChildFailed(child.exitcode if child.exitcode > 0 else 1)


def _child(run: Run) -> None:
    """The fresh process: the same errors, the same files, an exit code instead of an exception."""
    import logging

    logging.basicConfig(filename=Path(run.output_dir) / "run.log", level=logging.INFO,
                        format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s")
    try:
        run_here(run)
    except (UserError, Interrupted) as error:
        logging.exception("the run ended early")
        _report(run, str(error))
        sys.exit(2 if isinstance(error, UserError) else 130)
    except Exception as error:
        logging.exception("internal error")
        _report(run, f"internal error: {type(error).__name__}: {error} (stack in {run.output_dir}/run.log)")
        sys.exit(1)


def _report(run: Run, message: str) -> None:
    from mllama_graph.report import write_result

    print(f"error: {message}", file=sys.stderr)
    write_result(Path(run.output_dir), asdict(run), status="error", error=message)


def _left_without_result(run: Run, exit_code: int) -> None:
    """A process that was killed can't write its own result."""
    if not (Path(run.output_dir) / "result.json").exists():
        _report(run, f"the job's process ended with exit code {exit_code}")
