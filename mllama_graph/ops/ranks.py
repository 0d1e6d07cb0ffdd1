"""The operations of a tensor-parallel rank: a device's own on the rank's shard, and collectives."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from mllama_graph.model.formats import DYNAMIC
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Embedding, Linear
from mllama_graph.ops.plain import PLAIN

# shared_memory: mllama_graph/native, ranks of one CPU host. distributed: torch.distributed's functional collectives.
COLLECTIVES = ("shared_memory", "distributed")
# The name under which the process group is registered; graphs hold it as a string.
GROUP = GroupName("tensor_parallel")
# The same ranks, for tensors on the host if the device is an NPU.
HOST_GROUP = GroupName("tensor_parallel_host")


def ranked(world: int, collectives: str, base: Ops = PLAIN) -> Ops:
    """The operations of one of `world` ranks: the same for all of them, so that ranks share their graphs."""
    if world == 1:
        return base
    shared = collectives == "shared_memory"
    all_reduce = _shared_all_reduce if shared else _distributed_all_reduce
    all_gather = _shared_all_gather if shared else gather_in(GROUP, world)

    def embed(ids_T: Tensor, leaf: Embedding, **padding: Tensor) -> Tensor:
        """Each rank looks up the ids whose rows it holds. The all-reduce is exact: the other ranks add zeros."""
        return all_reduce(base.embed_held(ids_T, leaf, **padding))

    def linear(x: Tensor, leaf: Linear, **padding: Tensor) -> Tensor:
        """Where each rank has a part of a row, its int8 codes need the largest value of the whole row."""
        if leaf.splits_inputs and leaf.format and leaf.format.activations == DYNAMIC:
            return base.linear(x, leaf, largest=all_gather(x.abs().amax(-1, keepdim=True)), **padding)
        return base.linear(x, leaf, **padding)

    return replace(base, embed=embed, linear=linear, all_reduce=all_reduce, all_gather=all_gather)


def _shared_all_reduce(x: Tensor) -> Tensor:
    return torch.ops.mllama_graph.all_reduce(x)


def _shared_all_gather(x: Tensor) -> Tensor:
    return torch.ops.mllama_graph.all_gather(x)


def _distributed_all_reduce(x: Tensor) -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", GROUP))


def max_in(group: GroupName) -> Callable[[Tensor], Tensor]:
    """The largest values of a registered group's ranks, elementwise."""

    def largest(x: Tensor) -> Tensor:
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "max", group))

    return largest


def gather_in(group: GroupName, world: int) -> Callable[[Tensor], Tensor]:
    """The all-gather of a registered group: x -> (world, *x.shape)."""

    def all_gather(x: Tensor) -> Tensor:
        functional = torch.ops._c10d_functional
        whole = functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), world, group))
        return whole.view(world, *x.shape)

    return all_gather
