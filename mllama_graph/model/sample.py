"""Sampling of ids from logits. The noise is an input, not random state, so that a sample depends only on its own row.

    B rows   V ids of this rank   k candidates   N candidates of all ranks

Each rank has the logits of its part of the vocabulary. The ranks exchange their largest logits, and all continue with
the same candidates. Only sampling from the whole distribution (no top_k) needs all logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


def own_ids(logits_BV: Tensor, first: int, vocab: int) -> Tensor:
    """Logits in fp32, -inf in padding columns, whose ids are `vocab` or more. `first` is the id of column 0.

    In a row with a logit that is NaN or infinite, column 0 becomes NaN, in place where the logits are in fp32: the
    candidates of such a row begin with NaN on every rank, without an exchange of its own.
    """
    logits_BV = logits_BV.float()
    held = max(0, vocab - first)
    # 0 times the sum is 0 unless a summand is not finite. A sum costs a thirtieth of the search for the largest logit.
    logits_BV[:, 0] += logits_BV[:, :held].sum(-1) * 0
    if held < logits_BV.shape[-1]:
        logits_BV = logits_BV.index_fill(
            -1, torch.arange(held, logits_BV.shape[-1], device=logits_BV.device), -torch.inf
        )
    return logits_BV


def candidates(logits_BV: Tensor, k: int, first: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """The k largest logits of all ranks and their ids, (B, k) each; fewer than k if there are not as many.

    Among equal logits, the lowest id comes first; NaN counts as the largest. `logits_BV` is the result of own_ids;
    `gather` stacks over ranks.
    """
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
    """Log-sum-exp of the logits of all ranks, (B). The log-probability of an id is its logit minus this."""
    return gather(logits_BV.logsumexp(-1)).logsumexp(0)


def draw(value_Bk: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, noise_B: Tensor) -> Tensor:
    """The chosen candidate of each row, (B): inverts the cumulative distribution at `noise_B` in [0, 1).

    The candidates are sorted in descending order. temperature 0 is greedy; top_k 0 keeps all; top_p keeps the smallest
    set of candidates whose probability, after temperature and top_k, reaches it, and always the first one.
    """
    scale_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    # Relative to the largest, so that a tiny temperature drives the others to -inf, and never the largest to inf.
    ranked_Bk = (value_Bk - value_Bk[:, :1]) / scale_B1
    rank_k = torch.arange(ranked_Bk.shape[-1], device=ranked_Bk.device)
    kept_Bk = (top_k_B[:, None] == 0) | (rank_k < top_k_B[:, None])
    p_Bk = torch.where(kept_Bk, ranked_Bk, -torch.inf).softmax(dim=-1)
    before_Bk = p_Bk.cumsum(dim=-1) - p_Bk
    p_Bk = torch.where((before_Bk < top_p_B[:, None]) | (rank_k == 0), p_Bk, 0.0)
    reach_Bk = p_Bk.cumsum(dim=-1)
    target_B1 = noise_B[:, None] * reach_Bk[:, -1:]
    # If rounding puts the target past the end, the last candidate with a positive probability is taken.
    rank_B = torch.minimum((reach_Bk <= target_B1).sum(-1), (p_Bk > 0).sum(-1) - 1)
    return torch.where(temperature_B > 0, rank_B, 0)
