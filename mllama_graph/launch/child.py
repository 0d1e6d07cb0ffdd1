"""The program of a rank's process: `python -m mllama_graph.launch.child FD`.

The Assignment arrives on stdin, pickled. A failure is written to the pipe FD as JSON: [kind, message].
"""

import ctypes
import json
import logging
import os
import pickle
import signal
import sys

from mllama_graph.core.errors import Interrupted, OutputClosed, PeerGone, RankFailed, UserError
from mllama_graph.core.place import Place, Rendezvous, place_from
from mllama_graph.core.report import silence
from mllama_graph.launch.environment import log_to
from mllama_graph.launch.launch import run_here, work
from mllama_graph.launch.processes import Assignment

log = logging.getLogger(__name__)

# Linux prctl option: the signal that the kernel sends to a process when its parent ends.
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run one rank, and report its failure, if any."""
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    given: Assignment = pickle.load(sys.stdin.buffer)
    _die_with(given.parent)
    if given.stdin is not None:
        os.dup2(given.stdin, 0)
        sys.stdin = open(0, closefd=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    place = place_from(os.environ) or Place()
    who = f"rank {place.rank}: " if place.world > 1 else ""
    where = f"ranks/{place.rank}.log" if place.world > 1 else "run.log"
    for name in dict.fromkeys((where, "run.log")) if place.rank == 0 else ():
        log_to(given.output_dir / name)
    stack = f"(stack in {given.output_dir}/{where})"
    try:
        if given.task is None:
            work(place, Rendezvous.from_environment())
        else:
            run_here(given.task, given.entry, place)
        return
    except UserError as error:
        kind, message = "user", str(error)
    except Interrupted as error:
        kind, message = "interrupted", str(error)
    except OutputClosed as error:
        kind, message = "closed", str(error)
        silence()
    except PeerGone as error:
        kind, message = "peer", f"{who}{error} {stack}"
        log.info("another rank is gone", exc_info=True)
    except RankFailed as error:
        kind, message = "failed", str(error)
    except Exception as error:
        kind, message = "failed", f"{who}internal error: {type(error).__name__}: {error} {stack}"
        log.info("an internal error", exc_info=True)
    log.error("the rank ended early")
    os.write(report, json.dumps([kind, message]).encode())
    sys.stdout.flush()
    # Skips the exit handlers of threads and libraries, which may wait for ranks that are gone.
    logging.shutdown()
    os._exit(1)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    main()
