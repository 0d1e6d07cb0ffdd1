"""The sizes of the tiny model, and the attention that its vision and text layers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.model.shape import VisionShape
from mllama_graph.tiny.tiling import VISION


@dataclass(frozen=True)
class Shape:
    """Sizes of the tiny model; `width`, `heads` and the others without a prefix are those of the text layers."""

    vision: VisionShape = VISION
    width: int = 128
    layers: int = 7
    cross_layers: tuple[int, ...] = (1, 3, 5)
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 320
    rope_theta: float = 1000.0
    norm_eps: float = 1e-5


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q [B, H, Lq, d] over k and v [B, H or fewer, Lk, d]; `mask` is added to the scores.

    It runs in float32, which is faster than bfloat16 on a CPU.
    """
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
