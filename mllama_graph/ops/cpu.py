"""The operations on a CPU that computes in fp32: C++ kernels, all of them.

The kernels are in mllama_graph/native/. Call `native.load("kernels", folder)` before the first use; for tracing,
`native.declare_operators("kernels")` suffices. Lengths and the number of rows are read at run time, so that the cost of
a step depends on its tokens and not on its bucket. Inductor generates only calls, which compile in seconds.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mllama_graph.model.codes import FP8_MOST, INT4_STEPS, Codes, unpack
from mllama_graph.model.formats import FLOAT, MOST, Format
from mllama_graph.model.inputs import LayerPages, PromptInput, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Embedding, LayerNorm, Linear
from mllama_graph.ops.plain import PLAIN

kernels = torch.ops.mllama_graph
# Layouts of model/stored.py in the order of native/codes_to_panels.h.
STORED = ("rows", "packed", "gptq", "awq", "blocks")


class Panels:
    """The `Layout` of linear layers' weights that their kernels read (native/panels.h)."""

    def rows(self, whole: Tensor, at: int, rows_RI: Tensor) -> None:
        kernels.lay_rows_(whole, at, rows_RI)

    def codes(self, whole: Tensor, form: Format, at: int, stored: Tensor, layout: str, order: Tensor | None) -> None:
        kernels.lay_codes_(whole, at, stored, STORED.index(layout), order, form.activations != FLOAT)

    def rounded(self, parts: dict[str, Tensor], form: Format, at: int, rows_RK: Tensor, columns: slice) -> None:
        _round(parts["weight"], parts["scale"], form, at, rows_RK, columns.start, True)

    def sums(self, codes_RI: Tensor) -> Tensor:
        return kernels.sum_codes(codes_RI)

    def unnested(
        self, scale_S: Tensor, values: Tensor, of_blocks: Tensor, block: int, first: int, added: float
    ) -> Tensor:
        return kernels.unnested(scale_S, values, of_blocks, block, first, added)


PANELS = Panels()


def rounded(rows_OI: Tensor, form: Format) -> Codes:
    """`quantise` of model/codes.py: the same codes in a tenth of the time."""
    parts = {
        name: torch.empty(part.shape, dtype=getattr(torch, part.dtype))
        for name, part in form.parts(*rows_OI.shape).items()
    }
    _round(parts["weight"], parts["scale"], form, 0, rows_OI, 0, False)
    return Codes(unpack(parts["weight"], form), parts["scale"])


def _round(weight: Tensor, scale: Tensor, form: Format, at: int, rows_RK: Tensor, first: int, panels: bool) -> None:
    """Round whole rows, and write their inputs from `first` on to a leaf: in panels or in rows."""
    steps = {"fp8": (FP8_MOST,), "int4": INT4_STEPS}.get(form.code, (float(MOST),))
    groups, whole = form.groups(rows_RK.shape[1]), form.activations != FLOAT
    kernels.lay_rounded_(weight, scale, at, rows_RK, first, groups, torch.tensor(steps), panels, whole)


def embed(ids_T: Tensor, leaf: Embedding, real_1: Tensor | None = None) -> Tensor:
    return kernels.embed(ids_T, leaf.weight, leaf.scale, None, real_1)


def embed_held(ids_T: Tensor, leaf: Embedding, real_1: Tensor | None = None) -> Tensor:
    return kernels.embed(ids_T, leaf.weight, leaf.scale, leaf.first, real_1)


def linear(x: Tensor, leaf: Linear, real_1: Tensor | None = None, largest: Tensor | None = None) -> Tensor:
    """Takes a weight that `PANELS` has written. largest: see `quantised_linear` of plain.py."""
    form = leaf.format
    if form and form.activations != FLOAT:
        parts = (leaf.weight, leaf.scale, leaf.shift, leaf.order, leaf.input_scale, leaf.input_zero)
        return kernels.linear_integers(x, *parts, largest, leaf.bias, real_1)
    if form:
        return kernels.linear_coded(
            x, leaf.weight, leaf.scale, leaf.shift, leaf.order, leaf.codebook, leaf.bias, real_1
        )
    return kernels.linear(x, leaf.weight, leaf.bias, real_1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, real_1: Tensor | None = None) -> Tensor:
    return kernels.rms_norm(x, weight, eps, real_1)


def add_rms_norm(
    x_TD: Tensor, y_TD: Tensor | None, weight: Tensor, eps: float, real_1: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if y_TD is None:
        return kernels.rms_norm(x_TD, weight, eps, real_1), x_TD
    return kernels.add_rms_norm(x_TD, y_TD, weight, eps, real_1)


def layer_norm(x: Tensor, leaf: LayerNorm, eps: float) -> Tensor:
    return kernels.layer_norm(x, leaf.weight, leaf.bias, eps)


def rope_angles(position_T: Tensor, inv_freq_h: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.rope_angles(position_T, inv_freq_h)


def rope(x_TQH: Tensor, angles: tuple[Tensor, Tensor], real_1: Tensor | None = None) -> Tensor:
    return kernels.rope(x_TQH, *angles, real_1)


def swiglu(h_TF: Tensor, real_1: Tensor | None = None) -> Tensor:
    return kernels.swiglu(h_TF, real_1)


def gelu(x: Tensor) -> Tensor:
    return kernels.gelu(x)


def sees_image(see_T2: Tensor) -> Tensor:
    """The kernel of `gated` compares the two bounds itself."""
    return see_T2


def gated(y_TD: Tensor, gate_1: Tensor, see_T2: Tensor) -> Tensor:
    return kernels.gated(y_TD, gate_1, see_T2)


def add_gated(x_WE: Tensor, y_WE: Tensor, bias_E: Tensor | None, gate_1: Tensor | None) -> Tensor:
    return kernels.add_gated(x_WE, y_WE, bias_E, gate_1)


def take_rows(x_TD: Tensor, at_B: Tensor) -> Tensor:
    return kernels.take_rows(x_TD, at_B)


def normalise(
    tiles_C3hw: Tensor, real_1: Tensor, scale: Tensor, mean_311: Tensor, std_311: Tensor, dtype: torch.dtype
) -> Tensor:
    return kernels.normalise(tiles_C3hw, real_1, scale, mean_311, std_311)


def patch_embed(x_C3hw: Tensor, weight: Tensor) -> Tensor:
    return kernels.patch_embed(x_C3hw, weight)


def add_tile_embedding(x_CRE: Tensor, table: Tensor, aspect_1: Tensor, gate_1: Tensor) -> Tensor:
    return kernels.add_tile_embedding(x_CRE, table, aspect_1, gate_1)


def add_positions(
    x_CNE: Tensor, class_E: Tensor, position_LE: Tensor, table: Tensor, aspect_1: Tensor, gate_1: Tensor
) -> Tensor:
    return kernels.add_positions(x_CNE, class_E, position_LE, table, aspect_1, gate_1)


def pad_rows(x_CLE: Tensor, real_1: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    return kernels.pad_rows(x_CLE, real_1, multiple)


def join_features(x_WE: Tensor, kept: list[Tensor], tiles: int, tokens: int) -> Tensor:
    return kernels.join_features(x_WE, kept, tiles, tokens)


def _and_scales(pages: LayerPages) -> tuple[Tensor | None, ...]:
    """A layer's pages as kernels take them: K, V, and the scales of each, None for pages without."""
    return pages if len(pages) == 4 else (*pages, None, None)


def write_pages_(k_TKH: Tensor, v_TKH: Tensor, pages: LayerPages, slot_T: Tensor, real_1: Tensor | None = None) -> None:
    """Rows from `real_1` on are not written."""
    kernels.write_pages_(k_TKH, v_TKH, *_and_scales(pages), slot_T, real_1)


def attend_prompt(
    q_TQH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor | None,
    rows_B: Tensor,
    past_B: Tensor,
    decoding_1: Tensor | None = None,
) -> Tensor:
    """decoding_1: the number of the first sequences whose only row gets the bits that `attend_pages` gives it."""
    assert table_BJ is not None, "lengths are free: a bucket without pages would be one more graph"
    scale = q_TQH.shape[-1] ** -0.5
    return kernels.attend_prompt(q_TQH, *_and_scales(pages), table_BJ, rows_B, past_B, decoding_1, scale)


def attend_pages(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    return kernels.attend_pages(q_TQH, *_and_scales(pages), table_BJ, len_B, q_TQH.shape[-1] ** -0.5)


def attend_image(
    q_TQH: Tensor,
    pages: LayerPages,
    table_BJ: Tensor,
    fill_BJ: Tensor,
    see_T2: Tensor,
    rows_B: Tensor | None = None,
    decoding_1: Tensor | None = None,
) -> Tensor:
    """decoding_1: as in `attend_prompt`; rows of these sequences have the bits of a decode step."""
    scale = q_TQH.shape[-1] ** -0.5
    return kernels.attend_image(q_TQH, *_and_scales(pages), table_BJ, fill_BJ, see_T2, rows_B, decoding_1, scale)


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, pad_S: Tensor, scale: float) -> Tensor:
    return kernels.attend_tiles(q_SAH, k_SAH, v_SAH, pad_S, scale)


# Operations that take the number of rows that are not padding. In the others a padding row costs almost nothing: it
# sees no image, and one token of the pages.
SKIP_PADDING = ("embed", "linear", "rms_norm", "add_rms_norm", "rope", "swiglu", "write_pages_")


def without_padding(ops: Ops, given: PromptInput | TokenInput) -> Ops:
    bound = {name: partial(getattr(ops, name), real_1=given.real_1) for name in SKIP_PADDING}
    if isinstance(given, PromptInput):
        for name in ("attend_prompt", "attend_image"):
            bound[name] = partial(getattr(ops, name), decoding_1=given.decoding_1)
    return replace(ops, **bound)


CPU = Ops(
    without_padding=without_padding,
    embed=embed,
    embed_held=embed_held,
    linear=linear,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    layer_norm=layer_norm,
    rope_angles=rope_angles,
    rope=rope,
    swiglu=swiglu,
    gelu=gelu,
    sees_image=sees_image,
    gated=gated,
    add_gated=add_gated,
    take_rows=take_rows,
    normalise=normalise,
    patch_embed=patch_embed,
    add_tile_embedding=add_tile_embedding,
    add_positions=add_positions,
    pad_rows=pad_rows,
    rows_by_tile=PLAIN.rows_by_tile,
    join_features=join_features,
    write_pages_=write_pages_,
    attend_prompt=attend_prompt,
    attend_pages=attend_pages,
    attend_image=attend_image,
    attend_tiles=attend_tiles,
    top_k=PLAIN.top_k,
    all_reduce=PLAIN.all_reduce,
    all_gather=PLAIN.all_gather,
)
