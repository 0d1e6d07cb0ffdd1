"""Where a task runs: in this process, or in processes of its own that this one watches over: one a rank.

The watching process imports no torch. It hands each rank its place, forwards an interrupt to rank 0, and ends them all
when one fails; what that one said is the run's error. Under torchrun the processes are there already: they join.
"""

import ctypes
import faulthandler
import importlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Optional

from mllama_graph import native
from mllama_graph.ascend import stubs
from mllama_graph.core.config import Interrupted, PeerGone, RankFailed, Run, UserError
from mllama_graph.core.place import Place, bind_master_port, deaf_children, place_from
from mllama_graph.plan.resolve import NPUS, preflight, refuse_what_is_not_built, settle_kernels, settle_npu
from mllama_graph.graphs.store import GraphStore, store_folder

log = logging.getLogger(__name__)

LOG_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
# After the first failure: time for the rank that is really at fault to tell, and for rank 0 to end by itself.
TELL_SECONDS, END_SECONDS = 1.0, 5.0
# After an interrupt: time for rank 0 to finish its step.
INTERRUPT_SECONDS = 20.0
# Ascend's own switches are those of MindIE's example; the last one is cuBLAS's.
DETERMINISTIC = {"LCCL_DETERMINISTIC": "1", "HCCL_DETERMINISTIC": "true", "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
                 "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# Kinds of failure that a rank reports.
FAILURES = {"user": UserError, "interrupted": Interrupted, "failed": RankFailed, "peer": RankFailed}


def launch(run: Run, fresh: bool) -> None:
    """Do the task: here, or in a process a rank where there are several or `fresh` asks for it.

    Raises UserError, Interrupted, or RankFailed with what the first failing rank said.
    """
    place = place_from(os.environ)
    settle_npu(run)
    settle_kernels(run)
    if fresh and place:
        raise UserError("a sweep can't run under torchrun: start it with python run.py -m, and it spawns its ranks itself.")
    alone = not run.task.ranks or only_shapes(run)
    if alone and place and place.world > 1:
        raise UserError(f"task={run.task.name}{' weights=meta' if run.task.ranks else ''} is done by one process. "
                        "Start it with python run.py, without torchrun.")
    if run.task.ranks:
        preflight(run, place)
    refuse_what_is_not_built(run)
    ranks = 1 if alone else run.tp
    simulated = run.device == "npu-sim" and run.task.name != "cache"
    if simulated:
        simulate(run, place)
    if place is None and (fresh or ranks > 1 or simulated):
        Supervisor(run, ranks).watch()
    else:
        run_here(run, place or Place())


def simulate(run: Run, place: Optional[Place]) -> None:
    """Have the processes that this one starts simulate an NPU: the loader reads their environment when they start.

    Raises UserError under torchrun, whose processes have started, or where the stubs of CANN can't be built.
    """
    if place:
        raise UserError("device=npu-sim can't run under torchrun: start it with python run.py, which starts the ranks.")
    print("no NPU here: every graph is executed on the CPU by an interpreter, slowly", file=sys.stderr)
    try:
        os.environ |= stubs.environment(GraphStore(store_folder(run)).written)
    except native.BuildError as error:
        raise UserError(str(error)) from error


def only_shapes(run: Run) -> bool:
    """Whether a task that needs the model gets its shapes alone: then one process traces every rank's graphs."""
    return run.task.ranks and run.weights == "meta"


def run_here(run: Run, place: Place) -> None:
    """Do the task in this process, as rank 0.

    Raises UserError, or Interrupted when it is stopped by a signal.
    """
    prepare_environment(run, place)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        importlib.import_module(f"mllama_graph.tasks.{'trace' if only_shapes(run) else run.task.name}").main(run)
    except KeyboardInterrupt as error:
        finished = Path(run.output_dir) / "results.jsonl"
        raise Interrupted(f"interrupted; finished requests are in {finished}." if finished.exists() else "interrupted.") from error


def prepare_environment(run: Optional[Run], place: Place) -> None:
    """What must stand before torch is imported. A rank that torchrun has started learns of its run later."""
    if run and run.threads:
        os.environ["OMP_NUM_THREADS"] = str(run.threads)
    elif place.local_world > 1 and ("OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        os.environ["OMP_NUM_THREADS"] = str(place.threads())
    # torch would import torch_npu by itself, which fails without CANN: ranks on an NPU import it where they need it.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if run and run.device in NPUS:
        for name, value in run.backend.environment.items():
            os.environ.setdefault(name, value)
    if run and run.deterministic:
        os.environ |= DETERMINISTIC


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def join(place: Place) -> int:
    """Be a rank other than 0 that torchrun has started; the exit code."""
    try:
        follow(place)
        return 0
    except Exception as error:
        log.exception("the rank ended early")
        print(f"error: rank {place.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        # Without the goodbyes of threads and libraries, which may wait for ranks that are gone.
        os._exit(1)


def follow(place: Place) -> None:
    """Be a rank other than 0 of a run that rank 0 drives."""
    prepare_environment(None, place)
    from mllama_graph.engine import executor as team

    def begun(run: Run) -> None:
        prepare_environment(run, place)
        if Path(run.output_dir).is_dir():
            _log_to(Path(run.output_dir) / "ranks" / f"{place.rank}.log")

    team.follow(place, begun)


def _log_to(path: Path) -> None:
    """Have log records and the stack of a crash written to a rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf8")
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    faulthandler.enable(file)


@dataclass
class _Rank:
    """A rank's process, and the pipe that closes when it ends."""

    rank: int
    process: subprocess.Popen
    report: IO[bytes]
    failure: Optional[Exception] = None
    by_peer: bool = False

    def ended(self) -> None:
        """Take in how it ended; called when the pipe is readable."""
        said, code = self.report.read(), self.process.wait()
        self.report.close()
        if said:
            kind, message = json.loads(said)
            self.failure = FAILURES[kind](message)
            self.by_peer = kind == "peer"
        elif code:
            self.failure = RankFailed(f"rank {self.rank} {_ending(code)}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


class Supervisor:
    """The processes of one run."""

    def __init__(self, run: Run, ranks: int):
        self.run, self.folder = run, Path(run.output_dir)
        self._many = ranks > 1
        environment, listening = dict(os.environ), None
        # The package as this process found it, installed or not.
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]))
        if self._many:
            (self.folder / "ranks").mkdir(parents=True, exist_ok=True)
            listening, line = bind_master_port()
            if line:
                print(line, file=sys.stderr)
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1]),
                            "MLLAMA_GRAPH_MASTER_FD": str(listening.fileno())}
        self._ranks = []
        for rank in range(ranks):
            place = Place(rank, ranks, rank, ranks)
            own = environment | (place.environment() if self._many else {})
            self._ranks.append(self._spawn(place, own, [listening.fileno()] if listening and rank == 0 else []))
        if listening:
            listening.close()

    def _spawn(self, place: Place, environment: dict[str, str], handed: list[int]) -> _Rank:
        readable, writable = os.pipe()
        log = open(self.folder / "ranks" / f"{place.rank}.log", "ab") if place.rank else None
        with deaf_children():
            # -P: not the package of whatever folder this was started in.
            process = subprocess.Popen([sys.executable, "-P", "-m", __name__, str(writable)], env=environment,
                                       stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writable, *handed])
        os.close(writable)
        if log:
            log.close()
        with process.stdin as given:
            given.write(pickle.dumps((self.run, os.getpid())))
        return _Rank(place.rank, process, os.fdopen(readable, "rb"))

    def watch(self) -> None:
        """Until rank 0 has ended, or any rank has failed.

        Raises what the failing rank raised: UserError, Interrupted or RankFailed.
        """
        before, interrupted = signal.signal(signal.SIGTERM, _interrupt), False
        deadline = None
        try:
            while not self._over() and (deadline is None or time.monotonic() < deadline):
                try:
                    self._collect(0.5 if deadline else None)
                except KeyboardInterrupt:
                    if interrupted:
                        break
                    interrupted, deadline = True, time.monotonic() + INTERRUPT_SECONDS
                    self._ranks[0].process.terminate()
            self._settle()
            # Those that are ended from here on have failed at nothing.
            failed, said = self._failed(), self._ranks[0].failure
        finally:
            signal.signal(signal.SIGTERM, before)
            self._end()
        if interrupted and self._ranks[0].process.returncode:
            # It may have been too early, or too late, for rank 0 to say so itself.
            raise said if isinstance(said, Interrupted) else Interrupted("interrupted.")
        if failed:
            raise min(failed, key=lambda rank: rank.by_peer).failure

    def _over(self) -> bool:
        return self._ranks[0].report.closed or bool(self._failed())

    def _failed(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.failure]

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if not rank.report.closed]

    def _collect(self, timeout: Optional[float]) -> None:
        """Wait until a rank ends or the time is over."""
        for report in wait([rank.report for rank in self._running()], timeout):
            next(rank for rank in self._ranks if rank.report is report).ended()

    def _settle(self) -> None:
        """A failure that is another rank's doing is not the one to tell: give that one a moment to show."""
        until = time.monotonic() + TELL_SECONDS
        while ((failed := self._failed()) and all(rank.by_peer for rank in failed) and self._running()
               and time.monotonic() < until):
            self._collect(until - time.monotonic())

    def _end(self) -> None:
        """Leave no process and no shared memory. Rank 0 may have something to write; the others have nothing to lose."""
        until = time.monotonic() + END_SECONDS
        driver = self._ranks[0]
        if not driver.report.closed:
            driver.process.terminate()
        while self._running() and time.monotonic() < until and not (driver.report.closed and driver.process.returncode):
            self._collect(max(0.0, until - time.monotonic()))
        for rank in self._running():
            rank.process.kill()
            rank.ended()
        for segment in Path("/dev/shm").glob(f"mllama_graph-{os.getpid()}-*"):
            native.unlink(segment.name)


def child() -> None:
    """A process of a supervisor: its run comes on stdin, its failure goes to the pipe whose number is its argument."""
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    run, parent = pickle.load(sys.stdin.buffer)
    _die_with(parent)
    place = place_from(os.environ) or Place()
    who = f"rank {place.rank}: " if place.world > 1 else ""
    where = f"ranks/{place.rank}.log" if place.world > 1 else "run.log"
    for name in dict.fromkeys((where, "run.log")) if place.rank == 0 else ():
        _log_to(Path(run.output_dir) / name)
    try:
        run_here(run, place) if place.rank == 0 else follow(place)
        return
    except UserError as error:
        kind, message = "user", str(error)
    except Interrupted as error:
        kind, message = "interrupted", str(error)
    except PeerGone as error:
        kind, message = "peer", f"{who}{error} (stack in {run.output_dir}/{where})"
    except RankFailed as error:
        kind, message = "failed", str(error)
    except Exception as error:
        kind, message = "failed", f"{who}internal error: {type(error).__name__}: {error} (stack in {run.output_dir}/{where})"
    log.exception("the rank ended early")
    os.write(report, json.dumps([kind, message]).encode())
    sys.stdout.flush()
    for compiler in multiprocessing.active_children():
        compiler.terminate()
    # Without the goodbyes of threads and libraries, which may wait for ranks that are gone.
    logging.shutdown()
    os._exit(1)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens (Linux)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    child()
