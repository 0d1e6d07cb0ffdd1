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
    sparse_mode 0        with an explicit mask, or without a mask: then every row sees its whole sequence. Without
                         pages, actual_seq_lengths_kv is optional: how many keys are read (same docs)
    sparse_mode 3        causal, aligned to the lower right corner, with the fixed mask of 2048 x 2048; for several rows
                         only, since one row silently resets the mode to 0 (tiling of CANN 8.5 to 9.1, ops-transformer)
    inner_precise 0      high precision; no row is fully masked, so that no row correction (modes 2 and 3) is needed
    weights              npu_layout.py says which of two layouts a weight has. MatMul takes (in, out) from a matrix
                         product, and (out, in) with a transpose flag from npu_linear alone: F.linear adds a Transpose
                         of the weight to every step (converters aten/mm.py, custom/npu_linear.py, aten/t.py)
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
from torch import Tensor

from mllama_graph.model.inputs import MixedInput, PromptInput, TileInput, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Linear
from mllama_graph.ops import npu_layout, npu_quantised, plain
from mllama_graph.ops.npu_attention import attend_image, attend_pages, attend_prompt, attend_tiles
from mllama_graph.ops.npu_candidates import top_k
from mllama_graph.ops.npu_pages import write_pages_, writing
from mllama_graph.ops.ranks import GROUP, max_in, ranked


def linear(x: Tensor, leaf: Linear, nz: bool = False, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """nz, over_ranks: see npu_quantised.py."""
    if leaf.format:
        return npu_quantised.linear(x, leaf, nz, over_ranks)
    # The weight has the dtype of x: MatMul accepts no other (IR MatMul).
    rows_TI = x.flatten(0, -2)
    if npu_layout.inputs_first(leaf, nz):
        y = rows_TI @ leaf.weight
    else:
        y = torch_npu.npu_linear(rows_TI, leaf.weight, leaf.bias)
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


def pad_rows(x_CLE: Tensor, real: int, multiple: int) -> tuple[Tensor, int]:
    """`pad_rows` for a fixed number of real tiles: the tokens of all tiles, then the rows that pad each tile.

    So the rows that are not padding come first, and their number stands for pad_W.
    """
    C, L, E = x_CLE.shape
    return F.pad(x_CLE.reshape(C * L, E), (0, 0, 0, C * (-L % multiple))), real * L


def rows_by_tile(x_WE: Tensor, tiles: int, tokens: int) -> tuple[Tensor, ...]:
    """The tokens of each tile, and the rows that pad it, if there are some."""
    W, E = x_WE.shape
    parts = [size for size in (tiles * tokens, W - tiles * tokens) if size]
    return tuple(part.view(tiles, -1, E) for part in x_WE.split(parts))


def join_features(x_WE: Tensor, kept: list[Tensor], tiles: int, tokens: int) -> Tensor:
    # The tokens of all tiles come first, as those of a single tile.
    return plain.join_features(x_WE, kept, 1, tiles * tokens)


def gated(y_TD: Tensor, gate_1: Tensor, sees_T1: Tensor) -> Tensor:
    """gate_1 is tanh(gate): see npu_layout.py."""
    return torch.where(sees_T1, y_TD * gate_1, 0)


def add_gated(x_WE: Tensor, y_WE: Tensor, bias_E: Tensor | None, gate_1: Tensor | None) -> Tensor:
    """gate_1 is tanh(gate): see npu_layout.py."""
    if bias_E is not None:
        y_WE = y_WE + bias_E.to(x_WE.dtype)
    return x_WE + (y_WE if gate_1 is None else y_WE * gate_1)


def with_prepared(ops: Ops, given: PromptInput | TokenInput | MixedInput | TileInput) -> Ops:
    """The operations of a step, or of a part of a mixed step, which take what the host has prepared for it."""
    made = given.prepared
    assert made is not None, "an NPU's step takes prepared inputs (npu_inputs.py)"
    ops = writing(ops, made)
    if isinstance(given, TileInput):
        return ops
    found: dict[str, Any] = {
        "attend_prompt": partial(ops.attend_prompt, made=made),
        "attend_image": partial(ops.attend_image, made=made),
        "sees_image": lambda see_T2: made.sees_T1,
    }
    own = {"causal_MM": made.causal_MM, "ends_B": made.ends_B, "empty_BS11": made.empty_BS11}
    if own := {name: value for name, value in own.items() if value is not None}:
        found["attend_pages"] = partial(ops.attend_pages, **own)
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
        pad_rows=pad_rows,
        rows_by_tile=rows_by_tile,
        join_features=join_features,
    )
    if mode == "max-autotune":
        return ops
    # Imports this module.
    from mllama_graph.ops.npu_captured import captured

    return captured(ops)


NPU = npu_ops(1)
