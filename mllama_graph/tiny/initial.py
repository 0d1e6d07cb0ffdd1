"""Initial weights that encode positions, which saves a few minutes of training.

The first 16 dimensions of the vision states hold sines and cosines of each patch's position on the canvas, for all
aspect ratios. Each head of a local layer uses them to attend to one neighbouring patch. All weights stay trainable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mllama_graph.tiny.model import Mllama
from mllama_graph.tiny.tiling import GRID, MAX_TILES, PATCH, PATCHES, RATIOS
from mllama_graph.tiny.vision import VisionModel

POSITION_DIMS = 16
RATES = torch.tensor([1.6, 0.9, 0.5, 0.28])  # radians per patch; the last does not wrap on the widest canvas
NEAR = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
FAR = tuple((2 * y, 2 * x) for y, x in NEAR)


def position_code(y: Tensor, x: Tensor) -> Tensor:
    """[..., 16]: sin y, cos y, sin x, cos x, at four rates each."""
    return torch.cat([f(v[..., None] * RATES) for v in (y.float(), x.float()) for f in (torch.sin, torch.cos)], -1)


def shift_matrix(dy: int, dx: int) -> Tensor:
    """[16, 16]: maps the code of a position to the code of the position (dy, dx) patches further."""
    m, n = torch.zeros(POSITION_DIMS, POSITION_DIMS), len(RATES)
    for axis, offset in enumerate((dy, dx)):
        for i, rate in enumerate(RATES):
            s, c = 2 * n * axis + i, 2 * n * axis + n + i
            cos, sin = math.cos(rate * offset), math.sin(rate * offset)
            m[s, s], m[s, c], m[c, c], m[c, s] = cos, sin, cos, -sin
    return m


def cosine_filters(count: int) -> Tensor:
    """[count, 3, PATCH, PATCH]: 2-D cosines in order of frequency, alternating between the colour channels."""
    t = (torch.arange(PATCH) + 0.5) / PATCH
    basis = torch.stack([torch.cos(math.pi * k * t) * math.sqrt((1 if k == 0 else 2) / PATCH) for k in range(PATCH)])
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda p: (p[0] + p[1], max(p)))
    filters = torch.zeros(count, 3, PATCH, PATCH)
    for i in range(count):
        u, v = order[i // 3]
        filters[i, i % 3] = torch.outer(basis[u], basis[v]) * (0.07 if i < 3 else 0.35)
    return filters


def initialise_vision(vision: VisionModel) -> None:
    """Set position codes, cosine filters, and local heads that attend to neighbouring patches."""
    width = vision.class_embedding.shape[0]
    vision.class_embedding.normal_(0, 0.3)
    vision.class_embedding[:POSITION_DIMS] = 0
    weight = vision.patch_embedding.weight
    weight.copy_(torch.cat([torch.zeros(POSITION_DIMS, *weight.shape[1:]), cosine_filters(width - POSITION_DIMS)]))
    mixing = torch.linalg.qr(torch.randn(width - POSITION_DIMS, width - POSITION_DIMS)).Q
    weight[POSITION_DIMS:] = (mixing @ weight[POSITION_DIMS:].flatten(1)).view_as(weight[POSITION_DIMS:])

    position = vision.gated_positional_embedding
    position.gate.fill_(math.atanh(0.5))
    position.embedding.normal_(0, 0.02)
    tiles = torch.zeros(len(RATIOS) + 1, MAX_TILES, PATCHES, width)
    cell = torch.arange(GRID * GRID)
    for ratio_id, (down, across) in enumerate(RATIOS, 1):
        for t in range(down * across):
            y, x = cell // GRID + GRID * (t // across), cell % GRID + GRID * (t % across)
            tiles[ratio_id, t, 1:, :POSITION_DIMS] = 1.4 * position_code(y, x)  # times the gate: 0.7
    position.tile_embedding.weight.copy_(tiles.flatten(1))
    for tile in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
        tile.gate.fill_(math.atanh(0.3))
        tile.embedding.weight.normal_(0, 0.05)

    for index, layer in enumerate(vision.local_layers):
        attn = layer.self_attn
        offsets = FAR if index == 2 else NEAR
        head = width // attn.heads
        for h in range(attn.heads):
            rows = slice(h * head, h * head + POSITION_DIMS)
            shift = shift_matrix(*offsets[h % 8])
            for projection, matrix in ((attn.q_proj, shift), (attn.k_proj, torch.eye(POSITION_DIMS))):
                projection.weight[rows] *= 0.15
                projection.weight[rows, :POSITION_DIMS] += 2.0 * matrix
        # The output of attention must be about as large as the residual, or shapes are learned late.
        attn.o_proj.weight.normal_(0, 1.2 * width**-0.5)
    for layer in (*vision.local_layers, *vision.global_layers):
        layer.self_attn.v_proj.weight[:, :POSITION_DIMS] *= 0.1
        layer.mlp.fc1.weight[:, :POSITION_DIMS] *= 0.2
        layer.self_attn.o_proj.weight[:POSITION_DIMS] *= 0.1
        layer.mlp.fc2.weight[:POSITION_DIMS] *= 0.1


@torch.no_grad()
def initialise(model: Mllama, seed: int) -> None:
    """Initialise every weight of a new model."""
    torch.manual_seed(seed)
    s = model.s
    depth = {"vision_model": s.vision.layers + s.vision.global_layers, "language_model": s.layers}
    for name, p in model.named_parameters():
        if p.dim() == 2 and ("proj" in name or ".fc" in name):
            scale = p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")):
                scale *= depth["vision_model" if "vision_model" in name else "language_model"] ** -0.5
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
    initialise_vision(model.model.vision_model)
