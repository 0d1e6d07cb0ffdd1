"""From logits to ids. No random state: the noise of a draw is an input, so a sample depends on nothing but its own row.

    B rows   V vocabulary   k candidates
"""

import torch
from torch import Tensor


def greedy(logits_BV: Tensor) -> Tensor:
    """The largest logit of each row, the lowest id among equals."""
    return logits_BV.float().argmax(dim=-1)


def draw(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, noise_B: Tensor) -> Tensor:
    """Samples by inverting the cumulative distribution at `noise_B` in [0, 1).

    temperature 0 is greedy; top_k 0 keeps all; top_p keeps the smallest set of candidates that reaches it, after
    temperature and top_k, the first always included.
    """
    scale_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    ranked_BV, id_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    # From the largest down, so that a tiny temperature drives the others to -inf, never the largest to inf.
    ranked_BV = (ranked_BV - ranked_BV[:, :1]) / scale_B1
    rank_V = torch.arange(ranked_BV.shape[-1], device=ranked_BV.device)
    kept_BV = (top_k_B[:, None] == 0) | (rank_V < top_k_B[:, None])
    p_BV = torch.where(kept_BV, ranked_BV, -torch.inf).softmax(dim=-1)
    before_BV = p_BV.cumsum(dim=-1) - p_BV
    p_BV = torch.where((before_BV < top_p_B[:, None]) | (rank_V == 0), p_BV, 0.0)
    reach_BV = p_BV.cumsum(dim=-1)
    target_B1 = noise_B[:, None] * reach_BV[:, -1:]
    # The last candidate of positive weight catches a target that rounding put past the end.
    rank_B = torch.minimum((reach_BV <= target_B1).sum(-1), (p_BV > 0).sum(-1) - 1)
    rank_B = torch.where(temperature_B > 0, rank_B, 0)
    return id_BV.gather(-1, rank_B[:, None])[:, 0]


def log_probabilities(logits_BV: Tensor, ids_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the raw logits, in fp32: (of the chosen ids: B; the k best ids: B, k; theirs: B, k)."""
    logp_BV = logits_BV.float().log_softmax(dim=-1)
    top_Bk, top_id_Bk = logp_BV.topk(k, dim=-1)
    return logp_BV.gather(-1, ids_B[:, None])[:, 0], top_id_Bk, top_Bk
