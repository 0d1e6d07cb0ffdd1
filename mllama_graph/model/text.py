"""The language model: self-attention over pages, cross-attention to image pages.

    B sequences   T token rows   D model width   Q query heads   K kv heads   H head width   F mlp width   V vocabulary

A block returns the residual stream x_TD and the update y_TD that is not yet added to it, so that the addition and the
next norm are one fused operation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mllama_graph.model.inputs import ImageInput, LayerPages, Pages, PromptInput, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.tree import CrossLayer, SelfLayer, TextLayer, TextWeights

# (q_TQH, k_TKH, v_TKH, pages of the layer) -> out_TQH
Attend = Callable[[Tensor, Tensor, Tensor, LayerPages], Tensor]


def mlp(w: TextLayer, h_TD: Tensor, ops: Ops) -> Tensor:
    """SwiGLU MLP, gate and up projection fused; one all-reduce."""
    h_TF = ops.swiglu(ops.linear(h_TD, w.gate_up))
    return ops.all_reduce(ops.linear(h_TF, w.down))


def self_attention(
    w: SelfLayer,
    h_TD: Tensor,
    angles: tuple[Tensor, Tensor],
    pages: LayerPages,
    attend: Attend,
    head_width: int,
    ops: Ops,
) -> Tensor:
    """Rotary self-attention over the layer's pages; one all-reduce."""
    T = h_TD.shape[0]
    kv = pages[0].shape[2] * head_width
    qkv = ops.linear(h_TD, w.qkv)
    q, k, v = qkv.split([qkv.shape[-1] - 2 * kv, kv, kv], dim=-1)
    q_TQH = ops.rope(q.view(T, -1, head_width), angles)
    k_TKH = ops.rope(k.view(T, -1, head_width), angles)
    out_TQH = attend(q_TQH, k_TKH, v.view(T, -1, head_width), pages)
    return ops.all_reduce(ops.linear(out_TQH.reshape(T, -1), w.o))


def self_block(
    w: SelfLayer,
    x_TD: Tensor,
    y_TD: Tensor | None,
    angles: tuple[Tensor, Tensor],
    pages: LayerPages,
    attend: Attend,
    shape: ModelShape,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """A self-attention layer; (x_TD, y_TD) in and out."""
    h_TD, x_TD = ops.add_rms_norm(x_TD, y_TD, w.attention_norm, shape.text.eps)
    y_TD = self_attention(w, h_TD, angles, pages, attend, shape.text.head_width, ops)
    h_TD, x_TD = ops.add_rms_norm(x_TD, y_TD, w.mlp_norm, shape.text.eps)
    return x_TD, mlp(w, h_TD, ops)


def cross_block(
    w: CrossLayer,
    x_TD: Tensor,
    y_TD: Tensor | None,
    pages: LayerPages,
    image: ImageInput,
    rows_B: Tensor | None,
    shape: ModelShape,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """A cross-attention layer; attention and MLP are each scaled by a tanh gate. rows_B: see `Ops.attend_image`.

    A row that sees no image is unchanged by attention and MLP: Meta multiplies both by the row mask
    (llama_models/llama3/multimodal/model.py, CrossAttentionTransformerBlock).
    """
    T = x_TD.shape[0]
    sees = ops.sees_image(image.see_T2)
    h_TD, x_TD = ops.add_rms_norm(x_TD, y_TD, w.attention_norm, shape.text.eps)
    q_TQH = ops.linear(h_TD, w.q).view(T, -1, shape.text.head_width)
    q_TQH = ops.rms_norm(q_TQH, w.q_norm, shape.text.eps)
    out_TQH = ops.attend_image(q_TQH, pages, image.table_BJ, image.fill_BJ, image.see_T2, rows_B)
    y_TD = ops.gated(ops.all_reduce(ops.linear(out_TQH.reshape(T, -1), w.o)), w.attention_gate, sees)
    h_TD, x_TD = ops.add_rms_norm(x_TD, y_TD, w.mlp_norm, shape.text.eps)
    return x_TD, ops.gated(mlp(w, h_TD, ops), w.mlp_gate, sees)


def trunk(
    w: TextWeights,
    ids_T: Tensor,
    position_T: Tensor,
    image: ImageInput | None,
    rows_B: Tensor | None,
    pages: Pages,
    image_pages: Pages,
    attend: Attend,
    shape: ModelShape,
    dtype: torch.dtype,
    ops: Ops,
) -> tuple[Tensor, Tensor | None]:
    """All layers, with activations in `dtype`. rows_B: rows of each sequence; None if all have the same number.

    Without `image` the cross-attention layers are left out: equivalent if no row sees an image.
    """
    angles = ops.rope_angles(position_T, w.inv_freq)
    x_TD, y_TD = ops.embed(ids_T, w.embed).to(dtype), None
    next_pages, next_image_pages = iter(pages), iter(image_pages)
    for layer in w.layers:
        if isinstance(layer, SelfLayer):
            x_TD, y_TD = self_block(layer, x_TD, y_TD, angles, next(next_pages), attend, shape, ops)
        elif isinstance(layer, CrossLayer) and image is not None:
            x_TD, y_TD = cross_block(layer, x_TD, y_TD, next(next_image_pages), image, rows_B, shape, ops)
    return x_TD, y_TD


def logits(w: TextWeights, x_TD: Tensor, y_TD: Tensor | None, shape: ModelShape, ops: Ops) -> Tensor:
    """The final norm and the head, applied to the given rows."""
    h_TD, _ = ops.add_rms_norm(x_TD, y_TD, w.norm, shape.text.eps)
    return ops.linear(h_TD, w.head)


def prefill(
    w: TextWeights,
    given: PromptInput,
    pages: Pages,
    image_pages: Pages,
    shape: ModelShape,
    dtype: torch.dtype,
    ops: Ops,
) -> Tensor:
    """Write the new tokens' K/V into their slots; return logits_BV of the rows `last_B`. `dtype`: of activations."""
    every, ops = ops, ops.without_padding(ops, given)

    def attend(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: LayerPages) -> Tensor:
        ops.write_pages_(k_TKH, v_TKH, cache, given.slot_T)
        return ops.attend_prompt(q_TQH, k_TKH, v_TKH, cache, given.table_BJ, given.rows_B, given.past_B)

    x_TD, y_TD = trunk(
        w, given.ids_T, given.position_T, given.image, given.rows_B, pages, image_pages, attend, shape, dtype, ops
    )
    x_BD = ops.take_rows(x_TD, given.last_B)
    y_BD = None if y_TD is None else ops.take_rows(y_TD, given.last_B)
    # One row of each sequence is left.
    return logits(w, x_BD, y_BD, shape, every.without_padding(every, given._replace(real_1=given.sequences_1)))


def decode(
    w: TextWeights, given: TokenInput, pages: Pages, image_pages: Pages, shape: ModelShape, dtype: torch.dtype, ops: Ops
) -> Tensor:
    """Write the new tokens' K/V into their slots; return logits_TV of every row. `dtype`: of activations."""
    ops = ops.without_padding(ops, given)

    def attend(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: LayerPages) -> Tensor:
        ops.write_pages_(k_TKH, v_TKH, cache, given.slot_T)
        return ops.attend_pages(q_TQH, cache, given.table_BJ, given.len_B)

    x_TD, y_TD = trunk(
        w, given.ids_T, given.position_T, given.image, None, pages, image_pages, attend, shape, dtype, ops
    )
    return logits(w, x_TD, y_TD, shape, ops)
