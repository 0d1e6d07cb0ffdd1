"""Language model of the training model, on packed tokens, with the parameter names of MllamaTextModel in transformers.

T packed text tokens  D text width  N sequences  L padded length  I images  C tiles per image  S patches per tile
G1 groups of one image and its questions  G2 groups of two images and their questions  H heads  d head width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama_graph.tiny.layers import Shape, attend
from mllama_graph.tiny.tokenizer import VOCABULARY


@dataclass
class TextBatch:
    """Packed text: first the sequences on one image, then those on two images, then those without an image.

    Self-attention scatters the tokens to a padded grid [N, L], in which `pad_T` holds their flat indices.
    Cross-attention scatters the tokens of the sequences on images to a padded grid [G1, L1] followed by one [G2, L2],
    in which `cross_T` holds their flat indices.
    """

    ids_T: Tensor
    position_T: Tensor
    pad_T: Tensor
    padded: tuple[int, int]  # N, L
    cross_T: Tensor
    sees_T: Tensor  # 1 for tokens from the image token on, 0 for those before it
    single: tuple[int, int]  # G1, L1
    double: tuple[int, int]  # G2, L2
    first_only: Tensor  # [G2, L2] bool: the tokens that see only the first of two images

    @property
    def single_end(self) -> int:
        """The number of packed tokens in sequences on one image."""
        return int((self.cross_T < self.single[0] * self.single[1]).sum())


@dataclass
class ImageStates:
    """What cross-attention reads: projected vision features and a mask of the padding tiles, added to the scores."""

    states: Tensor  # [I, C * S, D]
    mask: Tensor  # [I, C * S]


class QueryKey(NamedTuple):
    """Queries and keys of one attention layer, for the losses on its scores."""

    q: Tensor  # [T, H, d]
    k: Tensor  # self-attention: [T, H, d]; cross-attention: [I, H, C * S, d]


@dataclass
class TextOutput:
    """What a forward pass returns."""

    last: Tensor  # [T, D], after the final norm
    states: list[Tensor]  # [T, D] after every layer
    scores: dict[int, QueryKey]  # by layer; without the cross-attention layers if the batch has no image


class RMSNorm(nn.Module):
    """RMS norm in float32, under autocast too."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """The projections of an attention layer with grouped key and value heads."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s, self.head = s, s.width // s.heads
        self.q_proj = nn.Linear(s.width, s.width, bias=False)
        self.k_proj = nn.Linear(s.width, s.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(s.width, s.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(s.width, s.width, bias=False)

    def query(self, x: Tensor) -> Tensor:
        """[T, heads, d] from states [T, D]."""
        return self.q_proj(x).unflatten(-1, (self.s.heads, -1))

    def key(self, x: Tensor) -> Tensor:
        """[..., kv_heads, d] from states [..., D]."""
        return self.k_proj(x).unflatten(-1, (self.s.kv_heads, -1))

    def value(self, x: Tensor) -> Tensor:
        """[..., kv_heads, d] from states [..., D]."""
        return self.v_proj(x).unflatten(-1, (self.s.kv_heads, -1))


class CrossAttention(Attention):
    """Projections with a norm per head of queries and keys."""

    def __init__(self, s: Shape):
        super().__init__(s)
        self.q_norm, self.k_norm = RMSNorm(self.head, s.norm_eps), RMSNorm(self.head, s.norm_eps)


class TextMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(s.width, s.mlp, bias=False), nn.Linear(s.width, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def scatter(x_T: Tensor, place_T: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed rows [T, heads, d] at their flat indices of a zero-padded grid, as [rows, heads, length, d]."""
    grid = x_T.new_zeros(shape[0] * shape[1], *x_T.shape[1:]).index_copy(0, place_T, x_T)
    return grid.view(*shape, *x_T.shape[1:]).transpose(1, 2)


def gather(grid: Tensor, place_T: Tensor) -> Tensor:
    """The inverse of `scatter`, with heads flattened: [T, heads * d]."""
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)[place_T]


def rotate(x_T: Tensor, cos_T: Tensor, sin_T: Tensor) -> Tensor:
    """Rotary embedding by halves: x [T, heads, d], cosines and sines [T, d]."""
    a, b = x_T.chunk(2, -1)
    return x_T * cos_T[:, None] + torch.cat([-b, a], -1) * sin_T[:, None]


class SelfLayer(nn.Module):
    """Causal self-attention within each packed sequence."""

    def __init__(self, s: Shape):
        super().__init__()
        self.self_attn, self.mlp = Attention(s), TextMLP(s)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps), RMSNorm(s.width, s.norm_eps)

    def forward(self, x_T: Tensor, batch: TextBatch, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, QueryKey]:
        h, attn = self.input_layernorm(x_T), self.self_attn
        q, k, v = rotate(attn.query(h).float(), *rope), rotate(attn.key(h).float(), *rope), attn.value(h).float()
        q_grid, k_grid, v_grid = (scatter(t, batch.pad_T, batch.padded) for t in (q, k, v))
        x_T = x_T + attn.o_proj(gather(attend(q_grid, k_grid, v_grid, causal=True), batch.pad_T))
        return x_T + self.mlp(self.post_attention_layernorm(x_T)), QueryKey(q, k)


class CrossLayer(nn.Module):
    """Gated cross-attention; tokens that see no image pass through unchanged."""

    def __init__(self, s: Shape):
        super().__init__()
        self.cross_attn, self.mlp = CrossAttention(s), TextMLP(s)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps), RMSNorm(s.width, s.norm_eps)
        self.cross_attn_attn_gate, self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x_T: Tensor, batch: TextBatch, images: ImageStates) -> tuple[Tensor, QueryKey]:
        count, attn = len(batch.cross_T), self.cross_attn
        x, text_only = x_T[:count], x_T[count:]
        q = attn.q_norm(attn.query(self.input_layernorm(x)))
        k = attn.k_norm(attn.key(images.states)).transpose(1, 2)
        v = attn.value(images.states).float().transpose(1, 2)
        (groups, length), (pairs, pair_length) = batch.single, batch.double
        on_single = batch.cross_T < groups * length
        outputs = []
        if groups:
            place = batch.cross_T[on_single]
            mask = images.mask[:groups, None, None]
            out = attend(scatter(q[: len(place)], place, batch.single), k[:groups], v[:groups], mask)
            outputs.append(gather(out, place))
        if pairs:
            place = batch.cross_T[~on_single] - groups * length
            both = slice(groups, groups + 2 * pairs)
            k2, v2 = (t[both].unflatten(0, (pairs, 2)).transpose(1, 2).flatten(2, 3) for t in (k, v))
            mask = images.mask[both].view(pairs, 1, -1).expand(-1, pair_length, -1).clone()
            mask[:, :, mask.shape[-1] // 2 :].masked_fill_(batch.first_only[:, :, None], torch.finfo(torch.float32).min)
            out = attend(scatter(q[len(q) - len(place) :], place, batch.double), k2, v2, mask[:, None])
            outputs.append(gather(out, place))
        sees = batch.sees_T[:, None]
        x = x + self.cross_attn_attn_gate.tanh() * sees * attn.o_proj(torch.cat(outputs))
        x = x + self.cross_attn_mlp_gate.tanh() * sees * self.mlp(self.post_attention_layernorm(x))
        return torch.cat([x, text_only]), QueryKey(q, k)


class TextModel(nn.Module):
    """Token embedding, self- and cross-attention layers, final norm."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(VOCABULARY + 8, s.width)
        self.layers = nn.ModuleList([CrossLayer(s) if i in s.cross_layers else SelfLayer(s) for i in range(s.layers)])
        self.norm = RMSNorm(s.width, s.norm_eps)

    def forward(self, batch: TextBatch, images: ImageStates | None) -> TextOutput:
        """Without images, the cross-attention layers are skipped."""
        head = self.s.width // self.s.heads
        rates = self.s.rope_theta ** -(torch.arange(0, head, 2) / head)
        angle = batch.position_T[:, None].float() * rates
        rope = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        x, states, scores = self.embed_tokens(batch.ids_T), [], {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SelfLayer):
                x, scores[i] = layer(x, batch, rope)
            elif images is not None and len(batch.cross_T):
                x, scores[i] = layer(x, batch, images)
            states.append(x)
        return TextOutput(self.norm(x), states, scores)
