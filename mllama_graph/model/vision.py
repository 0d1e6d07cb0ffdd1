"""The vision tower and the projector, up to the image's K/V in every cross-attention layer.

    C tiles   N patches a tile   L tokens a tile (class token first)   R rows a tile (L padded to a multiple of 8)
    S token rows of the image (C * L)   W all rows (C * R)   E vision width   A vision heads   H head width
    U vision output   D model width   K kv heads
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.model.inputs import Pages, TileInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.shape import ROW_MULTIPLE, ModelShape, VisionShape
from mllama_graph.model.tree import CrossLayer, VisionLayer, VisionWeights, Weights

# Both are fixed, whatever norm_eps says (transformers modeling_mllama.py, MllamaVisionModel).
OUTER_NORM_EPS = 1e-5


def normalise(w: VisionWeights, tiles_C3hw: Tensor, real_1: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 to (x / 255 - mean) / std; padding tiles are exactly zero after it."""
    x_C3hw = (tiles_C3hw.float() * w.pixel_scale - w.pixel_mean) / w.pixel_std
    # Of real_1's dtype: the NPU's comparison takes no mixed ones, and its compiler does not convert.
    real_C = torch.arange(tiles_C3hw.shape[0], dtype=real_1.dtype, device=tiles_C3hw.device) < real_1
    return torch.where(real_C[:, None, None, None], x_C3hw, 0.0).to(dtype)


def gated(x: Tensor, gate: Optional[Tensor]) -> Tensor:
    """x behind its tanh gate, or x where there is none."""
    return x if gate is None else x * gate.to(x.dtype).tanh()


def block(w: VisionLayer, x_WE: Tensor, pad_W: Tensor, head_width: int, eps: float, ops: Ops) -> Tensor:
    """A vision layer. Only global layers have gates."""
    W = x_WE.shape[0]
    h_WE = ops.layer_norm(x_WE, w.attention_norm, eps)
    q, k, v = ops.linear(h_WE, w.qkv).chunk(3, dim=-1)
    q_WAH, k_WAH, v_WAH = (part.view(W, -1, head_width) for part in (q, k, v))
    out_WAH = ops.attend_tiles(q_WAH, k_WAH, v_WAH, pad_W)
    y_WE = ops.all_reduce(ops.linear(out_WAH.reshape(W, -1), w.o))
    x_WE = x_WE + gated(y_WE, w.attention_gate)
    h_WE = ops.layer_norm(x_WE, w.mlp_norm, eps)
    # fc2's bias is added after the reduction: once, not once a rank.
    y_WE = ops.all_reduce(ops.linear(ops.gelu(ops.linear(h_WE, w.fc1)), w.fc2)) + w.fc2_bias.to(x_WE.dtype)
    return x_WE + gated(y_WE, w.mlp_gate)


def embed_tiles(w: VisionWeights, x_C3hw: Tensor, aspect_1: Tensor, vision: VisionShape, ops: Ops) -> Tensor:
    """Patches with their tile's embedding, class token first, positions added: (C, L, E) before any layer."""
    dtype = x_C3hw.dtype
    x_CNE = ops.patch_embed(x_C3hw, w.patch)
    x_CNE = x_CNE + gated(tile_embedding(w.pre_tile, aspect_1, vision, 1, dtype), w.pre_tile_gate)
    class_C1E = w.class_token.to(dtype).expand(x_CNE.shape[0], 1, -1)
    x_CLE = torch.cat((class_C1E, x_CNE), dim=1)
    gate = w.position_gate.to(dtype).tanh()
    return (x_CLE + (1 - gate) * w.position.to(dtype)
            + gate * tile_embedding(w.tile_position, aspect_1, vision, vision.tokens, dtype))


def tile_embedding(table: Tensor, aspect_1: Tensor, vision: VisionShape, rows: int, dtype: torch.dtype) -> Tensor:
    """The row of an aspect ratio in an embedding table, as (C, rows, E)."""
    return table.index_select(0, aspect_1).view(vision.max_tiles, rows, vision.width).to(dtype)


def encode(w: VisionWeights, given: TileInput, dtype: torch.dtype, shape: ModelShape, ops: Ops) -> Tensor:
    """Features of one image, (S, U): the tower's output and the *inputs* of the listed local layers.

    Meta keeps a layer's input (llama_models/llama3/multimodal/model.py, VisionEncoder); the extra features interleave
    as (dim, layer). All tiles are encoded, padding ones too: real patches attend to them.
    """
    vision = shape.vision
    x_CLE = embed_tiles(w, normalise(w, given.tiles_C3hw, given.real_1, dtype), given.aspect_1, vision, ops)
    x_CLE = ops.layer_norm(x_CLE, w.norm_before, OUTER_NORM_EPS)
    C, L, E = x_CLE.shape
    padding = -L % ROW_MULTIPLE
    x_WE = F.pad(x_CLE, (0, 0, 0, padding)).view(-1, E)
    R = L + padding
    row_W = torch.arange(C * R, dtype=given.real_1.dtype, device=x_WE.device)
    pad_W = (row_W // R >= given.real_1) | (row_W % R >= L)

    kept: dict[int, Tensor] = {}
    head_width = vision.width // vision.heads
    for index, layer in enumerate(w.local_layers):
        if index in vision.features:
            kept[index] = x_WE
        x_WE = block(layer, x_WE, pad_W, head_width, vision.eps, ops)
    x_WE = ops.layer_norm(x_WE, w.norm_after, OUTER_NORM_EPS)
    post_C1E = gated(tile_embedding(w.post_tile, given.aspect_1, vision, 1, dtype), w.post_tile_gate)
    x_WE = (x_WE.view(C, R, E) + post_C1E).view(-1, E)
    for layer in w.global_layers:
        x_WE = block(layer, x_WE, pad_W, head_width, vision.eps, ops)

    parts = [x_WE]
    if vision.features:
        parts.append(torch.stack([kept[index] for index in vision.features], dim=-1).flatten(1))
    return torch.cat(parts, dim=-1).view(C, R, -1)[:, :L].reshape(C * L, -1)


def encode_image(w: Weights, given: TileInput, image_pages: Pages, shape: ModelShape, ops: Ops) -> None:
    """Encodes an image and writes its K and V into the pages of every cross-attention layer.

    Keys are normalised before they are kept; they carry no position, so that every request may share them.
    """
    dtype = image_pages[0][0].dtype
    x_SD = ops.linear(encode(w.vision, given, dtype, shape, ops), w.projector)
    S, head_width = x_SD.shape[0], shape.text.head_width
    for pages, index in zip(image_pages, shape.text.cross_layers, strict=True):
        layer = w.text.layers[index]
        assert isinstance(layer, CrossLayer)
        k, v = ops.linear(x_SD, layer.kv).chunk(2, dim=-1)
        k_SKH = ops.rms_norm(k.view(S, -1, head_width), layer.k_norm, shape.text.eps)
        ops.write_pages_(k_SKH, v.view(S, -1, head_width), pages, given.slot_S)
