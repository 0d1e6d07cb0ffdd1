"""Supervises the processes of a run. Imports no torch.

The supervisor gives each rank its place, forwards an interrupt to rank 0, and ends all ranks when one fails; the error
of that rank becomes the run's error. Under torchrun the processes exist already and join instead (launch.py).
"""

import os
import signal
import sys
import time

from mllama_graph import native
from mllama_graph.core.errors import Interrupted
from mllama_graph.core.machine import raise_interrupt
from mllama_graph.core.place import Place
from mllama_graph.launch.environment import thread_waits
from mllama_graph.launch.processes import (
    END_SECONDS,
    TELL_SECONDS,
    Assignment,
    Meeting,
    RankProcess,
    collect,
    failure_of,
    spawn,
    spawn_workers,
)
from mllama_graph.plan.resolve import ResolvedRun, ResolvedTask


class Supervisor:
    """The processes of one run with `ranks` ranks. Rank 0 runs the task's function `entry`."""

    def __init__(self, run: ResolvedTask, entry: str, ranks: int):
        self._segment = run.segment if isinstance(run, ResolvedRun) else None
        self._end_seconds, self._at_once = run.options.end_seconds, run.options.ENDS_AT_ONCE
        self._interactive = run.options.INTERACTIVE
        # A copy: the child's own stdin brings its assignment.
        stdin = os.dup(0) if self._interactive and sys.stdin is not None else None
        given = Assignment(os.getpid(), run.output_dir, run, entry, stdin)
        if ranks == 1:
            self._ranks = [spawn(Place(), {}, given)]
            return
        (run.output_dir / "ranks").mkdir(parents=True, exist_ok=True)
        places = [Place(rank, ranks, rank, ranks) for rank in range(ranks)]
        meeting = Meeting.on_this_host()
        if meeting.note:
            print(meeting.note, file=sys.stderr)
        variables = meeting.rendezvous.environment() | places[0].environment()
        self._ranks = [spawn(places[0], variables, given, [meeting.descriptor])]
        meeting.close()
        self._ranks += spawn_workers(places[1:], meeting, run.output_dir, thread_waits(run))

    def watch(self) -> None:
        """Wait until rank 0 has ended or any rank has failed.

        Raises the error of the rank that failed: UserError, Interrupted or RankFailed.
        """
        previous, interrupted = signal.signal(signal.SIGTERM, raise_interrupt), False
        deadline = None
        if self._interactive:
            # The terminal sends Ctrl-C to rank 0, too, which decides what it ends.
            signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            while not self._over() and (deadline is None or time.monotonic() < deadline):
                try:
                    collect(self._ranks, 0.5 if deadline else None)
                except KeyboardInterrupt:
                    if interrupted:
                        if self._at_once:
                            self._ranks[0].kill()
                        break
                    interrupted, deadline = True, time.monotonic() + self._end_seconds
                    self._ranks[0].process.terminate()
            # Determined here, since ranks that `_end` kills have not failed.
            failure = failure_of(self._ranks, TELL_SECONDS) if self._failed() else None
            said = self._ranks[0].failure
        finally:
            signal.signal(signal.SIGTERM, previous)
            self._end()
        if interrupted and self._ranks[0].process.returncode:
            # The interrupt may have come too early or too late for rank 0 to report it.
            raise said if isinstance(said, Interrupted) else Interrupted("interrupted.")
        if failure:
            raise failure

    def _over(self) -> bool:
        return not self._ranks[0].running or bool(self._failed())

    def _failed(self) -> list[RankProcess]:
        return [rank for rank in self._ranks if rank.failure]

    def _running(self) -> list[RankProcess]:
        return [rank for rank in self._ranks if rank.running]

    def _end(self) -> None:
        """End all processes and remove the shared memory. Rank 0 gets time to write its results; workers have none."""
        until = time.monotonic() + END_SECONDS
        driver = self._ranks[0]
        if driver.running:
            driver.process.terminate()
        while self._running() and time.monotonic() < until and not (not driver.running and driver.process.returncode):
            collect(self._ranks, max(0.0, until - time.monotonic()))
        for rank in self._running():
            rank.kill()
        if self._segment:
            native.unlink(self._segment)
