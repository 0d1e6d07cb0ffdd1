"""Linear layers with quantised weights on a CUDA device, by the kernels of cuda_products.py.

For few rows the inputs are split over several programs, enough to keep the memory of a device busy; for many rows there
is a program per tile of the result. `lay_out` changes the canonical layout in place, for the leaves that `fits`:

- Scales and shifts are stored as (groups, outputs), so that those of a tile are adjacent.
- Codes are stored in words of 32 bits, 8 codes of 4 bits or 4 of 8 bits, in runs of 128 inputs: slot s of word w of a
  run's W words holds the code of its input s * W + w, so that a slot of adjacent words meets adjacent elements of x.
  int8 codes are stored as code + 128, as 4-bit codes are from the start.

Weights of int8 activations stay as they are.

Torch's own kernels are not used: `_weight_int4pack_mm` takes only bf16 and rounds scales to it, `_scaled_mm` needs
activations in fp8, and `_int_mm` takes only more than 16 rows and writes int32 sums that are read again.
"""

from math import gcd

import torch
from torch import Tensor, nn

from mllama_graph.model.codes import pack, rounded_rows, unpack
from mllama_graph.model.formats import DYNAMIC, FLOAT, MOST, STATIC, Format
from mllama_graph.model.tree import Linear, linears
from mllama_graph.ops import plain
from mllama_graph.ops.cuda_products import BLOCK, Tile, coded_product, integer_product, tile_for
from mllama_graph.ops.cuda_triton import multiprocessors

# Fewest inputs of a tile that share a scale: whole slots of 8 bits.
LEAST = 32
# Programs per multiprocessor that splits aim at, the fewest tiles of inputs per split, and the most splits.
PROGRAMS, LEAST_TILES, MOST_SPLITS = 2, 4, 16


def splits(rows: int, outputs: int, inputs: int, tile: Tile, count: int) -> int:
    """Number of parts into which inputs are split to fill `count` multiprocessors. Depends only on shapes."""
    tiles = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    return max(1, min(PROGRAMS * count // tiles, inputs // (BLOCK * LEAST_TILES), MOST_SPLITS))


def segment_of(form: Format) -> int:
    """Inputs of a tile that share a scale, wherever the tile is."""
    return gcd(form.group, BLOCK)


def fits(form: Format | None, inputs: int) -> bool:
    """Whether the kernels read a leaf. Other leaves keep the canonical layout and are computed by plain.py."""
    return form is not None and (form.activations != FLOAT or (segment_of(form) >= LEAST and inputs % BLOCK == 0))


def lay_out(weights: nn.Module) -> None:
    """Convert the leaves that the kernels read, in place, to the layout of this file."""
    for leaf in linears(weights):
        form, weight = leaf.format, leaf.weight.data
        if not form or form.activations != FLOAT or not fits(form, weight.shape[1] * 8 // form.bits):
            continue
        for of_groups in (leaf.scale, leaf.shift):
            if of_groups is not None:
                of_groups.data.copy_(of_groups.data.t().contiguous().view_as(of_groups))
        slots = 32 // form.bits
        # (runs, slots, words) -> (runs, words, slots)
        codes = unpack(weight.view(torch.uint8), form).view(-1, slots, BLOCK // slots).transpose(1, 2)
        if form.code == "int8":
            codes = codes ^ 128
        weight.view(torch.uint8).copy_(pack(codes.reshape(-1, slots), form).reshape(len(weight), -1))


def linear(x: Tensor, leaf: Linear, largest: Tensor | None = None) -> Tensor:
    """`linear` of plain.py; leaves that `fits` have been converted by `lay_out`."""
    form = leaf.format
    if form is None or leaf.scale is None or not fits(form, x.shape[-1]):
        return plain.linear(x, leaf, largest)
    if leaf.order is not None:
        x = x.index_select(-1, leaf.order)
    x_TI = x.reshape(-1, x.shape[-1]).contiguous()
    (T, inputs), outputs = x_TI.shape, len(leaf.weight)
    wide = x.dtype == torch.float32 and form.activations == FLOAT
    count = splits(T, outputs, inputs, tile_for(T, wide), multiprocessors(x.device))
    if form.activations == FLOAT:
        words = leaf.weight.view(torch.int32)
        y_TO = coded_product(
            x_TI, words, leaf.scale, leaf.shift, leaf.codebook, leaf.bias, form.code, segment_of(form), count
        )
    else:
        if form.activations == DYNAMIC:
            rounded, row_scale = rounded_rows(
                x_TI.float(), None if largest is None else largest.reshape(len(largest), -1, 1)
            )
        else:
            assert leaf.input_scale is not None and leaf.input_zero is not None
            row_scale = leaf.input_scale.expand(T, 1)
            rounded = ((x_TI.float() / row_scale).round() + leaf.input_zero).clamp(-MOST - 1, MOST)
        zero = leaf.input_zero if form.activations == STATIC else None
        y_TO = integer_product(
            rounded.to(torch.int8),
            row_scale.flatten().contiguous(),
            zero,
            leaf.weight,
            leaf.scale,
            leaf.bias,
            x.dtype,
            count,
        )
    return y_TO.view(*x.shape[:-1], outputs)
