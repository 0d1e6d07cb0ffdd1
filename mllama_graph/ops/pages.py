"""K/V pages in pure torch: how rows are written to pages, what is read from them, and which rows belong together.

    T token rows   J pages in a table   N pages   P tokens per page   K kv heads   H head width

int8 pages hold a code for each value and an fp32 scale per token and head (N, K, P): value = code x scale. Rows are
rounded to the nearest code of the largest absolute value / 127, symmetrically.
"""

import torch
from torch import Tensor

from mllama_graph.model.codes import rounded_rows
from mllama_graph.model.formats import MOST
from mllama_graph.model.inputs import LayerPages


def _codes(x_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and the scales (T, K) of rows."""
    rounded, scale_TK1 = rounded_rows(x_TKH.float())
    # Beyond MOST only where a scale is a denormal number.
    return rounded.clamp(-MOST, MOST).to(torch.int8), scale_TK1[..., 0]


def write_pages_(k_TKH: Tensor, v_TKH: Tensor, pages: LayerPages, slot_T: Tensor) -> None:
    """Write row t of K and V to slot slot_T[t], an index of tokens over all pages; slots are unique."""
    page_size = pages[0].shape[1]
    page_T, at_T = slot_T // page_size, slot_T % page_size
    if len(pages) == 2:
        for data, x in zip(pages, (k_TKH, v_TKH)):
            data.index_put_((page_T, at_T), x.to(data.dtype))
        return
    head_K = torch.arange(k_TKH.shape[1], device=slot_T.device)
    for data, scales, x in zip(pages[:2], pages[2:], (k_TKH, v_TKH)):
        codes, scale_TK = _codes(x)
        data.index_put_((page_T, at_T), codes)
        scales.index_put_((page_T[:, None], head_K, at_T[:, None]), scale_TK)


def as_stored(x_TKH: Tensor, pages: LayerPages) -> Tensor:
    """New rows of K or V, rounded as they are when they are written to pages and read from them."""
    if len(pages) == 2:
        return x_TKH.to(pages[0].dtype).to(x_TKH.dtype)
    codes, scale_TK = _codes(x_TKH)
    return (codes.float() * scale_TK[..., None]).to(x_TKH.dtype)


def gather(pages: LayerPages, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V of the pages in `table` (..., J), as (..., J * P, K, H) in `dtype`."""

    def take(data: Tensor, scales: Tensor | None) -> Tensor:
        picked = data.index_select(0, table.reshape(-1))
        if scales is not None:
            picked = picked.float() * scales.index_select(0, table.reshape(-1)).transpose(1, 2)[..., None]
        return picked.view(*table.shape[:-1], table.shape[-1] * data.shape[1], *data.shape[2:]).to(dtype)

    k_scales, v_scales = pages[2:] or (None, None)
    return take(pages[0], k_scales), take(pages[1], v_scales)


def by_sequence(rows_B: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of T packed rows, each sequence's as row_BT, and where among the B * T of these each packed row is: at_T.

    Each sequence attends by itself: a masked key of another one that is NaN would spoil it, as 0 * NaN is NaN.
    """
    row_T = torch.arange(rows, device=rows_B.device)
    end_B = rows_B.cumsum(0)
    first_B = end_B - rows_B
    row_BT = (first_B[:, None] + row_T).clamp(max=rows - 1)
    # Padding rows count as the last sequence's.
    of_T = (row_T[:, None] >= end_B).sum(-1).clamp(max=len(rows_B) - 1)
    return row_BT, of_T * rows + row_T - first_B[of_T]
