"""Attention for captured kernels (npugraph_ex), whose lengths are integers: masks hide the rest of the block table.

The masks of decode steps come from the host, and their keys may be in parts; the layout TND takes no mask, and is not
used. Prompts make their masks in the graph.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mllama_graph.model.inputs import LayerPages, Prepared, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.ops import npu
from mllama_graph.ops.npu_attention import CAUSAL, attention
from mllama_graph.ops.npu_inputs import MASK_SIDE
from mllama_graph.ops.npu_pages import as_stored, read, widen, writing
from mllama_graph.ops.pages import by_sequence


def causal_mask(device: torch.device) -> Tensor:
    row = torch.arange(MASK_SIDE, dtype=torch.int32, device=device)
    return row[None, :] > row[:, None]


def attend_prompt(
    q_TQH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor | None,
    rows_B: Tensor,
    past_B: Tensor,
) -> Tensor:
    T, K, H = k_TKH.shape
    if table_BJ is None:
        q_1TQH, mask = widen(q_TQH, pages[0].shape[-1])[None], causal_mask(q_TQH.device)
        k_1LKH, v_1LKH = (as_stored(x, pages)[None] for x in (k_TKH, v_TKH))
        return attention(q_1TQH, k_1LKH, v_1LKH, H, kv_heads=K, mask=mask, sparse_mode=CAUSAL, captured=True)
    (B, J), P = table_BJ.shape, pages[0].shape[1]
    row_T = torch.arange(T, dtype=torch.int32, device=q_TQH.device)
    column_L = torch.arange(J * P, dtype=torch.int32, device=q_TQH.device)
    unseen_BTL = column_L > (past_B[:, None] + row_T)[..., None]
    if B == 1:
        return _whole_table(q_TQH, pages, table_BJ, unseen_BTL[:, None])
    row_BT, at_T = by_sequence(rows_B, T)
    return _whole_table(q_TQH[row_BT.flatten()], pages, table_BJ, unseen_BTL[:, None])[at_T]


def attend_pages(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor | None, *, made: Prepared) -> Tensor:
    """Reads the whole width of the block table; the host's mask hides the keys behind a sequence's end."""
    return _whole_table(q_TQH, pages, table_BJ, made.unseen_keys_B1RL, made.empty_BS11)


def attend_image_tokens(
    q_TQH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor,
    fill_BJ: Tensor,
    see_T2: Tensor,
    rows_B: Tensor | None = None,
    *,
    made: Prepared,
) -> Tensor:
    """attend_image of a decode step, with the host's mask."""
    return _whole_table(q_TQH, pages, table_BJ, made.unseen_B1RL, made.image_empty_BS11)


def attend_image(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor, rows_B: Tensor | None = None
) -> Tensor:
    if rows_B is not None and len(rows_B) > 1:
        row_BT, at_T = by_sequence(rows_B, len(q_TQH))
        one = row_BT.flatten()
        return attend_image(q_TQH[one], pages, table_BJ, fill_BJ, see_T2[one])[at_T]
    (B, J), P = table_BJ.shape, pages[0].shape[1]
    R, device = len(q_TQH) // B, q_TQH.device
    column_P = torch.arange(P, dtype=torch.int32, device=device)
    entry_J = torch.arange(J, dtype=torch.int32, device=device)
    # Slices, since a split of integers has no kernel on the device's cores (ascend/kernels.py).
    see_BR2 = see_T2.view(B, R, 2)
    from_BR1, to_BR1 = see_BR2[..., :1], see_BR2[..., 1:]
    hidden_BRJ = (entry_J < from_BR1) | (entry_J >= to_BR1)
    empty_BJP = column_P >= fill_BJ[:, :, None]
    # The caller discards rows that see no image; they see every key here, so that no row is fully masked.
    unseen_BRL = (hidden_BRJ[..., None] | empty_BJP[:, None]).view(B, R, J * P) & (to_BR1 > from_BR1)
    return _whole_table(q_TQH, pages, table_BJ, unseen_BRL[:, None])


def _whole_table(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, unseen_B1RL: Tensor | None, empty_BS11: Tensor | None = None
) -> Tensor:
    (entries, J), (_, P, K, width), (T, Q, H) = table_BJ.shape, pages[0].shape, q_TQH.shape
    B = entries if empty_BS11 is None else len(empty_BS11)
    k, v, paged = read(pages, table_BJ, T // B, q_TQH.dtype)
    return attention(
        widen(q_TQH, width).view(B, T // B, Q, width),
        k,
        v,
        H,
        kv_heads=K,
        mask=unseen_B1RL,
        empty_BS11=empty_BS11,
        actual_seq_lengths_kv=[J * P] * entries,
        captured=True,
        **paged,
    )


def with_prepared(ops: Ops, given: Any) -> Ops:
    """The operations of a step, which take what the host has prepared for it: of a prompt, the places of scales."""
    made = given.prepared
    if made is None or not isinstance(given, TokenInput):
        return writing(ops, made)
    step = npu.with_prepared(ops, given._replace(prepared=made._replace(ends_B=None, empty_BS11=None)))
    pages, image = partial(ops.attend_pages, made=made), partial(attend_image_tokens, made=made)
    return replace(step, attend_pages=pages, attend_image=image)


def captured(ops: Ops) -> Ops:
    """The same operations, with attention for captured kernels."""
    return replace(
        ops,
        without_padding=with_prepared,
        attend_prompt=attend_prompt,
        attend_pages=attend_pages,
        attend_image=attend_image,
    )
