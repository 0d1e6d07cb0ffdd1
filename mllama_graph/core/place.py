"""Where ranks run: their number and place, the devices, cores and port that they get. No torch, so that what is missing
is told before any rank starts.

A rank finds its place in the environment variables of torchrun, whether that or `launch` has started it.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Optional

from mllama_graph.core.config import UserError

MASTER_PORT = 20030
PORTS = range(20000, 20051)
# device -> (variable that picks devices, the files that devices are, whose names end in a number)
DEVICE_FILES = {"cuda": ("CUDA_VISIBLE_DEVICES", "nvidia"), "npu": ("ASCEND_RT_VISIBLE_DEVICES", "davinci")}
# The cores of this process before any pinning.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started inside don't hear Ctrl-C, which reaches the whole group: their parent decides what it means.

    They inherit that it is blocked. Were it ignored, one that comes meanwhile would be lost where this process has other
    threads: any of them takes it, and throws it away. Blocked in one thread, it is another's to hear or waits (signal(7)).
    """
    # Started by the first process of multiprocessing otherwise, which unblocks what it has blocked.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@dataclass(frozen=True)
class Place:
    """One rank among `world`, and among the `local_world` of its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def one_host(self) -> bool:
        """Whether all ranks share this host."""
        return self.local_world == self.world

    def environment(self) -> dict[str, str]:
        """This place as torchrun writes it."""
        return {"RANK": str(self.rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(self.local_rank),
                "LOCAL_WORLD_SIZE": str(self.local_world)}

    def cores(self) -> list[int]:
        """This rank's cores: an equal part of what the host has; all of them where there are fewer than ranks."""
        count = len(CORES) // self.local_world
        return CORES[self.local_rank * count:(self.local_rank + 1) * count] or CORES

    def threads(self) -> int:
        """CPU threads of this rank, so that the ranks of a host don't take more than it has."""
        return max(1, len(CORES) // self.local_world)


def place_from(environment: Mapping[str, str]) -> Optional[Place]:
    """The place that torchrun or `launch` gave this process; None for a process that was started alone.

    Raises UserError for variables that make no sense together.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in environment for name in names):
        return None
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_world = int(environment.get("LOCAL_WORLD_SIZE", world))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}.") from error
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise UserError(f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_world} don't fit "
                        "each other. Start with torchrun, or without these variables.")
    return Place(rank, world, local_rank, local_world)


def visible_devices(device: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The devices that a run may use, in order. Raises UserError for a variable that can't be meant."""
    variable, prefix = DEVICE_FILES[device]
    present = sorted((path.name.removeprefix(prefix) for path in Path("/dev").glob(f"{prefix}[0-9]*")), key=int)
    given = environment.get(variable)
    if given is None:
        return present
    chosen = [part.strip() for part in given.split(",") if part.strip()]
    if device == "npu" and not all(part.isdigit() for part in chosen):
        raise UserError(f"{variable}={given} must be a comma list of device numbers, such as 0,1,2,3.")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{variable}={given} names a device twice.")
    return chosen


def device_of(device: str) -> str:
    """What device=auto means here, as far as can be told without torch."""
    if device != "auto":
        return device
    if visible_devices("npu", {}) and importlib.util.find_spec("torch_npu"):
        return "npu"
    return "cuda" if visible_devices("cuda", {}) and not metadata.version("torch").endswith("+cpu") else "cpu"


def check_devices(device: str, ranks: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where `ranks` ranks of this host have fewer devices."""
    device = device_of(device)
    if device not in DEVICE_FILES:
        return
    devices, variable = visible_devices(device, environment), DEVICE_FILES[device][0]
    if len(devices) < ranks:
        seen = f"{variable}={environment[variable]}" if variable in environment else "this machine"
        raise UserError(f"tp={ranks} needs {ranks} {device} devices; {seen} shows {len(devices)}. "
                        f"Lower tp, set {variable}, or use device=cpu.")


def bind_master_port(environment: Mapping[str, str] = os.environ) -> tuple[socket.socket, Optional[str]]:
    """A listening socket on this host at MASTER_PORT (20030), or at a free port of 20000 to 20050 where that is taken,
    and then a line that says so. Raises UserError where there is none."""
    given = environment.get("MASTER_PORT", str(MASTER_PORT))
    if not given.isdigit() or not 0 < int(given) < 65536:
        raise UserError(f"MASTER_PORT={given} must be a port number, 1 to 65535 (default {MASTER_PORT}).")
    for port in (int(given), *PORTS):
        listening = socket.socket()
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", port))
            listening.listen(128)
            return listening, None if port == int(given) else f"port {given} is taken; the ranks meet at {port}"
        except OSError:
            listening.close()
    raise UserError(f"MASTER_PORT={given} and all of {PORTS[0]}-{PORTS[-1]} are taken. Set MASTER_PORT to a free port.")


def process_age() -> Optional[float]:
    """Seconds since this process started, imports included; None where the system does not tell."""
    try:
        # After the name in brackets, which may hold anything: field 22 of proc(5) is the start in ticks since the boot.
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return None
