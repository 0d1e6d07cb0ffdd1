"""Vision encoder of the training model, with the parameter names of MllamaVisionModel in transformers.

I images  C tiles per image  S patches per tile (with CLS)  E vision width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama_graph.model.shape import ROW_MULTIPLE, VisionShape
from mllama_graph.tiny.layers import attend
from mllama_graph.tiny.tiling import GRID, MAX_TILES, PATCH, PATCHES, RATIOS

PADDED_PATCHES = -(-PATCHES // ROW_MULTIPLE) * ROW_MULTIPLE


class VisionAttention(nn.Module):
    """Attention over all patches of an image: x [I, C * S, E], mask [I, 1, C * S, C * S] added to the scores."""

    def __init__(self, s: VisionShape):
        super().__init__()
        self.heads = s.heads
        self.q_proj = nn.Linear(s.width, s.width, bias=False)
        self.k_proj = nn.Linear(s.width, s.width, bias=False)
        self.v_proj = nn.Linear(s.width, s.width, bias=False)
        self.o_proj = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers with biases and an exact GELU between them."""

    def __init__(self, s: VisionShape):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(s.width, s.mlp), nn.Linear(s.mlp, s.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LocalLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, s: VisionShape):
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(s), VisionMLP(s)
        self.input_layernorm = nn.LayerNorm(s.width, eps=s.eps)
        self.post_attention_layernorm = nn.LayerNorm(s.width, eps=s.eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class GlobalLayer(LocalLayer):
    """A layer whose attention and MLP are scaled by the tanh of a gate."""

    def __init__(self, s: VisionShape):
        super().__init__(s)
        self.gate_attn, self.gate_ffn = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.gate_attn.tanh() * self.self_attn(self.input_layernorm(x), mask)
        return x + self.gate_ffn.tanh() * self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Registers layers as `layers.0`, `layers.1` and so on, as the checkpoint names them."""

    def __init__(self, layers: list[LocalLayer] | list[GlobalLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TileEmbedding(nn.Module):
    """A gated vector per aspect ratio and tile, added to all patches of the tile."""

    def __init__(self, s: VisionShape):
        super().__init__()
        self.embedding = nn.Embedding(len(RATIOS) + 1, MAX_TILES * s.width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_ICSE: Tensor, ratio_I: Tensor) -> Tensor:
        return x_ICSE + self.gate.tanh() * self.embedding(ratio_I).view(-1, MAX_TILES, 1, x_ICSE.shape[-1])


class PositionEmbedding(nn.Module):
    """A vector per patch of a tile and, gated, one per aspect ratio, tile and patch."""

    def __init__(self, s: VisionShape):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(PATCHES, s.width))
        self.tile_embedding = nn.Embedding(len(RATIOS) + 1, MAX_TILES * PATCHES * s.width)

    def forward(self, x_ICSE: Tensor, ratio_I: Tensor) -> Tensor:
        gate = self.gate.tanh()
        return x_ICSE + (1 - gate) * self.embedding + gate * self.tile_embedding(ratio_I).view(x_ICSE.shape)


class VisionModel(nn.Module):
    """Tiles to features: the final state, then the inputs of the intermediate layers, interleaved as (dim, layer)."""

    def __init__(self, s: VisionShape):
        super().__init__()
        self.intermediate = s.features
        self.class_embedding = nn.Parameter(torch.zeros(s.width))
        self.patch_embedding = nn.Conv2d(3, s.width, PATCH, PATCH, bias=False)
        self.gated_positional_embedding = PositionEmbedding(s)
        self.pre_tile_positional_embedding, self.post_tile_positional_embedding = TileEmbedding(s), TileEmbedding(s)
        self.layernorm_pre, self.layernorm_post = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        # The elements of a ModuleList have no type; these lists do, and register nothing.
        self.local_layers = [LocalLayer(s) for _ in range(s.layers)]
        self.global_layers = [GlobalLayer(s) for _ in range(s.global_layers)]
        self.transformer, self.global_transformer = Transformer(self.local_layers), Transformer(self.global_layers)

    def forward(self, tiles: Tensor, ratio_I: Tensor, tiles_I: Tensor) -> Tensor:
        """Features [I, C, S, vision_output] of tiles [I, C, 3, TILE, TILE].

        `ratio_I` holds the aspect-ratio ids, `tiles_I` the numbers of tiles that are not padding.
        """
        images, width = tiles.shape[0], self.class_embedding.shape[0]
        patches = tiles.view(images, MAX_TILES, 3, GRID, PATCH, GRID, PATCH).permute(0, 1, 3, 5, 2, 4, 6)
        patches = patches.reshape(images, MAX_TILES, PATCHES - 1, -1)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1)).float()
        x = self.pre_tile_positional_embedding(x, ratio_I)
        x = torch.cat([self.class_embedding.expand(images, MAX_TILES, 1, width), x], 2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, ratio_I))
        x = F.pad(x, (0, 0, 0, PADDED_PATCHES - PATCHES)).flatten(1, 2)
        # Only (padding, padding) pairs are masked: mllama lets image patches attend to padding.
        place = torch.arange(MAX_TILES * PADDED_PATCHES)
        padding = (place // PADDED_PATCHES >= tiles_I[:, None]) | (place % PADDED_PATCHES >= PATCHES)
        blocked = padding[:, None, :, None] & padding[:, None, None, :]
        mask = torch.zeros(blocked.shape).masked_fill_(blocked, torch.finfo(torch.float32).min)
        states = []
        for layer in self.local_layers:
            states.append(x)
            x = layer(x, mask)
        x = self.layernorm_post(x).view(images, MAX_TILES, PADDED_PATCHES, width)
        x = self.post_tile_positional_embedding(x, ratio_I).flatten(1, 2)
        for layer in self.global_layers:
            x = layer(x, mask)
        features = torch.cat([x, torch.stack([states[i] for i in self.intermediate], -1).flatten(2)], -1)
        return features.view(images, MAX_TILES, PADDED_PATCHES, -1)[:, :, :PATCHES]
