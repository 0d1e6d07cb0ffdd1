"""The operations in pure torch: the reference for other backends, and what Inductor compiles."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.core.dtypes import WIDEN_ROWS
from mllama_graph.model.codes import Codes, rounded_rows, unpack, values
from mllama_graph.model.formats import DYNAMIC, FLOAT, MOST
from mllama_graph.model.inputs import LayerPages, PromptInput, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Embedding, LayerNorm, Linear
from mllama_graph.ops.pages import as_stored, by_sequence, gather, write_pages_


def embed(ids_T: Tensor, leaf: Embedding) -> Tensor:
    """Look up rows of the embedding table: ids_T -> x_TD; those of an int8 table with their scales, in fp32."""
    x_TD = F.embedding(ids_T, leaf.weight)
    if leaf.format is None:
        return x_TD
    assert leaf.scale is not None
    return x_TD.float() * F.embedding(ids_T, leaf.scale)


def embed_held(ids_T: Tensor, leaf: Embedding) -> Tensor:
    """`embed` for a rank that holds only the rows from leaf.first on: zeros for ids of other ranks."""
    row_T = ids_T - leaf.first
    held_T = (row_T >= 0) & (row_T < leaf.weight.shape[0])
    return torch.where(held_T[:, None], embed(torch.where(held_T, row_T, 0), leaf), 0)


def linear(x: Tensor, leaf: Linear, largest: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in the dtype of x; a weight of another dtype is converted.

    largest: see `quantised_linear`.

    For a few rows this is a fused multiply and sum, one pass over the weight under Inductor. For more rows, converting
    the weight once and a GEMM are faster, although they move 10 bytes per weight instead of 2.
    """
    if leaf.format:
        return quantised_linear(x, leaf, largest)
    weight: Tensor = leaf.weight
    if weight.dtype != x.dtype:
        if x.dim() == 2 and x.shape[0] <= WIDEN_ROWS and torch.compiler.is_compiling():
            y = (x[:, None, :] * weight.to(x.dtype)).sum(-1)
            return y if leaf.bias is None else y + leaf.bias
        weight = weight.to(x.dtype)
    return F.linear(x, weight, None if leaf.bias is None else leaf.bias.to(x.dtype))


def quantised_linear(x: Tensor, leaf: Linear, largest: Tensor | None = None) -> Tensor:
    """`linear` with a quantised weight, whose values are computed first.

    largest: where a rank has a part of each row, the largest absolute value (world, ..., 1) of each rank's part.
    """
    assert leaf.format and leaf.scale is not None
    form, dtype = leaf.format, x.dtype
    codes = Codes(unpack(leaf.weight, form), leaf.scale, leaf.shift, codebook=leaf.codebook)
    if leaf.order is not None:
        x = x.index_select(-1, leaf.order)
    if form.activations == FLOAT:
        y = F.linear(x, values(codes, form).to(dtype))
    else:
        # Products of codes are whole numbers, which fp64 adds exactly.
        if form.activations == DYNAMIC:
            rounded, scale = rounded_rows(x.float(), largest)
        else:
            assert leaf.input_scale is not None and leaf.input_zero is not None
            scale = leaf.input_scale
            rounded = ((x.float() / scale).round() + leaf.input_zero).clamp(-MOST - 1, MOST) - leaf.input_zero
        if form.code == "int4":
            y = (F.linear(rounded.double(), values(codes, form).double()).float() * scale).to(dtype)
        else:
            y = (F.linear(rounded.double(), leaf.weight.double()).float() * scale * leaf.scale[:, 0]).to(dtype)
    return y if leaf.bias is None else y + leaf.bias.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32, cast to the dtype of x, then times the weight; any leading axes."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def add_rms_norm(x_TD: Tensor, y_TD: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum x + y (x alone where y is None) and its norm: (normed_TD, sum_TD)."""
    sum_TD = x_TD if y_TD is None else x_TD + y_TD
    return rms_norm(sum_TD, weight, eps), sum_TD


def layer_norm(x: Tensor, leaf: LayerNorm, eps: float) -> Tensor:
    """Layer norm over the last axis, in the dtype of x."""
    return F.layer_norm(x, (x.shape[-1],), leaf.weight.to(x.dtype), leaf.bias.to(x.dtype), eps)


def rope_angles(position_T: Tensor, inv_freq_h: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, H) in fp32 of position times frequency (radians per token), for both halves of H."""
    angle_Th = position_T.float()[:, None] * inv_freq_h
    angle_TH = torch.cat((angle_Th, angle_Th), dim=-1)
    return angle_TH.cos(), angle_TH.sin()


def rope(x_TQH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their angles, the first half of H paired with the second."""
    cos_T1H, sin_T1H = (a.to(x_TQH.dtype)[:, None, :] for a in angles)
    low, high = x_TQH.chunk(2, dim=-1)
    return x_TQH * cos_T1H + torch.cat((-high, low), dim=-1) * sin_T1H


def swiglu(h_TF: Tensor) -> Tensor:
    """silu(gate) * up: h_T2F (gate, then up) -> h_TF."""
    gate_TF, up_TF = h_TF.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def gelu(x: Tensor) -> Tensor:
    """The exact (erf) gelu, elementwise."""
    return F.gelu(x)


def sees_image(see_T2: Tensor) -> Tensor:
    """Which rows see an image, in the form that `gated` takes: sees_T1."""
    return see_T2[:, 1:] > see_T2[:, :1]


def gated(y_TD: Tensor, gate_1: Tensor, sees_T1: Tensor) -> Tensor:
    """y * tanh(gate), and zeros for a row that sees no image."""
    y_TD = y_TD * gate_1.to(y_TD.dtype).tanh()
    return torch.where(sees_T1, y_TD, 0)


def add_gated(x_WE: Tensor, y_WE: Tensor, bias_E: Tensor | None, gate_1: Tensor | None) -> Tensor:
    """The residual sum x + tanh(gate) * (y + bias); bias and gate may be None."""
    if bias_E is not None:
        y_WE = y_WE + bias_E.to(x_WE.dtype)
    return x_WE + (y_WE if gate_1 is None else y_WE * gate_1.to(y_WE.dtype).tanh())


def take_rows(x_TD: Tensor, at_B: Tensor) -> Tensor:
    """The rows x_BD with indices at_B."""
    return x_TD.index_select(0, at_B)


def normalise(
    tiles_C3hw: Tensor, real_1: Tensor | None, scale: Tensor, mean_311: Tensor, std_311: Tensor, dtype: torch.dtype
) -> Tensor:
    """(x * scale - mean) / std of uint8 pixels; padding tiles become exactly zero. real_1: None if there are none."""
    x_C3hw = (tiles_C3hw.float() * scale - mean_311) / std_311
    if real_1 is None:
        return x_C3hw.to(dtype)
    # In the dtype of real_1: the NPU's comparison takes no mixed dtypes, and its compiler adds no cast.
    real_C = torch.arange(tiles_C3hw.shape[0], dtype=real_1.dtype, device=tiles_C3hw.device) < real_1
    return torch.where(real_C[:, None, None, None], x_C3hw, 0.0).to(dtype)


def patch_embed(x_C3hw: Tensor, weight: Tensor) -> Tensor:
    """Cut tiles (C, 3, height, width in pixels) into patches and project them: -> (C, N, E), no bias."""
    patches = F.conv2d(x_C3hw, weight.to(x_C3hw.dtype), stride=weight.shape[-1])
    return patches.flatten(2).transpose(1, 2)


def _tile_rows(table: Tensor, aspect_1: Tensor, tiles: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An aspect ratio's row of an embedding table, as (tiles, rows, width)."""
    return table.index_select(0, aspect_1).view(tiles, rows, width).to(dtype)


def add_tile_embedding(x_CRE: Tensor, table: Tensor, aspect_1: Tensor, gate_1: Tensor) -> Tensor:
    """Add tanh(gate) * the tile's embedding for this aspect ratio to the rows of each tile."""
    C, _, E = x_CRE.shape
    return x_CRE + _tile_rows(table, aspect_1, C, 1, E, x_CRE.dtype) * gate_1.to(x_CRE.dtype).tanh()


def add_positions(
    x_CNE: Tensor, class_E: Tensor, position_LE: Tensor, table: Tensor, aspect_1: Tensor, gate_1: Tensor
) -> Tensor:
    """Put the class token before each tile's patches and add positions -> (C, L, E).

    Positions are (1 - tanh(gate)) * those that all tiles share + tanh(gate) * the tile's own for this aspect ratio.
    """
    (C, N, E), dtype = x_CNE.shape, x_CNE.dtype
    class_C1E = class_E.to(dtype).expand(C, 1, -1)
    x_CLE = torch.cat((class_C1E, x_CNE), dim=1)
    gate_1 = gate_1.to(dtype).tanh()
    # An NPU has no kernel for a subtraction from a number (Sxpy); the result is the same.
    return x_CLE + (-gate_1 + 1) * position_LE.to(dtype) + gate_1 * _tile_rows(table, aspect_1, C, N + 1, E, dtype)


def pad_rows(x_CLE: Tensor, real_1: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Pad each tile's rows with zeros to a multiple; returns (x_WE, pad_W), pad_W being true for padding rows.

    All rows of a padding tile are padding.
    """
    C, L, E = x_CLE.shape
    padding = -L % multiple
    x_WE = F.pad(x_CLE, (0, 0, 0, padding)).view(-1, E)
    R = L + padding
    row_W = torch.arange(C * R, dtype=real_1.dtype, device=x_WE.device)
    return x_WE, (row_W // R >= real_1) | (row_W % R >= L)


def rows_by_tile(x_WE: Tensor, tiles: int, tokens: int) -> tuple[Tensor, ...]:
    """The rows of each tile with their padding, as the only part: x_CRE."""
    return (x_WE.view(tiles, -1, x_WE.shape[-1]),)


def join_features(x_WE: Tensor, kept: list[Tensor], tiles: int, tokens: int) -> Tensor:
    """The first `tokens` rows of each tile, each followed by its kept features as (dim, layer): (S, U)."""
    parts = [x_WE]
    if kept:
        parts.append(torch.stack(kept, dim=-1).flatten(1))
    x_WU = torch.cat(parts, dim=-1)
    return x_WU.view(tiles, -1, x_WU.shape[-1])[:, :tokens].reshape(tiles * tokens, -1)


def _attend(q_BRQH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask_BRL: Tensor) -> Tensor:
    """Grouped-query attention of R rows per sequence over L keys; the heads of a group are folded into the rows."""
    B, R, Q, H = q_BRQH.shape
    K = k_BLKH.shape[2]
    group = Q // K
    q = q_BRQH.view(B, R, K, group, H).permute(0, 2, 3, 1, 4).reshape(B, K, group * R, H)
    mask = mask_BRL[:, None].repeat(1, 1, group, 1) if group > 1 else mask_BRL[:, None]
    out = F.scaled_dot_product_attention(q, k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2), attn_mask=mask)
    return out.view(B, K, group, R, H).permute(0, 3, 1, 2, 4).reshape(B * R, Q, H)


def attend_prompt(
    q_TQH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor | None,
    rows_B: Tensor,
    past_B: Tensor,
) -> Tensor:
    """Causal attention of each sequence's new rows over its pages -> (T, Q, H). See `Ops.attend_prompt`.

    Without a table, keys and values are rounded as pages hold them: a prompt in one chunk equals it in several.
    """
    row_T = torch.arange(q_TQH.shape[0], device=q_TQH.device)
    if table_BJ is None:
        mask_TL = row_T[None, :] <= row_T[:, None]
        k_LKH, v_LKH = as_stored(k_TKH, pages), as_stored(v_TKH, pages)
        return _attend(q_TQH[None], k_LKH[None], v_LKH[None], mask_TL[None])
    k_BLKH, v_BLKH = gather(pages, table_BJ, q_TQH.dtype)
    key_L = torch.arange(k_BLKH.shape[1], device=q_TQH.device)
    mask_BTL = key_L <= (past_B[:, None] + row_T)[..., None]
    if len(rows_B) == 1:
        return _attend(q_TQH[None], k_BLKH, v_BLKH, mask_BTL)
    row_BT, at_T = by_sequence(rows_B, len(row_T))
    return _attend(q_TQH[row_BT], k_BLKH, v_BLKH, mask_BTL)[at_T]


def attend_pages(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    """Attention over pages, R = T / B rows per sequence: row i sees the first len - R + 1 + i tokens -> (T, Q, H)."""
    B = table_BJ.shape[0]
    q_BRQH = q_TQH.view(B, -1, *q_TQH.shape[1:])
    R = q_BRQH.shape[1]
    k_BLKH, v_BLKH = gather(pages, table_BJ, q_TQH.dtype)
    row_R = torch.arange(R, device=q_TQH.device)
    key_L = torch.arange(k_BLKH.shape[1], device=q_TQH.device)
    mask_BRL = key_L[None, None, :] <= (len_B[:, None, None] - R + row_R[None, :, None])
    return _attend(q_BRQH, k_BLKH, v_BLKH, mask_BRL)


def attend_image(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor, rows_B: Tensor | None = None
) -> Tensor:
    """Cross-attention over image pages: row t sees the table entries see[0] .. see[1] - 1, each up to its fill.

    Returns (T, Q, H); the result of a row that sees no entry is finite but meaningless.
    """
    if rows_B is not None and len(rows_B) > 1:
        row_BT, at_T = by_sequence(rows_B, len(q_TQH))
        one = row_BT.flatten()
        return attend_image(q_TQH[one], pages, table_BJ, fill_BJ, see_T2[one])[at_T]
    B, J = table_BJ.shape
    P = pages[0].shape[1]
    q_BRQH = q_TQH.view(B, -1, *q_TQH.shape[1:])
    R = q_BRQH.shape[1]
    k_BLKH, v_BLKH = gather(pages, table_BJ, q_TQH.dtype)
    filled_BJP = torch.arange(P, device=q_TQH.device) < fill_BJ[:, :, None]
    entry_J = torch.arange(J, device=q_TQH.device)
    see_BR2 = see_T2.view(B, R, 2)
    seen_BRJ = (entry_J >= see_BR2[..., :1]) & (entry_J < see_BR2[..., 1:])
    mask_BRL = (seen_BRJ[..., None] & filled_BJP[:, None]).view(B, R, J * P)
    # The caller discards rows that see no image; seeing every key keeps their softmax finite.
    blind_BR1 = see_BR2[..., 1:] <= see_BR2[..., :1]
    return _attend(q_BRQH, k_BLKH, v_BLKH, mask_BRL | blind_BR1)


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, pad_S: Tensor, scale: float) -> Tensor:
    """Attention among the S patch rows of one image's tiles; padding doesn't see padding: -> (S, A, H)."""
    mask_SS = ~(pad_S[:, None] & pad_S[None, :])
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SAH, k_SAH, v_SAH))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS, scale=scale)[0].transpose(0, 1)


def top_k(x_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row in descending order, and their columns."""
    return x_BV.max(-1, keepdim=True) if k == 1 else x_BV.topk(k)


def _with_padding(ops: Ops, given: PromptInput | TokenInput) -> Ops:
    return ops


def _single_rank_sum(x: Tensor) -> Tensor:
    return x


def _single_rank_stack(x: Tensor) -> Tensor:
    return x[None]


PLAIN = Ops(
    without_padding=_with_padding,
    embed=embed,
    embed_held=embed_held,
    linear=linear,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    layer_norm=layer_norm,
    rope_angles=rope_angles,
    rope=rope,
    swiglu=swiglu,
    gelu=gelu,
    sees_image=sees_image,
    gated=gated,
    add_gated=add_gated,
    take_rows=take_rows,
    normalise=normalise,
    patch_embed=patch_embed,
    add_tile_embedding=add_tile_embedding,
    add_positions=add_positions,
    pad_rows=pad_rows,
    rows_by_tile=rows_by_tile,
    join_features=join_features,
    write_pages_=write_pages_,
    attend_prompt=attend_prompt,
    attend_pages=attend_pages,
    attend_image=attend_image,
    attend_tiles=attend_tiles,
    top_k=top_k,
    all_reduce=_single_rank_sum,
    all_gather=_single_rank_stack,
)
