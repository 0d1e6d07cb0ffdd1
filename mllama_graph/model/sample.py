"""Sampling of ids from logits. The noise is an input, not random state, so that a sample depends only on its own row.

    B rows   V ids of this rank   k candidates   W ranks   N candidates of all ranks   F = 2 k + 2

Each rank has the logits of its part of the vocabulary. The ranks exchange their largest logits, and all continue with
the same candidates. On an accelerator the graph finds and exchanges them (`best`), and the host chooses (`merged`);
elsewhere both are done from the logits (`own_ids`, `candidates`). Only a draw beyond the candidates needs all logits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mllama_graph.model.ops import Ops

Gather = Callable[[Tensor], Tensor]
# Up to this many logits are searched on a CPU by the caller's thread. torch would wake threads of its own: a busy
# neighbour delays them, and while they wait for more work without sleeping, the next step's kernels lack their cores.
ALONE = 1 << 20
# Bound on the relative error of sums of exponentials in fp32, in whichever order a device adds them.
ROUNDING = 1e-5


def own_ids(logits_BV: Tensor, first: int, vocab: int) -> Tensor:
    """Logits in fp32, -inf in padding columns, whose ids are `vocab` or more. `first` is the id of column 0.

    In a row with a logit that is NaN or infinite, column 0 becomes NaN, in place where the logits are in fp32: the
    candidates of such a row begin with NaN on every rank, without an exchange of its own.
    """
    logits_BV = logits_BV.float()
    held = max(0, vocab - first)
    # 0 times the sum is 0 unless a summand is not finite. A sum costs a thirtieth of the search for the largest logit.
    own_BV = logits_BV[:, :held]
    with np.errstate(over="ignore", invalid="ignore"):
        sum_B = torch.from_numpy(own_BV.numpy().sum(-1)) if _alone(own_BV) else own_BV.sum(-1)
    logits_BV[:, 0] += sum_B * 0
    if held < logits_BV.shape[-1]:
        logits_BV = logits_BV.index_fill(
            -1, torch.arange(held, logits_BV.shape[-1], device=logits_BV.device), -torch.inf
        )
    return logits_BV


def mask_(logits_BV: Tensor, row: int, mask: bytes, first: int) -> None:
    """Set the logits of a row to -inf, in place, where a mask does not allow the id.

    mask: a bit for each id, the lowest first, whose end means that no more ids are allowed; `first` is the id of column
    0, whose NaN, which marks a row (own_ids), stays.
    """
    size, byte = logits_BV.shape[-1], first // 8
    bits = np.unpackbits(np.frombuffer(mask[byte : -(-(first + size) // 8)], np.uint8), bitorder="little")
    bits = bits[first - 8 * byte :][:size]
    allowed = (np.pad(bits, (0, size - len(bits))) if len(bits) < size else bits).view(np.bool_)
    if not logits_BV.is_cpu:
        allowed_V = torch.from_numpy(allowed).to(logits_BV.device)
        logits_BV[row].masked_fill_(~allowed_V & ~logits_BV[row].isnan(), -torch.inf)
        return
    # By ids, of which either few are allowed or few are not: a selection from the whole row is five times slower.
    logits = logits_BV[row].numpy()
    mark = logits[0]
    if 2 * np.count_nonzero(allowed) < size:
        kept = np.flatnonzero(allowed)
        values = logits[kept]
        logits.fill(-np.inf)
        logits[kept] = values
    else:
        logits[np.flatnonzero(~allowed)] = -np.inf
    if np.isnan(mark):
        logits[0] = mark


def candidates(logits_BV: Tensor, k: int, first: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """The k largest logits of all ranks and their ids, (B, k) each; fewer than k if there are not as many.

    Among equal logits, the lowest id comes first; NaN counts as the largest. `logits_BV` is the result of own_ids;
    `gather` stacks over ranks.
    """
    value_Bk, column_Bk = _largest(logits_BV, k)
    value_BN, id_BN = (gather(x).movedim(0, 1).flatten(1) for x in (value_Bk, (column_Bk + first).int()))
    value_Bk, column_Bk = _largest(value_BN, k)
    return value_Bk, id_BN.gather(-1, column_Bk).long()


def _alone(x: Tensor) -> bool:
    """Whether numpy searches x, on this thread."""
    return x.is_cpu and x.numel() <= ALONE


def _largest(value_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 1 and _alone(value_BV):
        column_B1 = torch.from_numpy(value_BV.numpy().argmax(-1, keepdims=True))
        return value_BV.gather(-1, column_B1), column_B1
    if k == 1:
        return value_BV.max(dim=-1, keepdim=True)
    value_BV, column_BV = value_BV.sort(dim=-1, descending=True, stable=True)
    return value_BV[:, :k], column_BV[:, :k]


def total(logits_BV: Tensor, gather: Gather) -> Tensor:
    """Log-sum-exp of the logits of all ranks, (B). The log-probability of an id is its logit minus this."""
    return gather(logits_BV.logsumexp(-1)).logsumexp(0)


def draw(
    value_Bk: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, noise_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """The chosen candidate of each row, (B): inverts the cumulative distribution at `noise_B` in [0, 1).

    The candidates are sorted in descending order. temperature 0 is greedy; top_k 0 keeps all; top_p keeps the smallest
    set of candidates whose probability, after temperature and top_k, reaches it, and always the first one; of these,
    min_p keeps those at least min_p times as probable as the first.
    """
    scale_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    # Relative to the largest, so that a tiny temperature drives the others to -inf, and never the largest to inf.
    ranked_Bk = (value_Bk - value_Bk[:, :1]) / scale_B1
    rank_k = torch.arange(ranked_Bk.shape[-1], device=ranked_Bk.device)
    kept_Bk = (top_k_B[:, None] == 0) | (rank_k < top_k_B[:, None])
    p_Bk = torch.where(kept_Bk, ranked_Bk, -torch.inf).softmax(dim=-1)
    before_Bk = p_Bk.cumsum(dim=-1) - p_Bk
    kept_Bk = (before_Bk < top_p_B[:, None]) & (ranked_Bk >= min_p_B.log()[:, None])
    p_Bk = torch.where(kept_Bk | (rank_k == 0), p_Bk, 0.0)
    reach_Bk = p_Bk.cumsum(dim=-1)
    target_B1 = noise_B[:, None] * reach_Bk[:, -1:]
    # If rounding puts the target past the end, the last candidate with a positive probability is taken.
    rank_B = torch.minimum((reach_Bk <= target_B1).sum(-1), (p_Bk > 0).sum(-1) - 1)
    return torch.where(temperature_B > 0, rank_B, 0)


# ---- candidates that a graph has found


class Best(NamedTuple):
    """The k largest logits of all ranks in fp32, the lowest id first among equal ones, and their ids.

    total_B: log-sum-exp of all logits. failed_B: whether a logit of the row is NaN or infinite; then the rest of the
    row has no meaning.
    """

    value_Bk: Tensor
    id_Bk: Tensor
    total_B: Tensor
    failed_B: Tensor


def best(logits_BV: Tensor, k: int, padding_V: Tensor | None, ops: Ops) -> Tensor:
    """The largest logits of each rank, for `merged`: (W, B, F) in fp32. A part of the graph.

    F: k logits in descending order, their columns, the sum of exp(logit - largest) and the sum of all. Columns are
    exact in fp32, as they are below 2**24, so that ranks exchange one tensor. The last sum tells of a logit that is not
    finite: where NaN is put among the k is up to the device. padding_V: see TextWeights.
    """
    logits_BV = logits_BV.float()
    # Rows of padding are zeros in the head, and their logits too.
    sum_B1 = logits_BV.sum(-1, keepdim=True)
    if padding_V is not None:
        logits_BV = logits_BV + padding_V
    k = min(k, logits_BV.shape[-1])
    value_Bk, column_Bk = ops.top_k(logits_BV, k)
    mass_B1 = (logits_BV - value_Bk[:, :1]).exp().sum(-1, keepdim=True)
    return ops.all_gather(torch.cat((value_Bk, column_Bk.float(), mass_B1, sum_B1), -1))


def merged(found_WBF: Tensor, k: int, size: int, vocab: int) -> Best:
    """The k largest logits of what `best` gives, on the CPU; fewer than k if there are not as many.

    `size`: columns of a rank. Of logits that equal the k-th one of a rank, `best` may have left out any.
    """
    held = (found_WBF.shape[-1] - 2) // 2
    value_WBk, column_WBk, mass_WB1, sum_WB1 = found_WBF.split([held, held, 1, 1], -1)
    failed_B = ~(mass_WB1.isfinite() & sum_WB1.isfinite()).all(0)[:, 0]
    total_B = (value_WBk[..., :1] + mass_WB1.log()).logsumexp(0)[:, 0]
    id_WBk = column_WBk.long() + size * torch.arange(len(found_WBF))[:, None, None]
    value_BN, id_BN = (x.movedim(0, 1).flatten(1) for x in (value_WBk, id_WBk))
    value_BN = value_BN.masked_fill(id_BN >= vocab, -torch.inf)
    if k == 1:
        value_B1 = value_BN.amax(-1, keepdim=True)
        return Best(value_B1, id_BN.masked_fill(value_BN != value_B1, vocab).amin(-1, keepdim=True), total_B, failed_B)
    id_BN, order_BN = id_BN.sort(-1)
    value_BN, order_Bk = _largest(value_BN.gather(-1, order_BN), min(k, held))
    return Best(value_BN, id_BN.gather(-1, order_Bk), total_B, failed_B)


def largest(found_WBF: Tensor, size: int, vocab: int) -> Tensor:
    """The id of each row's largest logit (B, int32), as `merged` gives it, on the device of what `best` gives.

    Of a row that has failed, any id.
    """
    held = (found_WBF.shape[-1] - 2) // 2
    value_WBk, id_WBk = found_WBF[..., :held], found_WBF[..., held : 2 * held]
    if len(found_WBF) > 1:
        # Exact in fp32, as columns are.
        first_W = torch.arange(0, size * len(found_WBF), size, dtype=id_WBk.dtype, device=id_WBk.device)
        id_WBk = id_WBk + first_W[:, None, None]
    value_WBk = value_WBk.masked_fill(id_WBk >= vocab, -torch.inf)
    top_B1 = value_WBk.amax((0, 2))[:, None]
    return id_WBk.masked_fill(value_WBk != top_B1, vocab).amin((0, 2)).clamp(max=vocab - 1).int()


def draw_within(
    of: Best, vocab: int, temperature_B: Tensor, top_p_B: Tensor, noise_B: Tensor, min_p_B: Tensor
) -> tuple[Tensor, Tensor]:
    """What `draw` chooses from the whole distribution (top_k 0), where the k largest logits decide it.

    Returns the chosen candidate, (B), and whether it is decided, (B): not where the draw or the top_p set reaches
    beyond the candidates, or where the rest of the distribution is not known well enough. Temperatures are positive.

    At temperature 1 the weight r of the n logits that are left out is the total less the candidates. At temperature T
    it lies between r * exp(g * (1/T - 1)), where the last candidate is g above the first (g <= 0), and n * (r/n)**(1/T)
    (Hoelder's inequality; the smaller one where T < 1). The draw is made for both ends, and decided where they agree.
    """
    below_Bk, T_B1 = (of.value_Bk - of.value_Bk[:, :1]).double(), temperature_B.double()[:, None]
    top_p_B1, noise_B1 = top_p_B.double()[:, None], noise_B.double()[:, None]
    whole_B1 = (of.total_B - of.value_Bk[:, 0]).double().exp()[:, None]
    n = vocab - below_Bk.shape[-1]
    left_B1, ends = whole_B1 - below_Bk.exp().sum(-1, keepdim=True), [] if n > 0 else [torch.zeros_like(T_B1)]
    for margin in (-ROUNDING, ROUNDING) if n > 0 else ():
        log_B1 = (left_B1 + margin * whole_B1).clamp(min=0).log()
        ends += [(log_B1 + below_Bk[:, -1:] * (1 / T_B1 - 1)).exp(), n * ((log_B1 - math.log(n)) / T_B1).exp()]
    weight_Bk = (below_Bk / T_B1).exp()
    # In fp32, as in `draw`.
    likely_Bk = below_Bk.float() / temperature_B[:, None] >= min_p_B.log()[:, None]
    reach_Bk = weight_Bk.cumsum(-1)
    # Whether top_p or min_p ends the set, perhaps beyond the candidates; with neither, all ids are in it.
    ends_B1 = (top_p_B1 < 1) | (min_p_B[:, None] > 0)
    ranks, inside = [], []
    for rest_B1, margin in ((torch.stack(ends).amin(0), 1 - ROUNDING), (torch.stack(ends).amax(0), 1 + ROUNDING)):
        whole_B1 = (reach_Bk[:, -1:] + rest_B1) * margin
        limit_B1 = top_p_B1 * whole_B1
        kept_Bk = (reach_Bk - weight_Bk < limit_B1) & likely_Bk
        kept_Bk[:, 0] = True
        reached_B1 = torch.where(ends_B1, (weight_Bk * kept_Bk).sum(-1, keepdim=True), whole_B1)
        rank_B1 = ((reach_Bk <= noise_B1 * reached_B1 * margin) & kept_Bk).sum(-1, keepdim=True)
        # A set that ends with the last candidate might go on behind it.
        ends_inside_B1 = torch.where(
            ends_B1, (reach_Bk[:, -1:] >= limit_B1) | ~likely_Bk[:, -1:], rank_B1 < below_Bk.shape[-1]
        )
        ranks.append(torch.minimum(rank_B1, kept_Bk.sum(-1, keepdim=True) - 1)[:, 0])
        inside.append(ends_inside_B1[:, 0])
    return ranks[0], (ranks[0] == ranks[1]) & inside[0] & inside[1] & ~of.failed_B
