"""The vision tower and the projector, up to the image's K/V in every cross-attention layer.

C tiles   N patches per tile   L tokens per tile (class token first)   R rows per tile (L padded to a multiple of 8)
S token rows of the image (C * L)   W all rows (C * R)   E vision width   A vision heads   H head width
U vision output   D model width   K kv heads
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.model.inputs import Pages, TileInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.shape import ROW_MULTIPLE, ModelShape
from mllama_graph.model.tree import CrossLayer, VisionLayer, VisionWeights, Weights

# eps of norm_before and norm_after: fixed, whatever norm_eps is (transformers modeling_mllama.py, MllamaVisionModel).
OUTER_NORM_EPS = 1e-5


def block(w: VisionLayer, x_WE: Tensor, pad_W: Tensor, head_width: int, eps: float, ops: Ops) -> Tensor:
    """A layer of the vision tower. Only global layers have gates."""
    W = x_WE.shape[0]
    h_WE = ops.layer_norm(x_WE, w.attention_norm, eps)
    q, k, v = ops.linear(h_WE, w.qkv).chunk(3, dim=-1)
    q_WAH, k_WAH, v_WAH = (part.view(W, -1, w.padded_head or head_width) for part in (q, k, v))
    out_WAH = ops.attend_tiles(q_WAH, k_WAH, v_WAH, pad_W, head_width**-0.5)
    y_WE = ops.all_reduce(ops.linear(out_WAH.reshape(W, -1), w.o))
    x_WE = ops.add_gated(x_WE, y_WE, None, w.attention_gate)
    h_WE = ops.layer_norm(x_WE, w.mlp_norm, eps)
    # fc2's bias is added after the all-reduce: once, not once per rank.
    y_WE = ops.all_reduce(ops.linear(ops.gelu(ops.linear(h_WE, w.fc1)), w.fc2))
    return ops.add_gated(x_WE, y_WE, w.fc2_bias, w.mlp_gate)


def embed_tiles(w: VisionWeights, given: TileInput, tiles: int, dtype: torch.dtype, ops: Ops) -> Tensor:
    """Patches plus tile embeddings and positions, class token first: (C, L, E), the input of norm_before.

    tiles: all tiles of the canvas, padding included.
    """
    x_C3hw = ops.normalise(given.tiles_C3hw, given.real_1, w.pixel_scale, w.pixel_mean, w.pixel_std, dtype)
    x_CNE = ops.patch_embed(x_C3hw, w.patch)
    if len(x_CNE) < tiles:
        # The patches of a padding tile, whose pixels are zero.
        x_CNE = F.pad(x_CNE, (0, 0, 0, 0, 0, tiles - len(x_CNE)))
    x_CNE = ops.add_tile_embedding(x_CNE, w.pre_tile, given.aspect_1, w.pre_tile_gate)
    return ops.add_positions(x_CNE, w.class_token, w.position, w.tile_position, given.aspect_1, w.position_gate)


def encode(w: VisionWeights, given: TileInput, dtype: torch.dtype, shape: ModelShape, ops: Ops) -> Tensor:
    """Features of one image, (S, U): the tower's output and the *inputs* of the local layers in `features`.

    Meta keeps a layer's input (llama_models/llama3/multimodal/model.py, VisionEncoder); the extra features interleave
    as (dim, layer). All tiles are encoded, including padding: real patches attend to them.
    """
    vision = shape.vision
    x_CLE = ops.layer_norm(embed_tiles(w, given, vision.max_tiles, dtype, ops), w.norm_before, OUTER_NORM_EPS)
    C, L, E = x_CLE.shape
    real = len(given.tiles_C3hw) if given.real_1 is None else given.real_1
    x_WE, pad_W = ops.pad_rows(x_CLE, real, ROW_MULTIPLE)

    kept: dict[int, Tensor] = {}
    head_width = vision.width // vision.heads
    for index, layer in enumerate(w.local_layers):
        if index in vision.features:
            kept[index] = x_WE
        x_WE = block(layer, x_WE, pad_W, head_width, vision.eps, ops)
    x_WE = ops.layer_norm(x_WE, w.norm_after, OUTER_NORM_EPS)
    parts = [
        ops.add_tile_embedding(x_CrE, w.post_tile, given.aspect_1, w.post_tile_gate).view(-1, E)
        for x_CrE in ops.rows_by_tile(x_WE, C, L)
    ]
    x_WE = parts[0] if len(parts) == 1 else torch.cat(parts)
    for layer in w.global_layers:
        x_WE = block(layer, x_WE, pad_W, head_width, vision.eps, ops)

    return ops.join_features(x_WE, [kept[index] for index in vision.features], C, L)


def encode_image(
    w: Weights, given: TileInput, image_pages: Pages, shape: ModelShape, dtype: torch.dtype, ops: Ops
) -> None:
    """Encode an image in `dtype` and write its K and V into the pages of every cross-attention layer.

    Keys are normalised before they are written. They carry no position, so that all requests can share them.
    """
    # Of int8 pages on an NPU, the host gives the places of scales.
    if given.prepared is not None:
        ops = ops.without_padding(ops, given)
    x_SD = ops.linear(encode(w.vision, given, dtype, shape, ops), w.projector)
    S, head_width = x_SD.shape[0], shape.text.head_width
    for pages, index in zip(image_pages, shape.text.cross_layers, strict=True):
        layer = w.text.layers[index]
        assert isinstance(layer, CrossLayer)
        k, v = ops.linear(x_SD, layer.kv).chunk(2, dim=-1)
        k_SKH = ops.rms_norm(k.view(S, -1, head_width), layer.k_norm, shape.text.eps)
        ops.write_pages_(k_SKH, v.view(S, -1, head_width), pages, given.slot_S)
