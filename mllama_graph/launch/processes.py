"""Starts the processes of ranks, and collects how they ended."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

from mllama_graph.core.errors import Interrupted, OutputClosed, RankFailed, UserError
from mllama_graph.core.machine import block_sigint
from mllama_graph.core.paths import PACKAGE
from mllama_graph.core.place import Place, Rendezvous, bind_master_port
from mllama_graph.plan.resolve import ResolvedTask

CHILD = "mllama_graph.launch.child"
# After the first failure: seconds for the rank at fault to report its error, and for ranks to end by themselves.
TELL_SECONDS, END_SECONDS = 1.0, 5.0
# Kinds of failure that a rank reports. "peer": caused by another rank.
FAILURES: dict[str, type[Exception]] = {
    "user": UserError,
    "interrupted": Interrupted,
    "closed": OutputClosed,
    "failed": RankFailed,
    "peer": RankFailed,
}


@dataclass(frozen=True)
class Assignment:
    """The input of a rank's process: the task and its function; no task for a worker rank.

    `stdin`: the descriptor of the user's input, for a task that reads it and gets Ctrl-C itself.
    """

    parent: int
    output_dir: Path
    task: ResolvedTask | None = None
    entry: str = ""
    stdin: int | None = None


@dataclass
class RankProcess:
    """A rank's process, and the pipe on which it reports a failure. The pipe closes when the process ends."""

    rank: int
    process: subprocess.Popen[bytes]
    report: IO[bytes]
    failure: Exception | None = None
    by_peer: bool = False

    @property
    def running(self) -> bool:
        """Whether `take_end` has not recorded the end of the process yet."""
        return not self.report.closed

    def take_end(self) -> None:
        """Record how the process ended. Called when the pipe is readable; waits for the process to end."""
        said, code = self.report.read(), self.process.wait()
        self.report.close()
        if said:
            kind, message = json.loads(said)
            self.failure, self.by_peer = FAILURES[kind](message), kind == "peer"
        elif code:
            self.failure = RankFailed(f"rank {self.rank} {_ending(code)}")

    def kill(self) -> None:
        """Kill the process and record its end."""
        self.process.kill()
        self.take_end()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


def spawn(place: Place, variables: Mapping[str, str], given: Assignment, inherited: Sequence[int] = ()) -> RankProcess:
    """Start a rank's process. `variables`: added to its environment. `inherited`: file descriptors that it inherits.

    The output of worker ranks goes to their log, in ranks/ of the run's folder.
    """
    # The child imports the same package as this process, installed or not.
    paths = filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    readable, writable = os.pipe()
    path = given.output_dir / "ranks" / f"{place.rank}.log"
    with block_sigint(), path.open("ab") if place.rank else contextlib.nullcontext() as log:
        # -P keeps the current folder off the import path, where another copy of the package may lie.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD, str(writable)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[writable, *inherited, *([] if given.stdin is None else [given.stdin])],
        )
    os.close(writable)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(pickle.dumps(given))
    return RankProcess(place.rank, process, os.fdopen(readable, "rb"))


def collect(ranks: Sequence[RankProcess], timeout: float | None) -> None:
    """Wait up to `timeout` seconds until a rank ends, and record the end of each rank that has ended."""
    ended = wait([rank.report.fileno() for rank in ranks if rank.running], timeout)
    for rank in ranks:
        if rank.running and rank.report.fileno() in ended:
            rank.take_end()


def failure_of(ranks: Sequence[RankProcess], seconds: float) -> Exception | None:
    """The failure to report, if any rank has failed.

    If all failures so far were caused by other ranks, ranks that still run have `seconds` to report the cause.
    """
    until = time.monotonic() + seconds
    while all(rank.by_peer for rank in ranks if rank.failure) and any(rank.running for rank in ranks):
        collect(ranks, max(0.0, until - time.monotonic()))
        if time.monotonic() >= until:
            break
    failed = [rank for rank in ranks if rank.failure]
    return min(failed, key=lambda rank: rank.by_peer).failure if failed else None


@dataclass
class Meeting:
    """The rendezvous of ranks that start on this host. Close it once rank 0 has its own copy of the socket."""

    rendezvous: Rendezvous
    # A line for the user if the port differs from the requested one.
    note: str | None

    @staticmethod
    def on_this_host() -> "Meeting":
        """Bind the port at which the ranks meet. Raises UserError where none is free."""
        listening, note = bind_master_port()
        port, descriptor = listening.getsockname()[1], listening.detach()
        return Meeting(Rendezvous("127.0.0.1", port, descriptor), note)

    @property
    def descriptor(self) -> int:
        """The file descriptor of the listening socket."""
        assert self.rendezvous.listening is not None
        return self.rendezvous.listening

    def close(self) -> None:
        """Close this process's copy of the socket."""
        os.close(self.descriptor)


def spawn_workers(
    places: Sequence[Place], meeting: Meeting, output_dir: Path, variables: Mapping[str, str]
) -> list[RankProcess]:
    """Start the worker ranks at `places`. `variables`: added to their environment."""
    (output_dir / "ranks").mkdir(parents=True, exist_ok=True)
    common = {**variables, **Rendezvous(meeting.rendezvous.address, meeting.rendezvous.port).environment()}
    return [spawn(place, common | place.environment(), Assignment(os.getpid(), output_dir)) for place in places]
