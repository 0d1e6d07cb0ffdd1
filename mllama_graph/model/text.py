"""The language model: self-attention over pages, cross-attention to image pages.

    B sequences   T token rows   D model width   Q query heads   K kv heads   H head width   F mlp width   V vocabulary
    O rows of logits

A block returns the residual stream x_TD and the update y_TD that is not yet added to it, so that the addition and the
next norm are one fused operation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mllama_graph.model.inputs import ImageInput, LayerPages, MixedInput, Pages, PromptInput, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.tree import CrossLayer, SelfLayer, TextLayer, TextWeights

# (q_TQH, k_TKH, v_TKH, pages of the layer) -> out_TQH
Attend = Callable[[Tensor, Tensor, Tensor, LayerPages], Tensor]
# (q_TQH, image pages of the layer) -> out_TQH
AttendImage = Callable[[Tensor, LayerPages], Tensor]


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
    see_T2: Tensor,
    attend_image: AttendImage,
    shape: ModelShape,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """A cross-attention layer; attention and MLP are each scaled by a tanh gate. see_T2: see ImageInput.

    A row that sees no image is unchanged by attention and MLP: Meta multiplies both by the row mask
    (llama_models/llama3/multimodal/model.py, CrossAttentionTransformerBlock).
    """
    T = x_TD.shape[0]
    sees = ops.sees_image(see_T2)
    h_TD, x_TD = ops.add_rms_norm(x_TD, y_TD, w.attention_norm, shape.text.eps)
    q_TQH = ops.linear(h_TD, w.q).view(T, -1, shape.text.head_width)
    q_TQH = ops.rms_norm(q_TQH, w.q_norm, shape.text.eps)
    out_TQH = attend_image(q_TQH, pages)
    y_TD = ops.gated(ops.all_reduce(ops.linear(out_TQH.reshape(T, -1), w.o)), w.attention_gate, sees)
    h_TD, x_TD = ops.add_rms_norm(x_TD, y_TD, w.mlp_norm, shape.text.eps)
    return x_TD, ops.gated(mlp(w, h_TD, ops), w.mlp_gate, sees)


def trunk(
    w: TextWeights,
    ids_T: Tensor,
    position_T: Tensor,
    see_T2: Tensor | None,
    pages: Pages,
    image_pages: Pages,
    attend: Attend,
    attend_image: AttendImage,
    shape: ModelShape,
    dtype: torch.dtype,
    ops: Ops,
) -> tuple[Tensor, Tensor | None]:
    """All layers, with activations in `dtype`.

    Without see_T2 the cross-attention layers are left out: equivalent if no row sees an image.
    """
    angles = ops.rope_angles(position_T, w.inv_freq)
    x_TD, y_TD = ops.embed(ids_T, w.embed).to(dtype), None
    next_pages, next_image_pages = iter(pages), iter(image_pages)
    for layer in w.layers:
        if isinstance(layer, SelfLayer):
            x_TD, y_TD = self_block(layer, x_TD, y_TD, angles, next(next_pages), attend, shape, ops)
        elif isinstance(layer, CrossLayer) and see_T2 is not None:
            x_TD, y_TD = cross_block(layer, x_TD, y_TD, next(next_image_pages), see_T2, attend_image, shape, ops)
    return x_TD, y_TD


def to_images(image: ImageInput | None, rows_B: Tensor | None, ops: Ops) -> AttendImage:
    """Attention to the images of a step. rows_B: see `Ops.attend_image`."""

    def attend_image(q_TQH: Tensor, pages: LayerPages) -> Tensor:
        assert image is not None, "a step without images has no cross-attention layers"
        return ops.attend_image(q_TQH, pages, image.table_BJ, image.fill_BJ, image.see_T2, rows_B)

    return attend_image


def seen(image: ImageInput | None) -> Tensor | None:
    """see_T2 of the images; None without images."""
    return None if image is None else image.see_T2


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

    see_T2, attend_image = seen(given.image), to_images(given.image, given.rows_B, ops)
    x_TD, y_TD = trunk(
        w, given.ids_T, given.position_T, see_T2, pages, image_pages, attend, attend_image, shape, dtype, ops
    )
    x_BD = ops.take_rows(x_TD, given.last_B)
    y_BD = None if y_TD is None else ops.take_rows(y_TD, given.last_B)
    return logits(w, x_BD, y_BD, shape, every.without_padding(every, given._replace(real_1=given.outputs_1)))


def decode(
    w: TextWeights, given: TokenInput, pages: Pages, image_pages: Pages, shape: ModelShape, dtype: torch.dtype, ops: Ops
) -> Tensor:
    """Write the new tokens' K/V into their slots; return logits_TV of every row. `dtype`: of activations."""
    ops = ops.without_padding(ops, given)

    def attend(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: LayerPages) -> Tensor:
        ops.write_pages_(k_TKH, v_TKH, cache, given.slot_T)
        return ops.attend_pages(q_TQH, cache, given.table_BJ, given.len_B)

    see_T2, attend_image = seen(given.image), to_images(given.image, None, ops)
    x_TD, y_TD = trunk(
        w, given.ids_T, given.position_T, see_T2, pages, image_pages, attend, attend_image, shape, dtype, ops
    )
    return logits(w, x_TD, y_TD, shape, ops)


def mixed(
    w: TextWeights, given: MixedInput, pages: Pages, image_pages: Pages, shape: ModelShape, dtype: torch.dtype, ops: Ops
) -> Tensor:
    """Decode a token of each sequence and prefill prompts beside them; return logits_OV. `dtype`: of activations.

    All rows share the products. Attention is computed apart, in the form of a decode step and in that of a prefill.
    """
    tokens, prompts = given.tokens, given.prompts
    one, other = ops.without_padding(ops, tokens), ops.without_padding(ops, prompts)
    ops = ops.without_padding(ops, given)
    rows = [len(tokens.ids_T), len(prompts.ids_T)]
    to_image, to_other = to_images(tokens.image, None, one), to_images(prompts.image, prompts.rows_B, other)

    def attend(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: LayerPages) -> Tensor:
        ops.write_pages_(k_TKH, v_TKH, cache, given.slot_T)
        (q_BQH, q_RQH), k_RKH, v_RKH = q_TQH.split(rows), k_TKH[rows[0] :], v_TKH[rows[0] :]
        out_BQH = one.attend_pages(q_BQH, cache, tokens.table_BJ, tokens.len_B)
        out_RQH = other.attend_prompt(q_RQH, k_RKH, v_RKH, cache, prompts.table_BJ, prompts.rows_B, prompts.past_B)
        return torch.cat((out_BQH, out_RQH))

    def attend_image(q_TQH: Tensor, cache: LayerPages) -> Tensor:
        q_BQH, q_RQH = q_TQH.split(rows)
        return torch.cat((to_image(q_BQH, cache), to_other(q_RQH, cache)))

    x_TD, y_TD = trunk(
        w, given.ids_T, given.position_T, given.see_T2, pages, image_pages, attend, attend_image, shape, dtype, ops
    )
    x_OD = ops.take_rows(x_TD, given.last_O)
    y_OD = None if y_TD is None else ops.take_rows(y_TD, given.last_O)
    return logits(w, x_OD, y_OD, shape, ops)
