"""How a rank reaches the others: through shared memory on one CPU host, else through torch.distributed."""

from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

from mllama_graph import native
from mllama_graph.core.config import Run, UserError
from mllama_graph.ops.ranks import GROUP, HOST_GROUP
from mllama_graph.core.place import Place
from mllama_graph.plan.resolve import NPUS

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl", "npu-sim": "gloo"}


def kind_of(run: Run, device: str, place: Place) -> str:
    """One of ops.ranks.COLLECTIVES. Raises UserError where shared memory is asked for and can't serve."""
    shared = device == "cpu" and place.one_host
    if run.collectives == "shared_memory" and not shared:
        raise UserError("collectives=shared_memory serves CPU ranks of one host only. Use collectives=auto.")
    if run.collectives == "auto":
        return "shared_memory" if shared else "distributed"
    return run.collectives


class Collectives:
    """This rank's membership. Joining waits for the other ranks, at most for the run's timeout.

    Raises UserError where the shared-memory operations can't be built.
    """

    def __init__(self, kind: str, place: Place, store: Optional[dist.Store], segment: str, timeout: float, device: str,
                 folder: Path):
        self.kind = kind if place.world > 1 else "none"
        if self.kind == "shared_memory":
            load_native("collectives", folder, "collectives=distributed")
            native.attach(segment, place.rank, place.world, timeout)
        elif self.kind == "distributed":
            dist.init_process_group(BACKENDS[device], store=dist.PrefixStore("group", store), rank=place.rank,
                                    world_size=place.world, timeout=timedelta(seconds=timeout))
            torch._C._distributed_c10d._register_process_group(GROUP, dist.group.WORLD)
            if device in NPUS:
                # Logits are sampled on the host. A group of its own: in one of both kinds torchair takes the host's name.
                self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
                torch._C._distributed_c10d._register_process_group(HOST_GROUP, self._host)

    def fault(self) -> str:
        """What the last failed exchange said, or nothing: an exception that passed a compiled graph has lost it."""
        return native.last_error() if self.kind == "shared_memory" else ""


def load_native(name: str, folder: Path, instead: str) -> None:
    """A library's operations, built into the graph store's folder if they are not there.

    Raises UserError where they can't be, which names the key that does without: `instead`.
    """
    try:
        native.load(name, folder)
    except native.BuildError as error:
        raise UserError(f"{error} Or use {instead}.") from error
