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
    sparse_mode 3        causal, aligned to the lower right corner, with the fixed mask of 2048 x 2048; for several rows
                         only, since one row silently resets the mode to 0 (tiling of CANN 8.5 to 9.1, ops-transformer)
    inner_precise 0      high precision; no row is fully masked, so that no row correction (modes 2 and 3) is needed
    weights (out, in)    as in the checkpoint: npu_linear passes them to MatMul with a transpose flag, while F.linear
                         adds a Transpose of the weight to every step (converters custom/npu_linear.py, aten/t.py)
    gelu                 npu_gelu, GeluV2: the converter of F.gelu drops `approximate` and emits Gelu for both forms
                         (converters custom/npu_gelu.py, aten/gelu.py)

Lengths, block tables and masks come from the host (npu_inputs.py), gates and biases as npu_layout.py leaves them. What
layers share is traced once per layer and computed once per graph (torchair.py, share_repeats).
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

from mllama_graph.model.inputs import LayerPages, Prepared, PromptInput, TokenInput
from mllama_graph.model.ops import Ops, padded_head
from mllama_graph.model.tree import Linear
from mllama_graph.ops import npu_quantised
from mllama_graph.ops.npu_candidates import top_k
from mllama_graph.ops.ranks import GROUP, max_in, ranked

CAUSAL = 3


def widen(x: Tensor, width: int) -> Tensor:
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
        widen(k_TKH.to(dtype), width), widen(v_TKH.to(dtype), width), *pages, slot_T, cache_mode="Norm"
    )


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


def attend_prompt(
    q_TQH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pages: LayerPages,
    table_J: Tensor | None,
    past_1: Tensor,
    *,
    made: Prepared,
) -> Tensor:
    (T, K, H), mask = k_TKH.shape, made.causal_MM
    mode = CAUSAL if T > 1 else 0
    if made.table_1J is None:
        q_1TQH, k_1LKH, v_1LKH = (widen(x, padded_head(H))[None] for x in (q_TQH, k_TKH, v_TKH))
        return attention(q_1TQH, k_1LKH, v_1LKH, H, kv_heads=K, mask=mask, sparse_mode=mode)
    # The new rows have been written: they are read from their pages, behind the earlier ones. The rows that are padding
    # are left out, and their results are undefined.
    return attention(
        widen(q_TQH, pages[0].shape[-1])[None],
        pages[0],
        pages[1],
        H,
        kv_heads=K,
        mask=mask,
        sparse_mode=mode,
        block_table=made.table_1J,
        block_size=pages[0].shape[1],
        actual_seq_lengths=made.rows_1 if T > 1 else None,
        actual_seq_lengths_kv=made.keys_1,
    )


def attend_pages(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor, causal_MM: Tensor | None = None
) -> Tensor:
    """causal_MM: for several rows per sequence, the fixed mask. len_B is int64."""
    B, H, (_, P, K, width) = table_BJ.shape[0], q_TQH.shape[-1], pages[0].shape
    return attention(
        widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width),
        pages[0],
        pages[1],
        H,
        kv_heads=K,
        mask=causal_MM,
        # A single row sees its whole sequence; of several rows, only the last does.
        sparse_mode=0 if causal_MM is None else CAUSAL,
        block_table=table_BJ,
        block_size=P,
        actual_seq_lengths_kv=len_B,
    )


def attend_image(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor, *, made: Prepared
) -> Tensor:
    B, H, (_, P, K, width) = table_BJ.shape[0], q_TQH.shape[-1], pages[0].shape
    unseen_B1RL = made.unseen_B1RL
    if unseen_B1RL is None:
        assert made.entry_L is not None and made.from_T1 is not None and made.to_T1 is not None
        unseen_B1RL = ((made.entry_L < made.from_T1) | (made.entry_L >= made.to_T1))[None, None]
    return attention(
        widen(q_TQH, width).view(B, -1, q_TQH.shape[1], width),
        pages[0],
        pages[1],
        H,
        kv_heads=K,
        mask=unseen_B1RL,
        block_table=table_BJ,
        block_size=P,
        actual_seq_lengths_kv=made.image_len_B,
    )


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, pad_S: Tensor, captured: bool = False) -> Tensor:
    width = padded_head(q_SAH.shape[-1])
    q_1SAH, k_1SAH, v_1SAH = (widen(x, width)[None] for x in (q_SAH, k_SAH, v_SAH))
    unseen_SS = pad_S[:, None] & pad_S[None, :]
    return attention(
        q_1SAH, k_1SAH, v_1SAH, q_SAH.shape[-1], kv_heads=q_SAH.shape[1], mask=unseen_SS[None, None], captured=captured
    )


def gated(y_TD: Tensor, gate_1: Tensor, sees_T1: Tensor) -> Tensor:
    """gate_1 is tanh(gate): see npu_layout.py."""
    return torch.where(sees_T1, y_TD * gate_1, 0)


def add_gated(x_WE: Tensor, y_WE: Tensor, bias_E: Tensor | None, gate_1: Tensor | None) -> Tensor:
    """gate_1 is tanh(gate): see npu_layout.py."""
    if bias_E is not None:
        y_WE = y_WE + bias_E.to(x_WE.dtype)
    return x_WE + (y_WE if gate_1 is None else y_WE * gate_1)


def with_prepared(ops: Ops, given: PromptInput | TokenInput) -> Ops:
    """The operations of a step, which take what the host has prepared for it."""
    made = given.prepared
    assert made is not None, "an NPU's step takes prepared inputs (npu_inputs.py)"
    found: dict[str, Any] = {
        "attend_prompt": partial(ops.attend_prompt, made=made),
        "attend_image": partial(ops.attend_image, made=made),
        "sees_image": lambda see_T2: made.sees_T1,
    }
    if made.causal_MM is not None:
        found["attend_pages"] = partial(ops.attend_pages, causal_MM=made.causal_MM)
    row_T, held_T1 = made.row_T, made.held_T1
    if row_T is not None and held_T1 is not None:
        found["embed"] = lambda ids_T, leaf: ops.all_reduce(torch.where(held_T1, F.embedding(row_T, leaf.weight), 0))
    return replace(ops, **found)


def npu_ops(world: int, mode: str = "max-autotune", nz: bool = False) -> Ops:
    """The operations of one of `world` ranks; collectives are torch.distributed's, which map to HCCL's.

    `mode` is torchair's: max-autotune for graphs of GE, npugraph_ex for captured kernels. nz: whether weights are NZ.
    """
    ops = replace(
        ranked(world, "distributed"),
        without_padding=with_prepared,
        linear=partial(linear, nz=nz, over_ranks=max_in(GROUP) if world > 1 else None) if nz or world > 1 else linear,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rope=rope,
        swiglu=swiglu,
        gelu=gelu,
        gated=gated,
        add_gated=add_gated,
        write_pages_=write_pages_,
        attend_prompt=attend_prompt,
        attend_pages=attend_pages,
        attend_image=attend_image,
        attend_tiles=attend_tiles,
        top_k=top_k,
    )
    if mode == "max-autotune":
        return ops
    # Imports this module.
    from mllama_graph.ops.npu_captured import captured

    return captured(ops)


NPU = npu_ops(1)
