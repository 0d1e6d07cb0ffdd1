"""The operations on an NPU: torch_npu's fused ones where they exist, plain.py's for the rest.

No other file calls torch_npu's operations for the model. torchair traces these functions into graphs of the graph
engine (GE), with every length a tensor: a Python integer would become a constant of the graph. Sources, in the
torch_npu 2.13.0 package unless stated otherwise: "docs" is `_op_plugin_docs.py` under the operation's name, "converter"
is `dynamo/torchair`.

    page size 128        docs of npu_fused_infer_attention_score: recommended for one query row, the minimum for several
    pages (N, P, K, H)   docs of npu_scatter_pa_kv_cache, second form; read as (N, P, K * H), the only layout of the
                         same pages that queries in BSH allow (docs of npu_fused_infer_attention_score)
    head width           a multiple of 16 (same docs, 16-bit types); other widths are padded with zeros, which change no
                         score or output. Pages are allocated with the padded width, so that none is copied to pad it.
    sparse_mode 0        with an explicit mask, or without a mask: then every row sees its whole sequence
    sparse_mode 3        causal, aligned to the lower right corner, with the fixed mask of 2048 x 2048
    inner_precise 0      high precision; no row is fully masked, so that no row correction (modes 2 and 3) is needed
    weights (out, in)    as in the checkpoint: npu_linear passes them to MatMul with a transpose flag, while F.linear
                         adds a Transpose of the weight to every step (converters custom/npu_linear.py, aten/t.py)
    gelu                 npu_gelu, GeluV2: the converter of F.gelu drops `approximate` and emits Gelu for both forms
                         (converters custom/npu_gelu.py, aten/gelu.py)

Masks and casts that layers share are traced once per layer and computed once per graph (torchair.py, share_repeats).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_npu
import torchair  # registers torchair.ops
from torch import Tensor

from mllama_graph.model.inputs import LayerPages
from mllama_graph.model.ops import Ops, padded_head
from mllama_graph.model.tree import Linear
from mllama_graph.ops import npu_quantised
from mllama_graph.ops.ranks import GROUP, max_in, ranked

# docs of npu_fused_infer_attention_score: "(2048, 2048)" for sparse_mode 2, 3 and 4.
MASK_SIDE = 2048
CAUSAL = 3


def _widen(x: Tensor, width: int) -> Tensor:
    """Pad the last axis of x with zeros to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def linear(x: Tensor, leaf: Linear, nz: bool = False, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """nz, over_ranks: see npu_quantised.py."""
    if leaf.format:
        return npu_quantised.linear(x, leaf, nz, over_ranks)
    # The weight has the dtype of x: MatMul accepts no other (IR MatMul).
    y = torch_npu.npu_linear(x.flatten(0, -2), leaf.weight, leaf.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def gelu(x: Tensor) -> Tensor:
    return torch_npu.npu_gelu(x, approximate="none")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # docs: the weight has the dtype of x.
    return torch_npu.npu_rms_norm(x, weight.to(x.dtype), eps)[0]


def add_rms_norm(x_TD: Tensor, y_TD: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if y_TD is None:
        return rms_norm(x_TD, weight, eps), x_TD
    normed_TD, _, sum_TD = torch_npu.npu_add_rms_norm(x_TD, y_TD, weight.to(x_TD.dtype), eps)
    return normed_TD, sum_TD


def rope(x_TQH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    # Rows take the S axis of BSND, with cos and sin in 1S1D: B and N must be below 1000 (docs of npu_rotary_mul).
    T, _, H = x_TQH.shape
    cos_1T1H, sin_1T1H = (a.to(x_TQH.dtype).view(1, T, 1, H) for a in angles)
    return torch_npu.npu_rotary_mul(x_TQH[None], cos_1T1H, sin_1T1H).view(x_TQH.shape)


def swiglu(h_TF: Tensor) -> Tensor:
    return torch_npu.npu_swiglu(h_TF, -1)


def write_pages_(k_TKH: Tensor, v_TKH: Tensor, pages: LayerPages, slot_T: Tensor) -> None:
    # docs: all four tensors have one dtype; "Norm" is for pages in their natural order. The argument is the pages
    # themselves and not a view of them, for which the compiler would copy the whole pool.
    dtype, width = pages[0].dtype, pages[0].shape[-1]
    torch_npu.npu_scatter_pa_kv_cache(
        _widen(k_TKH.to(dtype), width), _widen(v_TKH.to(dtype), width), *pages, slot_T, cache_mode="Norm"
    )


def _attention(
    q_BRQH: Tensor,
    k: Tensor,
    v: Tensor,
    head_width: int,
    *,
    kv_heads: int,
    mask: Tensor | None,
    captured: bool,
    sparse_mode: int = 0,
    **paged: Any,
) -> Tensor:
    """Fused attention -> (B * R, Q, head_width). k and v are (B, L, K, H), or pages (N, P, K, H) with `block_table`.

    torchair's form of the operation takes lengths as tensors, only in graphs of GE; torch_npu's takes integers.
    """
    B, R, Q, H = q_BRQH.shape
    fused = torch_npu.npu_fused_infer_attention_score if captured else torchair.ops.npu_fused_infer_attention_score
    out_BRQH, _ = fused(
        # BSH: rows keep the layout of the linear layers, and pages need no transpose.
        q_BRQH.reshape(B, R, Q * H),
        k.flatten(2),
        v.flatten(2),
        num_heads=Q,
        num_key_value_heads=kv_heads,
        input_layout="BSH",
        scale=head_width**-0.5,
        atten_mask=mask,
        sparse_mode=sparse_mode,
        inner_precise=0,
        **paged,
    )
    return out_BRQH.view(B * R, Q, H)[..., :head_width]


def causal_mask(device: torch.device) -> Tensor:
    """The fixed mask of the causal modes: true above the diagonal, for the keys that a row must not see."""
    row = torch.arange(MASK_SIDE, dtype=torch.int32, device=device)
    return row[None, :] > row[:, None]


def attend_prompt(
    q_TQH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pages: LayerPages,
    table_J: Tensor | None,
    past_1: Tensor,
    captured: bool = False,
) -> Tensor:
    T, K, H = k_TKH.shape
    width = padded_head(H)
    q_1TQH, k_1LKH, v_1LKH = (_widen(x, width)[None] for x in (q_TQH, k_TKH, v_TKH))
    if table_J is None:
        return _attention(
            q_1TQH, k_1LKH, v_1LKH, H, kv_heads=K, mask=causal_mask(q_TQH.device), sparse_mode=CAUSAL, captured=captured
        )
    # Earlier tokens may end inside a page, and the new rows follow the last page: gather the pages and mask by length.
    past_k, past_v = (data.index_select(0, table_J).flatten(0, 1)[None].to(q_TQH.dtype) for data in pages)
    row_T = torch.arange(T, dtype=torch.int32, device=q_TQH.device)
    column_L = torch.arange(past_k.shape[1], dtype=torch.int32, device=q_TQH.device)
    unseen_TL = torch.cat(((column_L >= past_1).expand(T, -1), row_T[None, :] > row_T[:, None]), dim=1)
    return _attention(
        q_1TQH,
        torch.cat((past_k, k_1LKH), dim=1),
        torch.cat((past_v, v_1LKH), dim=1),
        H,
        kv_heads=K,
        mask=unseen_TL[None, None],
        captured=captured,
    )


def attend_pages(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    B, H, (_, P, K, width) = table_BJ.shape[0], q_TQH.shape[-1], pages[0].shape
    q_BRQH = _widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width)
    # A single row sees its whole sequence; of several rows, only the last does.
    causal = q_BRQH.shape[1] > 1
    return _attention(
        q_BRQH,
        pages[0],
        pages[1],
        H,
        kv_heads=K,
        mask=causal_mask(q_TQH.device) if causal else None,
        sparse_mode=CAUSAL if causal else 0,
        block_table=table_BJ,
        block_size=P,
        actual_seq_lengths_kv=len_B.long(),
        captured=False,
    )


def attend_pages_captured(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    """`attend_pages` for captured kernels, whose lengths are constants: the whole width of the block table.

    A mask computed from len_B hides the keys behind a sequence's end.
    """
    (B, J), H, (_, P, K, width) = table_BJ.shape, q_TQH.shape[-1], pages[0].shape
    q_BRQH = _widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width)
    R, device = q_BRQH.shape[1], q_TQH.device
    column_L = torch.arange(J * P, dtype=torch.int32, device=device)
    row_R = torch.arange(R, dtype=torch.int32, device=device)
    unseen_BRL = column_L > (len_B[:, None] - R + row_R)[..., None]
    return _attention(
        q_BRQH,
        pages[0],
        pages[1],
        H,
        kv_heads=K,
        mask=unseen_BRL[:, None],
        block_table=table_BJ,
        block_size=P,
        actual_seq_lengths_kv=[J * P] * B,
        captured=True,
    )


def attend_image(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor, captured: bool = False
) -> Tensor:
    (B, J), H, (_, P, K, width) = table_BJ.shape, q_TQH.shape[-1], pages[0].shape
    q_BRQH = _widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width)
    R, device = q_BRQH.shape[1], q_TQH.device
    column_P = torch.arange(P, dtype=torch.int32, device=device)
    entry_J = torch.arange(J, dtype=torch.int32, device=device)
    from_BR1, to_BR1 = see_T2.view(B, R, 2).split(1, dim=-1)
    hidden_BRJ = (entry_J < from_BR1) | (entry_J >= to_BR1)
    empty_BJP = column_P >= fill_BJ[:, :, None]
    # The caller discards rows that see no image; they see every key here, so that no row is fully masked.
    sees_BR1 = to_BR1 > from_BR1
    unseen_BRL = (hidden_BRJ[..., None] | empty_BJP[:, None]).view(B, R, J * P) & sees_BR1
    # Pages after the last used entry are not read. A sequence without images reads one page, whatever it holds.
    used_B = (fill_BJ > 0).sum(-1, dtype=torch.int32).clamp(min=1)
    return _attention(
        q_BRQH,
        pages[0],
        pages[1],
        H,
        kv_heads=K,
        mask=unseen_BRL[:, None],
        block_table=table_BJ,
        block_size=P,
        actual_seq_lengths_kv=[J * P] * B if captured else (used_B * P).long(),
        captured=captured,
    )


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, pad_S: Tensor, captured: bool = False) -> Tensor:
    width = padded_head(q_SAH.shape[-1])
    q_1SAH, k_1SAH, v_1SAH = (_widen(x, width)[None] for x in (q_SAH, k_SAH, v_SAH))
    unseen_SS = pad_S[:, None] & pad_S[None, :]
    return _attention(
        q_1SAH, k_1SAH, v_1SAH, q_SAH.shape[-1], kv_heads=q_SAH.shape[1], mask=unseen_SS[None, None], captured=captured
    )


def npu_ops(world: int, mode: str = "max-autotune", nz: bool = False) -> Ops:
    """The operations of one of `world` ranks; collectives are torch.distributed's, which map to HCCL's.

    `mode` is torchair's: max-autotune for graphs of GE, npugraph_ex for captured kernels. nz: whether weights are NZ.
    """
    ops = replace(
        ranked(world, "distributed"),
        linear=partial(linear, nz=nz, over_ranks=max_in(GROUP) if world > 1 else None) if nz or world > 1 else linear,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rope=rope,
        swiglu=swiglu,
        gelu=gelu,
        write_pages_=write_pages_,
        attend_prompt=attend_prompt,
        attend_pages=attend_pages,
        attend_image=attend_image,
        attend_tiles=attend_tiles,
    )
    if mode == "max-autotune":
        return ops
    captured = {
        name: partial(getattr(ops, name), captured=True) for name in ("attend_prompt", "attend_image", "attend_tiles")
    }
    return replace(ops, attend_pages=attend_pages_captured, **captured)


NPU = npu_ops(1)
