"""The training model: mllama in Meta's semantics as plain modules whose state_dict has the checkpoint's own names.

I images  C tiles an image  S patches a tile (with CLS)  E vision width  T packed text tokens  D text width
N sequences  L padded length  G groups (one or two images and the questions on them)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama_graph.model.shape import VisionShape
from mllama_graph.tiny.tiling import GRID, MAX_TILES, PATCH, PATCHES, RATIOS, VISION
from mllama_graph.tiny.tokenizer import VOCABULARY

PADDED_PATCHES = -(-PATCHES // 8) * 8


@dataclass(frozen=True)
class Shape:
    """Sizes of the tiny model."""

    vision: VisionShape = VISION
    width: int = 128
    layers: int = 7
    cross_layers: tuple[int, ...] = (1, 3, 5)
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 320
    rope_theta: float = 1000.0
    norm_eps: float = 1e-5


@dataclass
class TextBatch:
    """Packed text: sequences on one image first, then on two images, then text alone.

    ids_T, position_T; `pad_T` is each token's place in the padded [N, L] grid.
    `cross_T` is each image-bearing token's place in the padded grid of its group: [G1, L1] for groups of one image,
    then [G2, L2] for groups of two; `sees_T` is 1 where a row sees an image; `first_only` [G2, L2] marks the rows
    that see the first image of two alone.
    """

    ids_T: Tensor
    position_T: Tensor
    pad_T: Tensor
    padded: tuple[int, int]
    cross_T: Tensor
    sees_T: Tensor
    single: tuple[int, int]
    double: tuple[int, int]
    first_only: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention in float32 (faster than bfloat16 on a CPU); q [B, H, Lq, d], k and v may have fewer heads."""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )


class RMSNorm(nn.Module):
    """Computed in float32, whatever autocast says."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class VisionAttention(nn.Module):
    """Attention over all patches of a picture: x [I, C * S, E], mask [I, 1, C * S, C * S] added to the scores."""

    def __init__(self, s: Shape):
        super().__init__()
        self.heads = s.vision.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(s.vision.width, s.vision.width, bias=False))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        return self.o_proj(attend(q, k, v, mask, False).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers with biases around an exact gelu."""

    def __init__(self, s: Shape):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(s.vision.width, s.vision.mlp), nn.Linear(s.vision.mlp, s.vision.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """A vision layer; the global ones are gated."""

    def __init__(self, s: Shape, gated: bool):
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(s), VisionMLP(s)
        self.input_layernorm = nn.LayerNorm(s.vision.width, eps=s.vision.eps)
        self.post_attention_layernorm = nn.LayerNorm(s.vision.width, eps=s.vision.eps)
        if gated:
            self.gate_attn, self.gate_ffn = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.gated = gated

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attention = self.self_attn(self.input_layernorm(x), mask)
        x = x + (self.gate_attn.tanh() * attention if self.gated else attention)
        update = self.mlp(self.post_attention_layernorm(x))
        return x + (self.gate_ffn.tanh() * update if self.gated else update)


class Layers(nn.Module):
    """A list of layers under the name that the checkpoint has for it."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TileEmbedding(nn.Module):
    """A gated vector for each tile of each aspect ratio, added to all its patches."""

    def __init__(self, s: Shape):
        super().__init__()
        self.embedding = nn.Embedding(len(RATIOS) + 1, MAX_TILES * s.vision.width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_ICSE: Tensor, ratio_I: Tensor) -> Tensor:
        return x_ICSE + self.gate.tanh() * self.embedding(ratio_I).view(-1, MAX_TILES, 1, x_ICSE.shape[-1])


class PositionEmbedding(nn.Module):
    """A vector for each place in a tile and, gated, one for each place in each tile of each aspect ratio."""

    def __init__(self, s: Shape):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(PATCHES, s.vision.width))
        self.tile_embedding = nn.Embedding(len(RATIOS) + 1, MAX_TILES * PATCHES * s.vision.width)

    def forward(self, x_ICSE: Tensor, ratio_I: Tensor) -> Tensor:
        gate = self.gate.tanh()
        return x_ICSE + (1 - gate) * self.embedding + gate * self.tile_embedding(ratio_I).view(x_ICSE.shape)


class VisionModel(nn.Module):
    """Tiles to features: final state plus the inputs of the intermediate layers, interleaved as (dim, layer)."""

    def __init__(self, s: Shape):
        super().__init__()
        self.intermediate = s.vision.features
        self.class_embedding = nn.Parameter(torch.zeros(s.vision.width))
        self.patch_embedding = nn.Conv2d(3, s.vision.width, PATCH, PATCH, bias=False)
        self.gated_positional_embedding = PositionEmbedding(s)
        self.pre_tile_positional_embedding, self.post_tile_positional_embedding = TileEmbedding(s), TileEmbedding(s)
        self.layernorm_pre, self.layernorm_post = nn.LayerNorm(s.vision.width), nn.LayerNorm(s.vision.width)
        self.transformer = Layers([VisionLayer(s, False) for _ in range(s.vision.layers)])
        self.global_transformer = Layers([VisionLayer(s, True) for _ in range(s.vision.global_layers)])

    def forward(self, tiles: Tensor, ratio_I: Tensor, tiles_I: Tensor) -> Tensor:
        """tiles [I, C, 3, TILE, TILE], aspect-ratio ids, numbers of real tiles -> features [I, C, S, vision_output]."""
        images, width = tiles.shape[0], self.class_embedding.shape[0]
        patches = tiles.view(images, MAX_TILES, 3, GRID, PATCH, GRID, PATCH).permute(0, 1, 3, 5, 2, 4, 6)
        patches = patches.reshape(images, MAX_TILES, PATCHES - 1, -1)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1)).float()
        x = self.pre_tile_positional_embedding(x, ratio_I)
        x = torch.cat([self.class_embedding.expand(images, MAX_TILES, 1, width), x], 2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, ratio_I))
        x = F.pad(x, (0, 0, 0, PADDED_PATCHES - PATCHES)).flatten(1, 2)
        # Only pairs (padding, padding) are blocked: real patches do attend to padding.
        place = torch.arange(MAX_TILES * PADDED_PATCHES)
        padding = (place // PADDED_PATCHES >= tiles_I[:, None]) | (place % PADDED_PATCHES >= PATCHES)
        blocked = padding[:, None, :, None] & padding[:, None, None, :]
        mask = torch.zeros(blocked.shape).masked_fill_(blocked, torch.finfo(torch.float32).min)
        states = []
        for layer in self.transformer.layers:
            states.append(x)
            x = layer(x, mask)
        x = self.layernorm_post(x).view(images, MAX_TILES, PADDED_PATCHES, width)
        x = self.post_tile_positional_embedding(x, ratio_I).flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, mask)
        features = torch.cat([x, torch.stack([states[i] for i in self.intermediate], -1).flatten(2)], -1)
        return features.view(images, MAX_TILES, PADDED_PATCHES, -1)[:, :, :PATCHES]


class TextAttention(nn.Module):
    """Projections of a self- or cross-attention layer with grouped key and value heads."""

    def __init__(self, s: Shape, cross: bool):
        super().__init__()
        self.s, head = s, s.width // s.heads
        self.q_proj = nn.Linear(s.width, s.width, bias=False)
        self.k_proj = nn.Linear(s.width, s.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(s.width, s.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(s.width, s.width, bias=False)
        if cross:
            self.q_norm, self.k_norm = RMSNorm(head, s.norm_eps), RMSNorm(head, s.norm_eps)

    def query(self, x: Tensor) -> Tensor:
        """[T, heads, d] from states [T, D]."""
        return self.q_proj(x).unflatten(-1, (self.s.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two of [..., kv_heads, d] from states [..., D]."""
        return tuple(p(x).unflatten(-1, (self.s.kv_heads, -1)) for p in (self.k_proj, self.v_proj))


class TextMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(s.width, s.mlp, bias=False), nn.Linear(s.width, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def spread(x_T: Tensor, place_T: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed rows [T, heads, d] into a padded grid [rows, heads, length, d]."""
    grid = x_T.new_zeros(shape[0] * shape[1], *x_T.shape[1:]).index_copy(0, place_T, x_T)
    return grid.view(*shape, *x_T.shape[1:]).transpose(1, 2)


def gather(grid: Tensor, place_T: Tensor) -> Tensor:
    """The inverse of `spread`, heads flattened: [T, heads * d]."""
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)[place_T]


def rotate(x_T: Tensor, cos_T: Tensor, sin_T: Tensor) -> Tensor:
    """Rotary embedding by halves: x [T, heads, d], angles [T, d]."""
    a, b = x_T.chunk(2, -1)
    return x_T * cos_T[:, None] + torch.cat([-b, a], -1) * sin_T[:, None]


class SelfLayer(nn.Module):
    """Causal self-attention inside each packed sequence."""

    def __init__(self, s: Shape):
        super().__init__()
        self.self_attn, self.mlp = TextAttention(s, False), TextMLP(s)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps), RMSNorm(s.width, s.norm_eps)

    def forward(self, x_T: Tensor, batch: TextBatch, rope: tuple[Tensor, Tensor]) -> Tensor:
        h = self.input_layernorm(x_T)
        q = rotate(self.self_attn.query(h).float(), *rope)
        k, v = self.self_attn.key_value(h)
        k = rotate(k.float(), *rope)
        self.trace = (q, k) if self.training else None  # for the comparing loss
        grids = (spread(t.float(), batch.pad_T, batch.padded) for t in (q, k, v))
        x_T = x_T + self.self_attn.o_proj(gather(attend(*grids, None, True), batch.pad_T))
        return x_T + self.mlp(self.post_attention_layernorm(x_T))


class CrossLayer(nn.Module):
    """Gated cross-attention; rows that see no image pass through untouched."""

    def __init__(self, s: Shape):
        super().__init__()
        self.cross_attn, self.mlp = TextAttention(s, True), TextMLP(s)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps), RMSNorm(s.width, s.norm_eps)
        self.cross_attn_attn_gate, self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x_T: Tensor, batch: TextBatch, vision: Tensor, tile_mask: Tensor) -> Tensor:
        count, attn = len(batch.cross_T), self.cross_attn
        if not count:
            return x_T
        x, alone = x_T[:count], x_T[count:]
        q = attn.q_norm(attn.query(self.input_layernorm(x)))
        k, v = attn.key_value(vision)
        k, v = attn.k_norm(k).transpose(1, 2), v.float().transpose(1, 2)
        self.trace = (q, k) if self.training else None  # for the pointing loss
        (groups, length), (pairs, pair_length) = batch.single, batch.double
        ones = batch.cross_T < groups * length
        found = []
        if groups:
            place = batch.cross_T[ones]
            mask = tile_mask[:groups, None, None]
            out = attend(spread(q[: len(place)], place, batch.single), k[:groups], v[:groups], mask, False)
            found.append(gather(out, place))
        if pairs:
            place = batch.cross_T[~ones] - groups * length
            both = slice(groups, groups + 2 * pairs)
            k2, v2 = (t[both].unflatten(0, (pairs, 2)).transpose(1, 2).flatten(2, 3) for t in (k, v))
            mask = tile_mask[both].view(pairs, 1, -1).expand(-1, pair_length, -1).clone()
            mask[:, :, mask.shape[-1] // 2 :].masked_fill_(batch.first_only[:, :, None], torch.finfo(torch.float32).min)
            out = attend(spread(q[len(q) - len(place) :], place, batch.double), k2, v2, mask[:, None], False)
            found.append(gather(out, place))
        sees = batch.sees_T[:, None]
        x = x + self.cross_attn_attn_gate.tanh() * sees * attn.o_proj(torch.cat(found))
        x = x + self.cross_attn_mlp_gate.tanh() * sees * self.mlp(self.post_attention_layernorm(x))
        return torch.cat([x, alone])


class TextModel(nn.Module):
    """Token embedding, self- and cross-attention layers, final norm."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(VOCABULARY + 8, s.width)
        self.layers = nn.ModuleList([CrossLayer(s) if i in s.cross_layers else SelfLayer(s) for i in range(s.layers)])
        self.norm = RMSNorm(s.width, s.norm_eps)

    def forward(self, batch: TextBatch, vision: Tensor | None, tile_mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Last normalised state [T, D] and the states after every layer."""
        head = self.s.width // self.s.heads
        rates = self.s.rope_theta ** -(torch.arange(0, head, 2) / head)
        angle = batch.position_T[:, None].float() * rates
        rope = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        x, states = self.embed_tokens(batch.ids_T), []
        for layer in self.layers:
            if isinstance(layer, SelfLayer):
                x = layer(x, batch, rope)
            elif vision is not None:
                x = layer(x, batch, vision, tile_mask)
            states.append(x)
        return self.norm(x), states


class Mllama(nn.Module):
    """The whole model; state_dict names are those of MllamaForConditionalGeneration in transformers."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.model = nn.Module()
        self.model.vision_model, self.model.language_model = VisionModel(s), TextModel(s)
        self.model.multi_modal_projector = nn.Linear(s.vision.out_width, s.width)
        self.lm_head = nn.Linear(s.width, VOCABULARY, bias=False)

    def see(self, tiles: Tensor, ratio_I: Tensor, tiles_I: Tensor) -> Tensor:
        """Vision features [I, C, S, vision_output]."""
        return self.model.vision_model(tiles, ratio_I, tiles_I)

    def read(self, batch: TextBatch, features: Tensor | None, tiles_I: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Text states for packed text whose images are the first ones of `features`."""
        if features is None:
            return self.model.language_model(batch, None, None)
        vision = self.model.multi_modal_projector(features).flatten(1, 2)
        padding = (torch.arange(vision.shape[1]) // PATCHES) >= tiles_I[:, None]
        mask = torch.zeros(padding.shape).masked_fill_(padding, torch.finfo(torch.float32).min)
        return self.model.language_model(batch, vision, mask)
