"""The operations in pure torch: the truth that other backends are held to, and what Inductor compiles."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.model.ops import Ops
from mllama_graph.core.dtypes import WIDEN_ROWS

Pages = tuple[Tensor, Tensor]


def embed(ids_T: Tensor, leaf) -> Tensor:
    """Rows of the table: ids_T -> x_TD."""
    return F.embedding(ids_T, leaf.weight)


def linear(x: Tensor, leaf) -> Tensor:
    """A weight stored narrower than it is computed in is widened.

    For a few rows that is a fused multiply and sum, one pass over the weight under Inductor; for more, widening it once
    and a GEMM are worth the 10 bytes moved a weight instead of 2.
    """
    weight = leaf.weight
    if weight.dtype != x.dtype:
        if x.dim() == 2 and x.shape[0] <= WIDEN_ROWS and torch.compiler.is_compiling():
            y = (x[:, None, :] * weight.to(x.dtype)).sum(-1)
            return y if leaf.bias is None else y + leaf.bias
        weight = weight.to(x.dtype)
    return F.linear(x, weight, None if leaf.bias is None else leaf.bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32, cast to the dtype of x, then times the weight; any leading axes."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def add_rms_norm(x_TD: Tensor, y_TD: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum x + y (x alone where y is None) and its norm: (normed_TD, sum_TD)."""
    sum_TD = x_TD if y_TD is None else x_TD + y_TD
    return rms_norm(sum_TD, weight, eps), sum_TD


def layer_norm(x: Tensor, leaf, eps: float) -> Tensor:
    """Layer norm over the last axis, in the dtype of x."""
    return F.layer_norm(x, (x.shape[-1],), leaf.weight.to(x.dtype), leaf.bias.to(x.dtype), eps)


def rope_angles(position_T: Tensor, inv_freq_h: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, H) in fp32 of position times frequency (radians a token), the half axis repeated."""
    angle_Th = position_T.float()[:, None] * inv_freq_h
    angle_TH = torch.cat((angle_Th, angle_Th), dim=-1)
    return angle_TH.cos(), angle_TH.sin()


def rope(x_TQH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys turned by their angles, the first half of H paired with the second."""
    cos_T1H, sin_T1H = (a.to(x_TQH.dtype)[:, None, :] for a in angles)
    low, high = x_TQH.chunk(2, dim=-1)
    return x_TQH * cos_T1H + torch.cat((-high, low), dim=-1) * sin_T1H


def swiglu(h_TF: Tensor) -> Tensor:
    """silu(gate) * up: h_T2F with both side by side -> h_TF."""
    gate_TF, up_TF = h_TF.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def gelu(x: Tensor) -> Tensor:
    """The exact (erf) gelu, elementwise."""
    return F.gelu(x)


def patch_embed(x_C3hw: Tensor, weight: Tensor) -> Tensor:
    """Tiles (C, 3, height, width in pixels) cut into patches and projected: -> (C, S, E), no bias."""
    patches = F.conv2d(x_C3hw, weight.to(x_C3hw.dtype), stride=weight.shape[-1])
    return patches.flatten(2).transpose(1, 2)


def write_pages_(k_TKH: Tensor, v_TKH: Tensor, pages: Pages, slot_T: Tensor) -> None:
    """Write row t of K and V to slot slot_T[t], counted in tokens over all pages; slots are unique."""
    page_size = pages[0].shape[1]
    where = (slot_T // page_size, slot_T % page_size)
    pages[0].index_put_(where, k_TKH.to(pages[0].dtype))
    pages[1].index_put_(where, v_TKH.to(pages[1].dtype))


def _gather(pages: Pages, table: Tensor) -> Pages:
    """K and V of the pages in `table` (..., J), as (..., J * P, K, H)."""

    def take(data: Tensor) -> Tensor:
        picked = data.index_select(0, table.reshape(-1))
        return picked.view(*table.shape[:-1], table.shape[-1] * data.shape[1], *data.shape[2:])

    return take(pages[0]), take(pages[1])


def _attend(q_BRQH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask_BRL: Tensor) -> Tensor:
    """Grouped-query attention of R rows a sequence over L keys; the groups are folded into the rows."""
    B, R, Q, H = q_BRQH.shape
    K = k_BLKH.shape[2]
    group = Q // K
    q = q_BRQH.view(B, R, K, group, H).permute(0, 2, 3, 1, 4).reshape(B, K, group * R, H)
    mask = mask_BRL[:, None].repeat(1, 1, group, 1) if group > 1 else mask_BRL[:, None]
    out = F.scaled_dot_product_attention(q, k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2), attn_mask=mask)
    return out.view(B, K, group, R, H).permute(0, 3, 1, 2, 4).reshape(B * R, Q, H)


def attend_prompt(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, pages: Pages, table_J: Tensor | None,
                  past_1: Tensor) -> Tensor:
    """Causal attention of T fresh rows over themselves and `past_1` tokens in the pages of table_J -> (T, Q, H)."""
    row_T = torch.arange(q_TQH.shape[0], device=q_TQH.device)
    mask_TL = row_T[None, :] <= row_T[:, None]
    k_LKH, v_LKH = k_TKH, v_TKH
    if table_J is not None:
        past_k, past_v = _gather(pages, table_J)
        k_LKH, v_LKH = torch.cat((past_k.to(k_TKH.dtype), k_TKH)), torch.cat((past_v.to(v_TKH.dtype), v_TKH))
        earlier_L = torch.arange(past_k.shape[0], device=q_TQH.device) < past_1
        mask_TL = torch.cat((earlier_L.expand(q_TQH.shape[0], -1), mask_TL), dim=1)
    return _attend(q_TQH[None], k_LKH[None], v_LKH[None], mask_TL[None])


def attend_pages(q_TQH: Tensor, pages: Pages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    """Attention over pages, R = T / B rows a sequence: row i sees the first len - R + 1 + i tokens -> (T, Q, H)."""
    B = table_BJ.shape[0]
    q_BRQH = q_TQH.view(B, -1, *q_TQH.shape[1:])
    R = q_BRQH.shape[1]
    k_BLKH, v_BLKH = _gather(pages, table_BJ)
    row_R = torch.arange(R, device=q_TQH.device)
    key_L = torch.arange(k_BLKH.shape[1], device=q_TQH.device)
    mask_BRL = key_L[None, None, :] <= (len_B[:, None, None] - R + row_R[None, :, None])
    return _attend(q_BRQH, k_BLKH.to(q_TQH.dtype), v_BLKH.to(q_TQH.dtype), mask_BRL)


def attend_image(q_TQH: Tensor, pages: Pages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor) -> Tensor:
    """Cross-attention over image pages: row t sees the table entries see[0] .. see[1] - 1, each up to its fill.

    Returns (T, Q, H); a row that sees no entry gets a finite value that means nothing.
    """
    B, J = table_BJ.shape
    P = pages[0].shape[1]
    q_BRQH = q_TQH.view(B, -1, *q_TQH.shape[1:])
    R = q_BRQH.shape[1]
    k_BLKH, v_BLKH = _gather(pages, table_BJ)
    filled_BJP = torch.arange(P, device=q_TQH.device) < fill_BJ[:, :, None]
    entry_J = torch.arange(J, device=q_TQH.device)
    see_BR2 = see_T2.view(B, R, 2)
    seen_BRJ = (entry_J >= see_BR2[..., :1]) & (entry_J < see_BR2[..., 1:])
    mask_BRL = (seen_BRJ[..., None] & filled_BJP[:, None]).view(B, R, J * P)
    # A row that sees no image is dropped by the caller; seeing every key keeps its softmax finite.
    blind_BR1 = (see_BR2[..., 1:] <= see_BR2[..., :1])
    return _attend(q_BRQH, k_BLKH.to(q_TQH.dtype), v_BLKH.to(q_TQH.dtype), mask_BRL | blind_BR1)


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, pad_S: Tensor) -> Tensor:
    """Attention among the S patch rows of one image's tiles; padding doesn't see padding: -> (S, A, H)."""
    mask_SS = ~(pad_S[:, None] & pad_S[None, :])
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SAH, k_SAH, v_SAH))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS)[0].transpose(0, 1)


def _as_they_are(ops: Ops, given) -> Ops:
    return ops


def _sum_of_one(x: Tensor) -> Tensor:
    return x


def _stack_of_one(x: Tensor) -> Tensor:
    return x[None]


PLAIN = Ops(
    without_padding=_as_they_are, embed=embed, linear=linear, rms_norm=rms_norm, add_rms_norm=add_rms_norm, layer_norm=layer_norm,
    rope_angles=rope_angles, rope=rope, swiglu=swiglu, gelu=gelu, patch_embed=patch_embed, write_pages_=write_pages_,
    attend_prompt=attend_prompt, attend_pages=attend_pages, attend_image=attend_image, attend_tiles=attend_tiles,
    all_reduce=_sum_of_one, all_gather=_stack_of_one,
)
