"""Attention on an NPU, to pages and to an image's tiles: torch_npu's fused operation. npu.py gives its sources.

B sequences   T token rows   R rows per sequence   J pages per sequence   S parts of a sequence's keys, or an image's
rows   Q query heads   A vision heads   K kv heads   H head width
"""

from typing import Any

import torch
import torch_npu
import torchair  # registers torchair.ops
from torch import Tensor

from mllama_graph.model.inputs import LayerPages, Prepared
from mllama_graph.model.ops import padded_head
from mllama_graph.ops.npu_pages import as_stored, read, widen
from mllama_graph.ops.npu_parts import merged, repeated

CAUSAL = 3


def attention(
    q_BRQH: Tensor,
    k: Tensor,
    v: Tensor,
    head_width: int,
    *,
    kv_heads: int,
    mask: Tensor | None,
    captured: bool = False,
    sparse_mode: int = 0,
    packed: bool = False,
    empty_BS11: Tensor | None = None,
    scale: float | None = None,
    **paged: Any,
) -> Tensor:
    """Fused attention -> (B * R, Q, head_width). k and v are (B, L, K, H), or pages (N, P, K, H) with `block_table`.

    packed: in the layout TND. empty_BS11: `paged` has an entry for each part of each sequence (npu_parts.py). scale:
    None for that of head_width.

    torchair's form of the operation takes lengths as tensors, only in graphs of GE; torch_npu's takes integers, which
    become constants of the graph (`captured`).
    """
    B, R, Q, H = q_BRQH.shape
    fused = torch_npu.npu_fused_infer_attention_score if captured else torchair.ops.npu_fused_infer_attention_score
    if empty_BS11 is not None:
        q_BRQH = repeated(q_BRQH, empty_BS11.shape[1])
    out, lse_BQR1 = fused(
        # BSH: rows keep the layout of the linear layers, and pages need no transpose.
        q_BRQH.reshape(B * R, Q, H) if packed else q_BRQH.reshape(len(q_BRQH), R, Q * H),
        k.flatten(2),
        v.flatten(2),
        num_heads=Q,
        num_key_value_heads=kv_heads,
        input_layout="TND" if packed else "BSH",
        scale=scale or head_width**-0.5,
        atten_mask=mask,
        sparse_mode=sparse_mode,
        inner_precise=0,
        softmax_lse_flag=empty_BS11 is not None,
        **paged,
    )
    if empty_BS11 is not None:
        out = merged(out.view(B, -1, Q, H), lse_BQR1.view(B, -1, Q, 1), empty_BS11)
    return out.view(B * R, Q, H)[..., :head_width]


def by_rows(x_TQH: Tensor, made: Prepared) -> Tensor:
    """The rows of each sequence (B, T, Q, H), of which the first are real.

    docs of npu_fused_infer_attention_score: layout TND, which takes packed rows, serves neither pages (block_table) nor
    tiling_schedule_optimize, which keeps a graph of lengths static. So rows are gathered into BSH, where
    actual_seq_lengths spares those that are padding.
    """
    if made.row_BT is None:
        return x_TQH[None]
    B, T = made.row_BT.shape
    return x_TQH.index_select(0, made.row_BT.view(-1)).view(B, T, *x_TQH.shape[1:])


def packed(out: Tensor, made: Prepared) -> Tensor:
    """The inverse of `by_rows`, of attention's result (B * T, Q, H)."""
    return out if made.at_T is None else out.index_select(0, made.at_T)


def attend_prompt(
    q_TQH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor | None,
    rows_B: Tensor,
    past_B: Tensor,
    *,
    made: Prepared,
) -> Tensor:
    (T, K, H), mask = k_TKH.shape, made.causal_MM
    mode, q_TQH = CAUSAL if T > 1 else 0, widen(q_TQH, pages[0].shape[-1])
    if table_BJ is None:
        k_1LKH, v_1LKH = (as_stored(x, pages)[None] for x in (k_TKH, v_TKH))
        return attention(q_TQH[None], k_1LKH, v_1LKH, H, kv_heads=K, mask=mask, sparse_mode=mode)
    # The new rows have been written: they are read from their pages, behind the earlier ones. The rows that are padding
    # are left out, and their results are undefined.
    k, v, paged = read(pages, table_BJ, T, q_TQH.dtype)
    out = attention(
        by_rows(q_TQH, made),
        k,
        v,
        H,
        kv_heads=K,
        mask=mask,
        sparse_mode=mode,
        actual_seq_lengths=made.new_B if T > 1 else None,
        actual_seq_lengths_kv=made.keys_B,
        **paged,
    )
    return packed(out, made)


def attend_pages(
    q_TQH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor,
    len_B: Tensor,
    causal_MM: Tensor | None = None,
    ends_B: Tensor | None = None,
    empty_BS11: Tensor | None = None,
) -> Tensor:
    """causal_MM: for several rows per sequence, the fixed mask. len_B is int64. ends_B, empty_BS11: see `Prepared`."""
    B, H, (*_, K, width) = len(table_BJ if empty_BS11 is None else empty_BS11), q_TQH.shape[-1], pages[0].shape
    k, v, paged = read(pages, table_BJ, len(q_TQH) // B, q_TQH.dtype)
    return attention(
        widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width),
        k,
        v,
        H,
        kv_heads=K,
        mask=causal_MM,
        # A single row sees its whole sequence; of several rows, only the last does.
        sparse_mode=0 if causal_MM is None else CAUSAL,
        packed=ends_B is not None,
        empty_BS11=empty_BS11,
        actual_seq_lengths=ends_B,
        actual_seq_lengths_kv=len_B,
        **paged,
    )


def attend_image(
    q_TQH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor,
    fill_BJ: Tensor,
    see_T2: Tensor,
    rows_B: Tensor | None = None,
    *,
    made: Prepared,
) -> Tensor:
    unseen_B1RL, empty_BS11 = made.unseen_B1RL, made.image_empty_BS11
    B, H, (*_, K, width) = len(table_BJ if empty_BS11 is None else empty_BS11), q_TQH.shape[-1], pages[0].shape
    q_TQH, several = widen(q_TQH, width), made.row_BT is not None
    k, v, paged = read(pages, table_BJ, len(q_TQH) if several else len(q_TQH) // B, q_TQH.dtype)
    if unseen_B1RL is None:
        assert made.entry_B1L is not None and made.from_BT1 is not None and made.to_BT1 is not None
        unseen_B1RL = ((made.entry_B1L < made.from_BT1) | (made.entry_B1L >= made.to_BT1))[:, None]
    out = attention(
        by_rows(q_TQH, made) if several else q_TQH.view(B, -1, q_TQH.shape[1], width),
        k,
        v,
        H,
        kv_heads=K,
        mask=unseen_B1RL,
        empty_BS11=empty_BS11,
        actual_seq_lengths=made.new_B if several else None,
        actual_seq_lengths_kv=made.image_len_B,
        **paged,
    )
    return packed(out, made)


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, real: int, scale: float) -> Tensor:
    """Two attentions without a mask: the first `real` rows see all rows, the rows of padding see the first `real`.

    Both lengths belong to the bucket, so that they may be constants of the graph.
    """
    (S, A, H), width = q_SAH.shape, padded_head(q_SAH.shape[-1])
    q_1SAH, k_1SAH, v_1SAH = (widen(x, width)[None] for x in (q_SAH, k_SAH, v_SAH))
    given: dict[str, Any] = {"kv_heads": A, "mask": None, "captured": True, "scale": scale}
    if real == S:
        return attention(q_1SAH, k_1SAH, v_1SAH, H, **given)
    real_1RAH, padding_1PAH = q_1SAH.split([real, S - real], dim=1)
    out_RAH = attention(real_1RAH, k_1SAH, v_1SAH, width, **given)
    out_PAH = attention(padding_1PAH, k_1SAH, v_1SAH, width, actual_seq_lengths_kv=[real], **given)
    return torch.cat((out_RAH, out_PAH))[..., :H]
