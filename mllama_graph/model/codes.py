"""Codes of quantised weights: how values become codes, how codes are packed, and the values that they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mllama_graph.model.formats import Format

# The largest finite value of E4M3.
FP8_MOST = 448.0
# Divisors of a group's largest value that 4-bit scales are chosen from, by squared error. 8 clips one step of one sign;
# larger ones, which clip the largest values of both signs, lose more for less squared error (docs/quantisation.md).
INT4_STEPS = (7.0, 7.25, 7.5, 7.75, 8.0)
# The values of bitsandbytes' NF4: quantiles of a normal distribution (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class Codes:
    """A region of a quantised weight, O outputs by I inputs in G groups.

    codes: one per weight (O, I): int8; or 0 .. 15 as uint8; or float8_e4m3fn. scale, shift: fp32 (O, G). order: int32,
    the index of the input of each column. codebook: fp32 (16,). input_scale, input_zero: fp32 (1,).
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None
    order: Tensor | None = None
    codebook: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None


def quantise(rows_OI: Tensor, form: Format, scale_dtype: torch.dtype = torch.float32) -> Codes:
    """Round whole rows of a weight, fp32, to the nearest codes of a format without shifts. Symmetric.

    4-bit scales are those of INT4_STEPS with the least squared error in their group. Scales are values of
    `scale_dtype`: codes are chosen for the scale that a file can hold.
    """
    grouped_OGI = rows_OI.unflatten(1, (form.groups(rows_OI.shape[1]), -1))
    most_OG1 = grouped_OGI.abs().amax(-1, keepdim=True)
    if form.code == "int4":
        codes, scale = _int4(grouped_OGI, most_OG1, scale_dtype)
    else:
        most = FP8_MOST if form.code == "fp8" else 127.0
        scale = _held(most_OG1 / most, scale_dtype)
        scaled = (grouped_OGI / _divisor(scale)).clamp(-most, most)
        codes = scaled.to(torch.float8_e4m3fn) if form.code == "fp8" else scaled.round().to(torch.int8)
    return Codes(codes.flatten(1), scale.squeeze(-1))


def _held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 scale as another dtype holds it; never 0 for a group that has values."""
    if dtype == torch.float32:
        return scale
    return torch.where(scale > 0, scale.to(dtype).float().clamp_min(torch.finfo(dtype).tiny), 0.0)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, and 1 for groups of zeros."""
    return torch.where(scale > 0, scale, 1.0)


def _int4(grouped: Tensor, most: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 15 and scales of groups, of least squared error among INT4_STEPS."""
    best_codes, best_scale = torch.zeros_like(grouped), most
    least = torch.full_like(most, torch.inf)
    for steps in INT4_STEPS:
        scale = _held(most / steps, scale_dtype)
        rounded = (grouped / _divisor(scale)).round().clamp(-8, 7)
        error = (rounded * scale - grouped).square().sum(-1, keepdim=True)
        better = error < least
        best_codes = torch.where(better, rounded, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        least = torch.minimum(error, least)
    return (best_codes + 8).to(torch.uint8), best_scale


def pack(codes_OI: Tensor, form: Format) -> Tensor:
    """Codes as a leaf stores them: two of 4 bits in a byte, the first in the low half; others unchanged."""
    return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4 if form.bits == 4 else codes_OI


def unpack(weight: Tensor, form: Format) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1) if form.bits == 4 else weight


def values(found: Codes, form: Format) -> Tensor:
    """The fp32 values (O, I) that codes stand for, columns in stored order."""
    codes = found.codes
    if form.code == "codebook":
        assert found.codebook is not None
        wide = found.codebook[codes.int()]
    else:
        wide = codes.float() - 8.0 if form.code == "int4" else codes.float()
    grouped = wide.view(len(codes), found.scale.shape[1], -1) * found.scale[..., None]
    if found.shift is not None:
        grouped = grouped + found.shift[..., None]
    return grouped.view(codes.shape)


def rounded_rows(x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of x rounded to whole numbers in -127 .. 127, and the scale (..., 1) of each: dynamic int8 activations.

    largest: where x is one of several parts of the rows, the largest absolute value (parts, ..., 1) of each part.
    """
    most = x.abs().amax(-1, keepdim=True) if largest is None else largest.amax(0)
    scale = most / 127.0
    return (x / _divisor(scale)).round(), scale
