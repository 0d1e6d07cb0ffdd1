"""From logits to ids. No random state: the noise of a draw is an input, so a sample depends on nothing but its own row.

    B rows   V the ids of this rank   k candidates   N those that all ranks offer

A rank has the logits of its own ids. It offers its best ones, the ranks exchange them, and every rank goes on with the
same candidates. Only a draw from the whole distribution (no top_k) needs all logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


def own_ids(logits_BV: Tensor, first: int, vocab: int) -> Tensor:
    """Logits in fp32, -inf where padding stands for ids from `vocab` on. `first` is the id of column 0."""
    logits_BV = logits_BV.float()
    held = max(0, vocab - first)
    if held < logits_BV.shape[-1]:
        logits_BV = logits_BV.index_fill(
            -1, torch.arange(held, logits_BV.shape[-1], device=logits_BV.device), -torch.inf
        )
    return logits_BV


def candidates(logits_BV: Tensor, k: int, first: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """The k largest logits of all ranks (fewer where there are not so many), the lowest id first among equals, and
    their ids: (B, k) each. `logits_BV` are own_ids'; `gather` stacks over ranks."""
    value_Bk, column_Bk = _largest(logits_BV, k)
    value_BN, id_BN = (gather(x).movedim(0, 1).flatten(1) for x in (value_Bk, (column_Bk + first).int()))
    value_Bk, column_Bk = _largest(value_BN, k)
    return value_Bk, id_BN.gather(-1, column_Bk).long()


def _largest(value_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 1:
        return value_BV.max(dim=-1, keepdim=True)
    value_BV, column_BV = value_BV.sort(dim=-1, descending=True, stable=True)
    return value_BV[:, :k], column_BV[:, :k]


def total(logits_BV: Tensor, gather: Gather) -> Tensor:
    """Logarithm of the sum of all ranks' exponentials, (B): a logit less it is the id's log-probability."""
    return gather(logits_BV.logsumexp(-1)).logsumexp(0)


def draw(value_Bk: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, noise_B: Tensor) -> Tensor:
    """The chosen candidate of each row, (B): inverts the cumulative distribution at `noise_B` in [0, 1).

    temperature 0 is greedy; top_k 0 keeps all; top_p keeps the smallest set of candidates that reaches it, after
    temperature and top_k, the first always included.
    """
    scale_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    # From the largest down, so that a tiny temperature drives the others to -inf, never the largest to inf.
    ranked_Bk = (value_Bk - value_Bk[:, :1]) / scale_B1
    rank_k = torch.arange(ranked_Bk.shape[-1], device=ranked_Bk.device)
    kept_Bk = (top_k_B[:, None] == 0) | (rank_k < top_k_B[:, None])
    p_Bk = torch.where(kept_Bk, ranked_Bk, -torch.inf).softmax(dim=-1)
    before_Bk = p_Bk.cumsum(dim=-1) - p_Bk
    p_Bk = torch.where((before_Bk < top_p_B[:, None]) | (rank_k == 0), p_Bk, 0.0)
    reach_Bk = p_Bk.cumsum(dim=-1)
    target_B1 = noise_B[:, None] * reach_Bk[:, -1:]
    # The last candidate of positive weight catches a target that rounding put past the end.
    rank_B = torch.minimum((reach_Bk <= target_B1).sum(-1), (p_Bk > 0).sum(-1) - 1)
    return torch.where(temperature_B > 0, rank_B, 0)
