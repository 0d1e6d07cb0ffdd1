"""GE's collectives (HCCL), computed by torch.distributed between the processes that simulate ranks."""

import re

import torch
import torch.distributed as dist
from torch import Tensor

from mllama_graph.ascend.ge_ops.registry import operation, require, rounded


def _size_of(group: str) -> int:
    """Number of ranks in a group. Raises GraphError unless it holds all ranks of this process's default group."""
    found = re.search(r"rank_list=([\d,]+)", group)
    ranks = [int(rank) for rank in found.group(1).split(",")] if found else []
    require(dist.is_initialized(), f"group {group!r}, but this process has not joined a process group")
    require(ranks == list(range(dist.get_world_size())), f"group {group!r} is not all of {dist.get_world_size()} ranks")
    return len(ranks)


@operation("HcomAllReduce", source="IR HcomAllReduce")
def all_reduce(
    x: Tensor, *, reduction: str | None = None, group: str = "", fusion: int = 1, fusion_id: int = -1
) -> Tensor:
    require(
        reduction in ("sum", "max") and fusion_id == -1, f"reduction {reduction!r}, fusion_id {fusion_id} are not known"
    )
    _size_of(group)
    # The sum is computed in fp32 and rounded once. HCCL adds in another order and may round in between.
    total = x.float()
    total = total.clone() if total is x else total
    dist.all_reduce(total, dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MAX)
    return rounded(total, x)


@operation("HcomAllGather", source="IR HcomAllGather: along axis 0")
def all_gather(
    x: Tensor, *, rank_size: int | None = None, group: str = "", fusion: int = 0, fusion_id: int = -1
) -> Tensor:
    size = _size_of(group)
    require(size == rank_size and fusion_id == -1, f"rank_size {rank_size}, fusion_id {fusion_id} are not known")
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
