"""Processes that act as the ranks of one host; each test uses as many of them as it needs."""

import multiprocessing
import os
import traceback

import torch

# Seconds after which a rank without a result fails its test.
HANG_SECONDS = 120


def segment() -> str:
    """A name for shared memory that no other run uses."""
    return f"mllama_graph-{os.getpid()}-{os.urandom(4).hex()}"


class Team:
    """Processes started once, since importing torch takes seconds. `run` calls a module-level function on each rank."""

    def __init__(self, size: int):
        # Forked from a fresh process that has imported torch and done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._ranks = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((ours, process))

    def run(self, world: int, function, *arguments) -> list:
        """What function(rank, world, *arguments) returned on each rank; AssertionError where one raised or hung."""
        team = self._ranks[:world]
        for rank, (connection, _) in enumerate(team):
            connection.send((function, rank, world, arguments))
        results = []
        for rank, (connection, _) in enumerate(team):
            assert connection.poll(HANG_SECONDS), f"rank {rank} hangs"
            fault, result = connection.recv()
            assert fault is None, f"rank {rank}: {fault}"
            results.append(result)
        return results

    def close(self) -> None:
        for connection, process in self._ranks:
            connection.close()
            process.kill()


def _serve(connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((None, function(rank, world, *arguments)))
        except Exception:
            connection.send((traceback.format_exc(), None))
