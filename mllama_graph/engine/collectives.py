"""Communication between ranks: through shared memory on one CPU host, elsewhere through torch.distributed."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from mllama_graph import native
from mllama_graph.core.errors import UserError
from mllama_graph.core.place import Place
from mllama_graph.ops.ranks import GROUP, HOST_GROUP


class Collectives(Protocol):
    """A rank's membership in the group of all ranks."""

    def fault(self, error: RuntimeError) -> str:
        """The message of a failed exchange if one has caused `error`, else "".

        An exception loses its message on its way through a compiled graph.
        """


class Alone:
    """The group of one rank."""

    def fault(self, error: RuntimeError) -> str:
        return ""


class SharedMemory:
    """CPU ranks of one host that share the memory segment `segment`. Joining waits up to `timeout` seconds.

    Raises UserError where the operations can't be built.
    """

    def __init__(self, place: Place, segment: str, timeout: float, folder: Path, say: Callable[[str], None]):
        load_native("collectives", folder, "collectives=distributed", say)
        native.attach(segment, place.rank, place.world, timeout)

    def fault(self, error: RuntimeError) -> str:
        return native.last_error()


class Distributed:
    """A torch.distributed group over `backend` (gloo, nccl, hccl); with `host_group`, also a gloo group on the host."""

    def __init__(self, place: Place, store: dist.Store | None, timeout: float, backend: str, host_group: bool):
        assert store is not None, "several ranks have met"
        self._timeout = timeout
        within = timedelta(seconds=timeout)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=place.rank, world_size=place.world, timeout=within
        )
        assert dist.group.WORLD is not None, "made just now"
        torch._C._distributed_c10d._register_process_group(GROUP, dist.group.WORLD)
        if host_group:
            # A separate group: in one group with both backends, torchair would use the host's communicator.
            self._host = dist.new_group(backend="gloo", timeout=within)
            torch._C._distributed_c10d._register_process_group(HOST_GROUP, self._host)

    def fault(self, error: RuntimeError) -> str:
        # gloo raises RuntimeErrors that name its source files.
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            return f"a rank did not take part in a collective: it has ended, or was silent for {self._timeout:g} s"
        return ""


def load_native(name: str, folder: Path, instead: str, say: Callable[[str], None]) -> None:
    """Load a native library's operations from the graph store's `folder`, and build them first where they are missing.

    Raises UserError where they can't be built; the message suggests `instead`, a key=value that avoids the library.
    """
    try:
        if not native.built(name, folder):
            say(f"compiling the C++ library {name!r} for this machine (only once)")
        native.load(name, folder)
    except native.BuildError as error:
        raise UserError(f"{error} Or use {instead}.") from error
