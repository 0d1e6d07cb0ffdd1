"""Linear layers with quantised weights on a CUDA device, by the kernels of cuda_products.py.

For few rows the inputs are split over several programs, enough to keep the memory of a device busy; for many rows there
is a program per tile of the result. `lay_out` changes the canonical layout in place, for the leaves that `fits`:

- Scales and shifts are stored as (groups, outputs), so that those of a tile are adjacent.
- In each 32 codes of 4 bits, the low halves of 16 bytes hold the first 16 codes and the high halves the last, so that
  both halves meet adjacent elements of x.

Torch's own kernels are not used: `_weight_int4pack_mm` takes only bf16 and rounds scales to it, `_scaled_mm` needs
activations in fp8, and `_int_mm` takes only more than 16 rows and writes int32 sums that are read again.
"""

from math import gcd

import torch
from torch import Tensor

from mllama_graph.model.codes import rounded_rows
from mllama_graph.model.formats import DYNAMIC, FLOAT, MOST, STATIC, Format
from mllama_graph.model.tree import Linear, Weights, linears
from mllama_graph.ops import plain
from mllama_graph.ops.cuda_products import BLOCK, Tile, coded_product, integer_product, tile_for
from mllama_graph.ops.cuda_triton import capability, multiprocessors

# Codes of 4 bits are rearranged in runs of this many.
RUN = 32
# Programs per multiprocessor that splits aim at, the fewest tiles of inputs per split, and the most splits.
PROGRAMS, LEAST_TILES, MOST_SPLITS = 2, 4, 16


def splits(rows: int, outputs: int, inputs: int, block: int, tile: Tile, count: int) -> int:
    """Number of parts into which inputs are split to fill `count` multiprocessors. Depends only on shapes."""
    tiles = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    return max(1, min(PROGRAMS * count // tiles, inputs // (block * LEAST_TILES), MOST_SPLITS))


def block_of(form: Format) -> int:
    """Inputs of a tile: all of one group."""
    return gcd(form.group, BLOCK)


def fits(form: Format | None, inputs: int) -> bool:
    """Whether the kernels read a leaf. Other leaves keep the canonical layout and are computed by plain.py."""
    return form is not None and block_of(form) >= RUN and (form.bits == 8 or inputs % RUN == 0)


def lay_out(weights: Weights) -> None:
    """Convert the leaves that the kernels read, in place, to the layout of this file."""
    for leaf in linears(weights):
        if not leaf.format or not fits(leaf.format, leaf.weight.shape[1] * 8 // leaf.format.bits):
            continue
        for of_groups in (leaf.scale, leaf.shift):
            if of_groups is not None:
                of_groups.data.copy_(of_groups.data.t().contiguous().view_as(of_groups))
        if leaf.format.bits == 4:
            # Two codes of the first half of a run, and the two at the same place in the last, become two bytes.
            first, last = leaf.weight.data.view(-1, 2, RUN // 4).unbind(1)
            pairs = torch.stack((first & 15 | last << 4, first >> 4 | last & 240), dim=-1)
            leaf.weight.data.copy_(pairs.view_as(leaf.weight))


def linear(x: Tensor, leaf: Linear, largest: Tensor | None = None) -> Tensor:
    """`linear` of plain.py; leaves that `fits` have been converted by `lay_out`."""
    form = leaf.format
    if form is None or leaf.scale is None or not fits(form, x.shape[-1]):
        return plain.linear(x, leaf, largest)
    if leaf.order is not None:
        x = x.index_select(-1, leaf.order)
    x_TI = x.reshape(-1, x.shape[-1]).contiguous()
    (T, inputs), outputs, block = x_TI.shape, len(leaf.weight), block_of(form)
    wide = x.dtype == torch.float32 and form.activations == FLOAT
    count = splits(T, outputs, inputs, block, tile_for(T, wide), multiprocessors(x.device))
    if form.activations == FLOAT:
        weight: Tensor = leaf.weight
        # Triton reads E4M3 on devices that have instructions for it.
        if form.code == "fp8" and capability(x.device) < (8, 9):
            weight = weight.view(torch.uint8)
        y_TO = coded_product(x_TI, weight, leaf.scale, leaf.shift, leaf.codebook, leaf.bias, form.code, block, count)
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
