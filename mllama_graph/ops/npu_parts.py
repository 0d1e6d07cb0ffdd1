"""Attention of a decode step with the keys of each sequence in parts, so that more of an NPU's cores work on them.

Each part is an entry of attention of its own, with its own block table and length. Attention gives the log-sum-exp of
each entry's scores, by which the graph weighs the parts. That of an entry without keys is +inf, for invalid data
(ops-transformer, aclnnFusedInferAttentionScore.md, softmaxLse). So the host gives a part without keys of its own the
first token of the sequence to read, and adds EMPTY to its log-sum-exp.

    B sequences   S parts   J entries of a block table   W entries of a part   P tokens per page   L keys of a part
    Q query heads   H head width
"""

import torch
from torch import Tensor

from mllama_graph.model.inputs import ImageInput

# Added to a log-sum-exp, it leaves a weight of 0 in fp32. Finite, since an infinity may not be kept by every kernel.
EMPTY = -1e30


def repeated(q_B1QH: Tensor, S: int) -> Tensor:
    """The query row of each sequence for each of its parts: (B * S, 1, Q, H)."""
    B, _, Q, H = q_B1QH.shape
    # Contiguous for one sequence, too, so that its graph differs in sizes alone.
    return q_B1QH.expand(B, S, Q, H).contiguous().view(B * S, 1, Q, H)


def merged(out_BSQH: Tensor, lse_BSQ1: Tensor, empty_BS11: Tensor) -> Tensor:
    """Attention to all parts, (B, Q, H): their results weighed by their shares of the sum of exponentials, in fp32."""
    weight_BSQ1 = (lse_BSQ1 + empty_BS11).softmax(1)
    return (out_BSQH.float() * weight_BSQ1).sum(1).to(out_BSQH.dtype)


def text_parts(table_BJ: Tensor, len_B: Tensor, S: int, P: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block table (B * S, W), lengths (B * S, int64) and empty_BS11 of parts whose pages differ by at most one."""
    table_BSW, first_BS, count_BS, _ = _parts(table_BJ, -(-len_B // P), S)
    len_BS = torch.minimum(len_B[:, None] - first_BS * P, count_BS * P).clamp(min=1)
    return table_BSW.flatten(0, 1), len_BS.flatten(), _empty(count_BS)


def image_parts(image: ImageInput, S: int, P: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Block table (B * S, W), lengths (B * S, int64), empty_BS11 and mask (B * S, 1, 1, L) of the parts.

    Parts list only the entries that the row sees, so that no part is wholly masked. A row that sees no image, whose
    result is discarded, reads one page, whatever it holds.
    """
    (B, J), see_B2 = image.fill_BJ.shape, image.see_T2
    entry_J = torch.arange(J)
    seen_BJ = (image.fill_BJ > 0) & (entry_J >= see_B2[:, :1]) & (entry_J < see_B2[:, 1:])
    order_BJ = (~seen_BJ).to(torch.int8).argsort(dim=1, stable=True)
    pages_B = seen_BJ.sum(-1)
    fill_BJ = torch.where(pages_B[:, None] > 0, image.fill_BJ, P).gather(1, order_BJ)
    table_BSW, _, count_BS, index_BSW = _parts(image.table_BJ.gather(1, order_BJ), pages_B.clamp(min=1), S)
    fill_BSW = fill_BJ[:, None].expand(B, S, J).gather(2, index_BSW)
    unseen_BSWP = torch.arange(P) >= fill_BSW[..., None]
    len_BS = torch.where(count_BS > 0, count_BS * P, 1)
    return table_BSW.flatten(0, 1), len_BS.flatten(), _empty(count_BS), unseen_BSWP.view(B * S, 1, 1, -1)


def _parts(table_BJ: Tensor, pages_B: Tensor, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `pages_B` entries of block tables in parts.

    Returns the block tables of parts, the first entry and the number of entries of each, and the entry at each position
    of table_BSW: beyond a part's own, the sequence's first one.
    """
    B, J = table_BJ.shape
    part_S, share_B1, extra_B1 = torch.arange(S), (pages_B // S)[:, None], (pages_B % S)[:, None]
    count_BS = share_B1 + (part_S < extra_B1)
    first_BS = share_B1 * part_S + torch.minimum(part_S, extra_B1)
    place_W = torch.arange(-(-J // S))
    index_BSW = torch.where(place_W < count_BS[..., None], first_BS[..., None] + place_W, 0)
    return table_BJ[:, None].expand(B, S, J).gather(2, index_BSW), first_BS, count_BS, index_BSW


def _empty(count_BS: Tensor) -> Tensor:
    return torch.where(count_BS > 0, 0.0, EMPTY)[..., None, None]
