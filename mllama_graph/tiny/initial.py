"""Starting weights that already know where things are: a few minutes of training saved.

The first 16 vision dimensions carry each patch's place on the whole canvas as sines and cosines, for all aspect ratios;
each head of a local layer looks at one neighbouring patch through them. All of it is trained on from there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mllama_graph.tiny.model import Mllama, VisionModel
from mllama_graph.tiny.tiling import GRID, MAX_TILES, PATCH, PATCHES, RATIOS

PLACE_DIMS = 16
RATES = torch.tensor([1.6, 0.9, 0.5, 0.28])  # radians a patch: the last does not wrap on the widest canvas
NEAR = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
FAR = tuple((2 * y, 2 * x) for y, x in NEAR)


def place_code(y: Tensor, x: Tensor) -> Tensor:
    """[..., 16]: sin y, cos y, sin x, cos x, four rates each."""
    return torch.cat([f(v[..., None] * RATES) for v in (y.float(), x.float()) for f in (torch.sin, torch.cos)], -1)


def shift_matrix(dy: int, dx: int) -> Tensor:
    """[16, 16]: takes a place's code to the code of the place (dy, dx) further."""
    m, n = torch.zeros(PLACE_DIMS, PLACE_DIMS), len(RATES)
    for axis, offset in enumerate((dy, dx)):
        for i, rate in enumerate(RATES):
            s, c = 2 * n * axis + i, 2 * n * axis + n + i
            cos, sin = math.cos(rate * offset), math.sin(rate * offset)
            m[s, s], m[s, c], m[c, c], m[c, s] = cos, sin, cos, -sin
    return m


def cosine_filters(count: int) -> Tensor:
    """[count, 3, PATCH, PATCH]: the lowest two-dimensional cosines, alternating between the colour channels."""
    t = (torch.arange(PATCH) + 0.5) / PATCH
    basis = torch.stack([torch.cos(math.pi * k * t) * math.sqrt((1 if k == 0 else 2) / PATCH) for k in range(PATCH)])
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda p: (p[0] + p[1], max(p)))
    filters = torch.zeros(count, 3, PATCH, PATCH)
    for i in range(count):
        u, v = order[i // 3]
        filters[i, i % 3] = torch.outer(basis[u], basis[v]) * (0.07 if i < 3 else 0.35)
    return filters


def start_vision(vision: VisionModel) -> None:
    """Place codes, cosine filters, neighbour heads."""
    width = vision.class_embedding.shape[0]
    vision.class_embedding.normal_(0, 0.3)
    vision.class_embedding[:PLACE_DIMS] = 0
    weight = vision.patch_embedding.weight
    weight.copy_(torch.cat([torch.zeros(PLACE_DIMS, *weight.shape[1:]), cosine_filters(width - PLACE_DIMS)]))
    mixing = torch.linalg.qr(torch.randn(width - PLACE_DIMS, width - PLACE_DIMS)).Q
    weight[PLACE_DIMS:] = (mixing @ weight[PLACE_DIMS:].flatten(1)).view_as(weight[PLACE_DIMS:])

    position = vision.gated_positional_embedding
    position.gate.fill_(math.atanh(0.5))
    position.embedding.normal_(0, 0.02)
    tiles = torch.zeros(len(RATIOS) + 1, MAX_TILES, PATCHES, width)
    cell = torch.arange(GRID * GRID)
    for ratio_id, (down, across) in enumerate(RATIOS, 1):
        for t in range(down * across):
            y, x = cell // GRID + GRID * (t // across), cell % GRID + GRID * (t % across)
            tiles[ratio_id, t, 1:, :PLACE_DIMS] = 1.4 * place_code(y, x)  # times the gate: 0.7
    position.tile_embedding.weight.copy_(tiles.flatten(1))
    for tile in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
        tile.gate.fill_(math.atanh(0.3))
        tile.embedding.weight.normal_(0, 0.05)

    for index, layer in enumerate(vision.transformer.layers):
        attn = layer.self_attn
        offsets = FAR if index == 2 else NEAR
        head = width // attn.heads
        for h in range(attn.heads):
            rows = slice(h * head, h * head + PLACE_DIMS)
            shift = shift_matrix(*offsets[h % 8])
            for projection, matrix in ((attn.q_proj, shift), (attn.k_proj, torch.eye(PLACE_DIMS))):
                projection.weight[rows] *= 0.15
                projection.weight[rows, :PLACE_DIMS] += 2.0 * matrix
        # Neighbours must weigh about as much as the patch itself, or shapes are learned late.
        attn.o_proj.weight.normal_(0, 1.2 * width**-0.5)
    for layer in vision.global_transformer.layers:
        layer.gate_attn.fill_(1.0)
        layer.gate_ffn.fill_(1.0)
    for layer in (*vision.transformer.layers, *vision.global_transformer.layers):
        layer.self_attn.v_proj.weight[:, :PLACE_DIMS] *= 0.1
        layer.mlp.fc1.weight[:, :PLACE_DIMS] *= 0.2
        layer.self_attn.o_proj.weight[:PLACE_DIMS] *= 0.1
        layer.mlp.fc2.weight[:PLACE_DIMS] *= 0.1


@torch.no_grad()
def start(model: Mllama, seed: int) -> None:
    """Fill every weight of a new model."""
    torch.manual_seed(seed)
    s = model.s
    depth = {"vision_model": s.vision.layers + s.vision.global_layers, "language_model": s.layers}
    for name, p in model.named_parameters():
        if p.dim() == 2 and ("proj" in name or ".fc" in name):
            scale = p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")):
                scale *= (depth["vision_model" if "vision_model" in name else "language_model"]) ** -0.5
            p.normal_(0, scale)
        elif name.endswith("embed_tokens.weight"):
            p.normal_(0, 0.5)
        elif name.endswith("lm_head.weight"):
            p.normal_(0, 0.5 * s.width**-0.5)
        elif name.endswith(("fc1.bias", "fc2.bias", "projector.bias")):
            p.zero_()
        elif "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            p.fill_(math.atanh(0.5))
        elif name.endswith("q_norm.weight"):
            p.fill_(1.5)
    start_vision(model.model.vision_model)
