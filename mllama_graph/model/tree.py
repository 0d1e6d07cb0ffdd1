"""The weight tree: what each layer holds, and how a rank's tree is built from the checkpoint table.

The nodes are modules without a forward: compilers expect Parameters on modules, and the math is in text.py and
vision.py. Every linear layer goes through `Ops.linear`, whatever the format of its weight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mllama_graph.model.formats import Format, Formats
from mllama_graph.model.layout import Layout, LeafRows
from mllama_graph.model.placement import Placement
from mllama_graph.model.reading import block_rows
from mllama_graph.model.shape import ModelShape, RopeShape
from mllama_graph.model.table import WHOLE, Entry, Shard, table


class Linear(nn.Module):
    """Parameters of a linear layer: weight (out, in), bias (out,) or None.

    Of a quantised layer: `format` and its other parts (`Format.parts`), each or None. splits_inputs: whether a rank
    holds only some of the inputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: nn.Parameter | None
    shift: nn.Parameter | None
    order: nn.Parameter | None
    codebook: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_zero: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.format: Format | None = None
        self.splits_inputs = False
        for name in ("bias", "scale", "shift", "order", "codebook", "input_scale", "input_zero"):
            self.register_parameter(name, None)


class Embedding(Linear):
    """A rank's rows of the embedding table. first: id of its first row, int32, a tensor so that ranks share graphs."""

    first: Tensor


class LayerNorm(nn.Module):
    """Weight and bias of a layer norm."""

    weight: nn.Parameter
    bias: nn.Parameter


class TextLayer(nn.Module):
    """Parameters that both kinds of language-model layer have. gate_up: gate and up projections stacked."""

    attention_norm: nn.Parameter
    mlp_norm: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.o, self.gate_up, self.down = Linear(), Linear(), Linear()


class SelfLayer(TextLayer):
    """A self-attention layer. qkv: query, key and value projections stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Linear()


class CrossLayer(TextLayer):
    """A cross-attention layer. kv, k_norm: used by the vision graph, which writes an image's K/V pages."""

    q_norm: nn.Parameter
    k_norm: nn.Parameter
    attention_gate: nn.Parameter
    mlp_gate: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = Linear(), Linear()


class TextWeights(nn.Module):
    """The language model. inv_freq: rotary frequencies, fp32 (H / 2,).

    padding_V: fp32, 0 for the head's own rows and the least number for rows of padding; None where no rank has padding.
    """

    norm: nn.Parameter
    inv_freq: Tensor
    padding_V: Tensor | None

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed, self.head = Embedding(), Linear()
        layers = [CrossLayer() if i in shape.text.cross_layers else SelfLayer() for i in range(shape.text.layers)]
        self.layers = cast(Sequence[TextLayer], nn.ModuleList(layers))


class VisionLayer(nn.Module):
    """A layer of the vision tower; only global layers have gates. fc2_bias: added once, after the all-reduce.

    padded_head: the head width of qkv and o where a backend has padded the heads; None otherwise.
    """

    fc2_bias: nn.Parameter
    attention_gate: nn.Parameter | None
    mlp_gate: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = LayerNorm(), LayerNorm()
        self.qkv, self.o, self.fc1, self.fc2 = Linear(), Linear(), Linear(), Linear()
        self.padded_head: int | None = None
        self.register_parameter("attention_gate", None)
        self.register_parameter("mlp_gate", None)


class VisionWeights(nn.Module):
    """The vision tower. pixel_*: constants of the normalisation of pixels, as buffers."""

    patch: nn.Parameter
    class_token: nn.Parameter
    position_gate: nn.Parameter
    position: nn.Parameter
    tile_position: nn.Parameter
    pre_tile: nn.Parameter
    pre_tile_gate: nn.Parameter
    post_tile: nn.Parameter
    post_tile_gate: nn.Parameter
    pixel_scale: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm_before, self.norm_after = LayerNorm(), LayerNorm()
        local, global_ = (
            [VisionLayer() for _ in range(count)] for count in (shape.vision.layers, shape.vision.global_layers)
        )
        self.local_layers = cast(Sequence[VisionLayer], nn.ModuleList(local))
        self.global_layers = cast(Sequence[VisionLayer], nn.ModuleList(global_))


class Weights(nn.Module):
    """A rank's part of all weights. A text-only model has no projector, and nothing in its vision tower."""

    projector: Linear

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.text, self.vision = TextWeights(shape), VisionWeights(shape)
        if shape.sees:
            self.projector = Linear()


def linears(root: nn.Module) -> list[Linear]:
    """The linear layers. Only `Ops.linear` reads their weights, so that a backend may choose the layout of these."""
    return [module for module in root.modules() if type(module) is Linear]


@dataclass(frozen=True)
class Pixels:
    """Normalisation of uint8 pixels per channel: (x * scale - mean) / std."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Fills one entry's part of a Parameter: (entry, destination, region of the whole tensor to write to it).
Fill = Callable[[Entry, Tensor, tuple[slice, ...]], None]
# Fills one entry's rows of a quantised leaf: (entry, rows of the leaf, region of the whole weight).
FillQuantised = Callable[[Entry, LeafRows, tuple[slice, ...]], None]
# A region of an entry, mapped from the file in the file's dtype; None if its values must be computed.
Mapped = Callable[[Entry, tuple[slice, ...]], Tensor | None]
# Bytes of a weight that are filled before they are written in a layout: few enough to stay in the cache.
LAID_BYTES = 1 << 20


def unquantised(entry: Entry, rows: LeafRows, region: tuple[slice, ...]) -> None:
    """The FillQuantised of a tree without quantised leaves."""
    raise AssertionError("formats need a source of codes")


def nothing_mapped(entry: Entry, region: tuple[slice, ...]) -> None:
    """The Mapped of values that no file holds."""


def build(
    shape: ModelShape,
    pixels: Pixels,
    dtype: torch.dtype,
    placement: Placement,
    fill: Fill,
    progress: Callable[[int], None],
    shard: Shard = WHOLE,
    formats: Formats = (),
    fill_quantised: FillQuantised = unquantised,
    layout: Layout | None = None,
    mapped: Mapped = nothing_mapped,
) -> Weights:
    """Build a rank's weight tree: Parameters at the table's paths, filled by `fill`, with zeros as padding.

    The leaves of `formats` are filled by `fill_quantised`. layout: how the weights of linear layers are written; None:
    in rows. mapped: regions that a layout writes from the file, without `fill`. `progress` is called with the number of
    bytes filled since its last call.
    """
    root, quantised = Weights(shape), dict(formats)
    groups: dict[str, list[Entry]] = {}
    for entry in table(shape):
        groups.setdefault(entry.path, []).append(entry)
    for path, entries in groups.items():
        node, _, leaf = path.rpartition(".")
        module = root.get_submodule(node)
        laid = layout if type(module) is Linear and leaf == "weight" else None
        if leaf == "weight" and node in quantised:
            assert isinstance(module, Linear)
            _build_quantised(module, entries, quantised[node], placement, fill_quantised, shard, laid)
            progress(sum(part.numel() * part.element_size() for part in module.parameters()))
            continue
        parts = [entry.local(shard) for entry in entries]
        whole = placement.allocate((sum(part[0] for part in parts), *parts[0][1:]), dtype)
        at = 0
        for entry, part in zip(entries, parts, strict=True):
            if laid:
                _lay(entry, whole, at, part[0], entry.region(shard), fill, laid, mapped)
            else:
                _fill_padded(entry, whole[at : at + part[0]], entry.region(shard), fill)
            at += part[0]
        parameter = nn.Parameter(placement.settle(whole), requires_grad=False)
        module.register_parameter(leaf, parameter)
        progress(whole.numel() * whole.element_size())
    frequencies = inverse_frequencies(shape.text.rope, shape.text.head_width)
    root.text.register_buffer("inv_freq", frequencies.to(placement.device))
    first = torch.tensor(shard.bounds(shape.embeddings)[0], dtype=torch.int32)
    root.text.embed.register_buffer("first", first.to(placement.device))
    root.text.register_buffer("padding_V", _padding(shape.text.vocab, shard, placement))
    for name in ("scale", "mean", "std"):
        value = torch.tensor(getattr(pixels, name)).to(placement.device)
        root.vision.register_buffer(f"pixel_{name}", value if name == "scale" else value[:, None, None])
    return root


def _padding(vocab: int, shard: Shard, placement: Placement) -> Tensor | None:
    """TextWeights.padding_V of a rank."""
    if vocab % shard.world == 0:
        return None
    start, stop = shard.bounds(vocab)
    padding_V = torch.zeros(shard.size(vocab))
    padding_V[stop - start :] = torch.finfo(torch.float32).min
    return padding_V.to(placement.device)


def _build_quantised(
    linear: Linear,
    entries: list[Entry],
    form: Format,
    placement: Placement,
    fill: FillQuantised,
    shard: Shard,
    layout: Layout | None,
) -> None:
    """Set a leaf's format and Parameters. Each entry has its own rows; parts without rows are those of the first."""
    linear.format, linear.splits_inputs = form, entries[0].shard == 1 and shard.world > 1
    rows, inputs = [entry.local(shard)[0] for entry in entries], entries[0].local(shard)[1]
    parts = form.parts(sum(rows), inputs)
    whole = {name: placement.allocate(part.shape, getattr(torch, part.dtype)) for name, part in parts.items()}
    held = LeafRows(whole, form, 0, layout)
    for entry, count in zip(entries, rows, strict=True):
        region = entry.region(shard)
        real = region[0].stop - region[0].start
        if real:
            fill(entry, held, region)
        for name, part in whole.items():
            if part.dim() == 2 and real < count:
                held.after(real).write(name, torch.zeros((count - real, part.shape[1]), dtype=part.dtype))
        held = held.after(count)
    for name, part in whole.items():
        linear.register_parameter(name, nn.Parameter(placement.settle(part), requires_grad=False))


def _lay(
    entry: Entry,
    whole: Tensor,
    at: int,
    count: int,
    region: tuple[slice, ...],
    fill: Fill,
    layout: Layout,
    mapped: Mapped,
) -> None:
    """Write an entry's `count` rows, padding included, to a leaf from row `at` on, a block of rows at a time."""
    rows, columns = region
    whole_rows = columns.stop - columns.start == whole.shape[1]
    for first in range(rows.start, rows.stop, step := block_rows(whole)):
        part = slice(first, min(first + step, rows.stop))
        held = mapped(entry, (part, columns)) if whole_rows else None
        if held is None or held.dtype != whole.dtype:
            break
        layout.rows(whole, at, held)
        at, rows, count = at + len(held), slice(part.stop, rows.stop), count - len(held)
    block = torch.empty((min(count, block_rows(whole, LAID_BYTES)), whole.shape[1]), dtype=whole.dtype)
    for first in range(0, count, max(1, len(block))):
        filled = block[: count - first]
        start, stop = (min(rows.start + end, rows.stop) for end in (first, first + len(filled)))
        _fill_padded(entry, filled, (slice(start, stop), columns), fill)
        layout.rows(whole, at + first, filled)


def _fill_padded(entry: Entry, part: Tensor, region: tuple[slice, ...], fill: Fill) -> None:
    """Fill the region of `part` that is not padding, and zero the rest."""
    for axis, taken in enumerate(region):
        size = taken.stop - taken.start
        part.narrow(axis, size, part.shape[axis] - size).zero_()
        part = part.narrow(axis, 0, size)
    if part.numel():
        fill(entry, part, region)


def inverse_frequencies(rope: RopeShape, head_width: int) -> Tensor:
    """Rotation speed of each pair of a head's dimensions in radians per token, fp32, (H / 2,).

    Source: the Llama 3.1 scaling of long wavelengths (transformers modeling_rope_utils, `llama3`).
    """
    frequency = 1.0 / rope.theta ** (torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width)
    if rope.type == "default":
        return frequency
    if rope.type == "linear":
        return frequency / rope.factor
    wavelength = 2 * math.pi / frequency
    turns = rope.original_positions / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth.clamp(0, 1)) * frequency / rope.factor + smooth.clamp(0, 1) * frequency
    long, short = turns < rope.low_freq_factor, turns > rope.high_freq_factor
    return torch.where(long, frequency / rope.factor, torch.where(short, frequency, blended))
