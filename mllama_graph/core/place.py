"""Where ranks run: each rank's number, its cores, and the rendezvous port. Imports no torch.

A rank reads its place from torchrun's environment variables, whether torchrun or the supervisor (launch/) started it.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from mllama_graph.core import machine
from mllama_graph.core.errors import UserError

MASTER_PORT = 20030
PORTS = range(20000, 20051)
# Not one of torchrun's: the file descriptor of the socket that listens at MASTER_PORT.
LISTENING = "MLLAMA_GRAPH_MASTER_FD"


@dataclass(frozen=True)
class Place:
    """One rank's number among all `world` ranks, and among the `local_world` ranks of its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def one_host(self) -> bool:
        """Whether all ranks share this host."""
        return self.local_world == self.world

    def environment(self) -> dict[str, str]:
        """This place as torchrun's environment variables."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
        }

    def cores(self) -> list[int]:
        """This rank's cores: an equal share of the host's, or all of them if there are fewer cores than ranks."""
        count = len(machine.CORES) // self.local_world
        return machine.CORES[self.local_rank * count : (self.local_rank + 1) * count] or machine.CORES

    def threads(self) -> int:
        """CPU threads of this rank: an equal share of the host's cores, at least 1."""
        return max(1, len(machine.CORES) // self.local_world)


@dataclass(frozen=True)
class Rendezvous:
    """The address at which the ranks of a run find each other."""

    address: str
    port: int
    # File descriptor of the listening socket that rank 0 inherits from the process that chose the port.
    listening: int | None = None
    # Whether torchrun's agent runs the store, and how often it has restarted the ranks.
    held_by_agent: bool = False
    restarts: int = 0

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Rendezvous":
        """Read the variables that torchrun or the supervisor has set."""
        listening = environment.get(LISTENING)
        return Rendezvous(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            int(listening) if listening else None,
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )

    def environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads."""
        listening = {} if self.listening is None else {LISTENING: str(self.listening)}
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port), **listening}


def place_from(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun or the supervisor gave this process; None for a process that was started alone.

    Raises UserError if the variables are incomplete, are no numbers or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        # One process of one may have no master; and a master alone is a setting.
        given = {name: environment[name] for name in names[:2] if name in environment}
        if given and (environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")) != ("0", "1"):
            shown = " ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"{shown} without {', '.join(missing)}: this process can't find its other ranks. Set all of them, "
                "start with torchrun, or unset them."
            )
        return None
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_world = int(environment.get("LOCAL_WORLD_SIZE", world))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}.") from error
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_world} contradict "
            "each other. Start with torchrun, or unset these variables."
        )
    _port(environment["MASTER_PORT"])
    return Place(rank, world, local_rank, local_world)


def _port(given: str) -> int:
    if not given.isdigit() or not 0 < int(given) < 65536:
        raise UserError(f"MASTER_PORT={given} must be a port number, 1 to 65535 (default {MASTER_PORT}).")
    return int(given)


def bind_master_port(environment: Mapping[str, str] = os.environ) -> tuple[socket.socket, str | None]:
    """Listen at MASTER_PORT (default 20030) of this host; returns (socket, None).

    If that port is taken, the socket listens at a free port of 20000 to 20050, and the second item is a message that
    says so. Raises UserError if all of them are taken.
    """
    given = _port(environment.get("MASTER_PORT", str(MASTER_PORT)))
    for port in (given, *PORTS):
        listening = socket.socket()
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", port))
            listening.listen(128)
            return listening, None if port == given else f"port {given} is taken; the ranks meet at {port}"
        except OSError:
            listening.close()
    raise UserError(f"MASTER_PORT={given} and all of {PORTS[0]}-{PORTS[-1]} are taken. Set MASTER_PORT to a free port.")
