"""Attention for captured kernels (npugraph_ex), whose lengths are integers: masks made in the graph hide the rest."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mllama_graph.model.inputs import LayerPages
from mllama_graph.model.ops import Ops, padded_head
from mllama_graph.ops.npu import CAUSAL, attend_tiles, attention, widen
from mllama_graph.ops.npu_inputs import MASK_SIDE
from mllama_graph.ops.plain import PLAIN, by_sequence


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
        q_1TQH, k_1LKH, v_1LKH = (widen(x, padded_head(H))[None] for x in (q_TQH, k_TKH, v_TKH))
        mask = causal_mask(q_TQH.device)
        return attention(q_1TQH, k_1LKH, v_1LKH, H, kv_heads=K, mask=mask, sparse_mode=CAUSAL, captured=True)
    (B, J), P = table_BJ.shape, pages[0].shape[1]
    row_T = torch.arange(T, dtype=torch.int32, device=q_TQH.device)
    column_L = torch.arange(J * P, dtype=torch.int32, device=q_TQH.device)
    unseen_BTL = column_L > (past_B[:, None] + row_T)[..., None]
    q_TQH = widen(q_TQH, pages[0].shape[-1])
    if B == 1:
        return _whole_table(q_TQH[None], pages, table_BJ, H, unseen_BTL)
    row_BT, at_T = by_sequence(rows_B, T)
    return _whole_table(q_TQH[row_BT], pages, table_BJ, H, unseen_BTL)[at_T]


def attend_pages(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    """Reads the whole width of the block table; a mask hides the keys behind a sequence's end."""
    (B, J), H, (_, P, _, width) = table_BJ.shape, q_TQH.shape[-1], pages[0].shape
    q_BRQH = widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width)
    R, device = q_BRQH.shape[1], q_TQH.device
    column_L = torch.arange(J * P, dtype=torch.int32, device=device)
    row_R = torch.arange(R, dtype=torch.int32, device=device)
    unseen_BRL = column_L > (len_B[:, None] - R + row_R)[..., None]
    return _whole_table(q_BRQH, pages, table_BJ, H, unseen_BRL)


def attend_image(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor, rows_B: Tensor | None = None
) -> Tensor:
    if rows_B is not None and len(rows_B) > 1:
        row_BT, at_T = by_sequence(rows_B, len(q_TQH))
        one = row_BT.flatten()
        return attend_image(q_TQH[one], pages, table_BJ, fill_BJ, see_T2[one])[at_T]
    (B, J), H, (_, P, _, width) = table_BJ.shape, q_TQH.shape[-1], pages[0].shape
    q_BRQH = widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width)
    R, device = q_BRQH.shape[1], q_TQH.device
    column_P = torch.arange(P, dtype=torch.int32, device=device)
    entry_J = torch.arange(J, dtype=torch.int32, device=device)
    # Slices, since a split of integers has no kernel on the device's cores (ascend/kernels.py).
    see_BR2 = see_T2.view(B, R, 2)
    from_BR1, to_BR1 = see_BR2[..., :1], see_BR2[..., 1:]
    hidden_BRJ = (entry_J < from_BR1) | (entry_J >= to_BR1)
    empty_BJP = column_P >= fill_BJ[:, :, None]
    # The caller discards rows that see no image; they see every key here, so that no row is fully masked.
    unseen_BRL = (hidden_BRJ[..., None] | empty_BJP[:, None]).view(B, R, J * P) & (to_BR1 > from_BR1)
    return _whole_table(q_BRQH, pages, table_BJ, H, unseen_BRL)


def _whole_table(q_BRQH: Tensor, pages: LayerPages, table_BJ: Tensor, head_width: int, unseen_BRL: Tensor) -> Tensor:
    (B, J), (_, P, K, _) = table_BJ.shape, pages[0].shape
    return attention(
        q_BRQH,
        pages[0],
        pages[1],
        head_width,
        kv_heads=K,
        mask=unseen_BRL[:, None],
        block_table=table_BJ,
        block_size=P,
        actual_seq_lengths_kv=[J * P] * B,
        captured=True,
    )


def captured(ops: Ops) -> Ops:
    """The same operations, with attention for captured kernels."""
    return replace(
        ops,
        without_padding=PLAIN.without_padding,
        attend_prompt=attend_prompt,
        attend_pages=attend_pages,
        attend_image=attend_image,
        attend_tiles=partial(attend_tiles, captured=True),
    )
