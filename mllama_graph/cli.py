"""The command line: composes a run with Hydra, resolves it and launches it. Every failure is reported in one line.

Imports no torch: environment variables must be set before torch is imported, and an invalid configuration is refused
without waiting for that import.
"""

import logging
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

# Errors reach main() as exceptions: the user sees one line, and run.log gets the traceback.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mllama_graph.compose import (
    COMPOSING_ERRORS,
    CONF,
    CONFIG,
    HYDRA_VERSION,
    explain,
    literal,
    refuse_odd,
    register_schemas,
)
from mllama_graph.core.config import Run, TaskOptions, check, with_task_keys
from mllama_graph.core.errors import Interrupted, OutputClosed, PeerGone, RankFailed, UserError
from mllama_graph.core.place import place_from
from mllama_graph.core.report import output_closed, silence, write_failure
from mllama_graph.launch.launch import join, launch
from mllama_graph.measure.sweep import standing, write_summary
from mllama_graph.plan.resolve import ResolvedRun, ResolvedTask, resolve

# Exit code 2: an error that the user can correct.
# 141: 128 + SIGPIPE, as a shell reports a program that this signal has ended.
EXIT_CODES: dict[type[Exception], int] = {UserError: 2, Interrupted: 130, OutputClosed: 141}

log = logging.getLogger("mllama_graph")
# Exit codes of the jobs that failed in this process.
failures: list[int] = []
# The process in which `main` runs; a launcher may run jobs in others, which don't share `failures`.
started_by: int | None = None
# The lock on the folder of a run. The system releases it when the process ends, however it ends.
LOCK = ".lock"


class JobFailed(Exception):
    """A job that a launcher runs in another process failed and has reported its error. The argument: its exit code."""


def main() -> int:
    """Run the command line and return the exit code.

    0; 2 for a user's error; 130 after an interrupt; 141 if the output was closed; else 1.
    """
    global started_by
    started_by = os.getpid()
    try:
        code = _main()
        if sys.stdout:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not output_closed():
            raise
        silence()
        return EXIT_CODES[OutputClosed]


def _main() -> int:
    try:
        place = place_from(os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if place and place.rank > 0:
        # torchrun starts every rank with the same command; only rank 0 composes the run and writes its folder.
        _raise_on_interrupt()
        return join(place)
    for argument in sys.argv[1:]:
        if not argument.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            print(f"error: {argument!r} is not valid UTF-8 text.", file=sys.stderr)
            return 2
    try:
        refuse_odd(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    register_schemas()
    # argparse accepts no overrides after an option that itself follows overrides, so -m goes first.
    given = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    sys.argv[1:] = [literal(argument) for argument in given]
    try:
        _raise_on_interrupt()
        hydra.main(version_base=HYDRA_VERSION, config_path=str(CONF), config_name=CONFIG)(job)()
    except JobFailed as error:
        return int(error.args[0])
    except KeyboardInterrupt:
        if EXIT_CODES[Interrupted] not in failures:
            print("error: interrupted.", file=sys.stderr)
        return EXIT_CODES[Interrupted]
    except COMPOSING_ERRORS as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}. The run's folder must be writable (hydra.run.dir).", file=sys.stderr)
        return 2
    return failures[0] if failures else 0


def job(config: DictConfig) -> None:
    """Run one job: a single run, or one job of a sweep, possibly in another process.

    An error ends the job, and a sweep goes on with the next one; an interrupt ends a sweep too.
    """
    state, failed_before = HydraConfig.get(), len(failures)
    folder = Path(state.runtime.output_dir)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        with lock:
            _run_job(config, state, folder)
    except Timeout:
        print(
            f"error: {folder} is in use by another run. Wait for its end, or choose another folder (hydra.run.dir=).",
            file=sys.stderr,
        )
        failures.append(EXIT_CODES[UserError])
    new = failures[failed_before:]
    if new and state.mode == RunMode.MULTIRUN:
        if new[-1] == EXIT_CODES[Interrupted]:
            raise KeyboardInterrupt
        if os.getpid() != started_by:
            raise JobFailed(new[-1])


def _run_job(config: DictConfig, state: HydraConf, folder: Path) -> None:
    sweeping = state.mode == RunMode.MULTIRUN
    run: Run = OmegaConf.to_object(config)  # type: ignore[assignment]
    run.output_dir = str(folder)
    # A result of an earlier run in the same folder must not be taken for this one's.
    (folder / "result.json").unlink(missing_ok=True)
    jobs = announce(folder.parent, state.job.num, state.overrides.task) if sweeping else 1
    try:
        run = with_task_keys(run)
        check(run)
        resolved = resolve(run, place_from(os.environ))
        # Jobs of a sweep share this process, so each job runs its ranks in new processes.
        launch(resolved, entry_of(resolved), fresh=sweeping)
    except (UserError, Interrupted, RankFailed, PeerGone) as error:
        log.exception("the run ended early")
        _fail(run, folder, str(error), EXIT_CODES.get(type(error), 1))
    except Exception as error:
        if isinstance(error, OutputClosed) or (isinstance(error, BrokenPipeError) and output_closed()):
            _end_quietly(run, folder)
            return
        log.exception("internal error")
        _fail(run, folder, f"internal error: {type(error).__name__}: {error} (stack in {folder / 'run.log'})", 1)
    finally:
        if sweeping:
            path = write_summary(folder.parent)
            if state.job.num + 1 == jobs:
                print(path, file=sys.stderr, flush=True)


def entry_of(run: ResolvedTask) -> str:
    """The function that runs the task, as "module:function"."""
    traced = isinstance(run, ResolvedRun) and run.only_shapes and run.needs == TaskOptions.RANKS
    return f"mllama_graph.{run.options.ROOM}.{'trace' if traced else run.task}:main"


def swept_in(sweep: Path) -> dict[str, int]:
    """The keys that a sweep varies, and the number of values of each."""
    noted = OmegaConf.load(sweep / "multirun.yaml").hydra
    given = {word.partition("=")[0]: word for word in noted.overrides.task}
    words = {name: f"{name}={value}" for name, value in (noted.sweeper.get("params") or {}).items()} | given
    parsed = OverridesParser.create().parse_overrides(list(words.values()))
    return {o.key_or_group: len(list(o.sweep_string_iterator())) for o in parsed if o.is_sweep_override()}


def announce(sweep: Path, number: int, overrides: list[str]) -> int:
    """Print which job of a sweep starts and the estimated remaining time. Returns the number of jobs."""
    swept, begun = swept_in(sweep), (sweep / "multirun.yaml").stat().st_mtime
    own = ", ".join(word for word in overrides if word.partition("=")[0] in swept)
    total = math.prod(swept.values())
    print(f"{standing(sweep, number, total, begun, time.time())}: {own}", file=sys.stderr, flush=True)
    return total


def _fail(run: Run, folder: Path, message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    write_failure(folder, asdict(run), message)
    failures.append(exit_code)


def _end_quietly(run: Run, folder: Path) -> None:
    """End a run whose output nobody reads any more."""
    silence()
    log.info("the reader of the output has ended")
    # The task may have written its result before its last output.
    if not (folder / "result.json").exists():
        write_failure(folder, asdict(run), "the reader of the output has ended")
    failures.append(EXIT_CODES[OutputClosed])


def _raise_on_interrupt() -> None:
    """Make Ctrl-C raise KeyboardInterrupt from now on."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
