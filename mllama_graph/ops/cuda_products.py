"""Triton kernels that multiply rows with the codes of a weight, which are decoded in registers.

`_coded` multiplies rows in bf16, fp16 or fp32 with codes, `_integers` int8 rows with int8 codes. The product is
computed as weight @ x.T: the weight is the first operand of tl.dot, which tensor cores take from registers, so that
decoded values are never written to shared memory. Codes of 8 and 4 bits are exact in bf16 and fp16 (a codebook's values
are rounded); scales, shifts and sums are fp32. The layout of operands is that of cuda_linear.py. Shape letters:

    T rows   I inputs   O outputs   G groups   S splits of the inputs   B inputs of a tile, or bytes of its codes

Run by Triton's interpreter and compiled for sm_80 and sm_90 on hosts without a GPU; never run on a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import wrap_triton

from mllama_graph.ops.cuda_triton import DOT, jit, operation, tl

# Inputs of a tile.
BLOCK = 128
# What decoded whole numbers are to be multiplied by.
WHOLE = 2.0**22


@dataclass(frozen=True)
class Tile:
    """A program's part of the result, rows by outputs, and how it is computed."""

    rows: int
    outputs: int
    warps: int
    stages: int


def tile_for(rows: int, wide: bool) -> Tile:
    """The tile for a number of rows. wide: products in fp32, which don't use tensor cores and need more registers."""
    if rows <= DOT:
        return Tile(DOT, 64, 4, 2) if wide else Tile(DOT, 128, 4, 3)
    if wide:
        return Tile(32, 64, 8, 2)
    if rows <= 64:
        return Tile(32 if rows <= 32 else 64, 64, 4, 3)
    return Tile(128, 128, 8, 3)


@jit
def _decode(word, codebook_ptr, CODE: tl.constexpr, SLOT: tl.constexpr):
    """The fp32 values, times 2 ** -22 for whole numbers, of the codes in a slot of words.

    GPUs need a mask and a multiply-add per code: a whole number's bits, where they are, are a subnormal fp32 number.
    """
    if CODE == "codebook":
        value = tl.load(codebook_ptr + ((word >> (4 * SLOT)) & 15))
    elif CODE == "fp8":
        # Sign, exponent and mantissa, at the places of fp32. The biases of the exponents differ by 120.
        bits = ((word << (24 - 8 * SLOT)) >> 4) & -0x78100000
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        # Codes are 8 or 128 above their values. Slots beyond the 23 bits of a mantissa are moved down together.
        WIDTH: tl.constexpr = 4 if CODE == "int4" else 8
        DOWN: tl.constexpr = 0 if (SLOT + 1) * WIDTH <= 23 else (12 if WIDTH == 4 else 16)
        AT: tl.constexpr = SLOT * WIDTH - DOWN
        bits = (word >> DOWN) & ((2**WIDTH - 1) << AT)
        value = bits.to(tl.float32, bitcast=True) * 2.0 ** (127 - AT) - 2.0 ** (WIDTH - 1 - 22)
    return value


@jit
def _coded(
    x_ptr,
    word_ptr,
    scale_ptr,
    shift_ptr,
    sums_ptr,
    codebook_ptr,
    bias_ptr,
    out_ptr,
    T,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CODE: tl.constexpr,
    SLOTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    FACTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """x_TI @ weight.T + bias as out_TO; with SPLITS > 1 out_STO in fp32, to be summed, without bias.

    SLOTS: codes per word. SEGMENT: inputs of a tile that surely share a scale. FACTOR: what
    decoded values are to be multiplied by. sums (T, GROUPS), with SHIFTED: the sum of x over each group.
    """
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    real_T, real_O = t_T < T, o_O < OUTPUTS
    share: tl.constexpr = (INPUTS // BLOCK_I + SPLITS - 1) // SPLITS
    first = split * share
    last = tl.minimum(first + share, INPUTS // BLOCK_I)
    words: tl.constexpr = BLOCK_I // SLOTS
    group: tl.constexpr = INPUTS // GROUPS

    w_W = tl.arange(0, words)
    x_WT = x_ptr + t_T[None, :] * INPUTS + w_W[:, None]
    word_OW = word_ptr + o_O[:, None] * (INPUTS // SLOTS) + w_W[None, :]
    out_OT = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    for step in range(first, last):
        code_OW = tl.load(word_OW + step * words, mask=real_O[:, None], other=0)
        for segment in tl.static_range(BLOCK_I // SEGMENT):
            start = step * BLOCK_I + segment * SEGMENT
            part_OT = out_OT if GROUPS == 1 else tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
            for slot in tl.static_range(SEGMENT // words):
                value_OW = _decode(code_OW, codebook_ptr, CODE, segment * (SEGMENT // words) + slot)
                row_WT = tl.load(x_WT + (start + slot * words), mask=real_T[None, :], other=0.0)
                part_OT = tl.dot(value_OW.to(row_WT.dtype), row_WT, part_OT, input_precision="ieee")
            if GROUPS == 1:
                out_OT = part_OT
            else:
                scale_O = tl.load(scale_ptr + start // group * OUTPUTS + o_O, mask=real_O, other=0.0)
                out_OT += part_OT * (scale_O * FACTOR)[:, None]
                if SHIFTED:
                    if start % group == 0:
                        shift_O = tl.load(shift_ptr + start // group * OUTPUTS + o_O, mask=real_O, other=0.0)
                        sum_T = tl.load(sums_ptr + t_T * GROUPS + start // group, mask=real_T, other=0.0)
                        out_OT += shift_O[:, None] * sum_T[None, :]

    if GROUPS == 1:
        out_OT *= (tl.load(scale_ptr + o_O, mask=real_O, other=0.0) * FACTOR)[:, None]
        if SHIFTED:
            if split == 0:
                shift_O = tl.load(shift_ptr + o_O, mask=real_O, other=0.0)
                out_OT += shift_O[:, None] * tl.load(sums_ptr + t_T, mask=real_T, other=0.0)[None, :]
    if BIASED and SPLITS == 1:
        out_OT += tl.load(bias_ptr + o_O, mask=real_O, other=0.0).to(tl.float32)[:, None]
    at_OT = (split * T + t_T)[None, :] * OUTPUTS + o_O[:, None]
    tl.store(out_ptr + at_OT, out_OT.to(out_ptr.dtype.element_ty), mask=real_O[:, None] & real_T[None, :])


@jit
def _integers(
    x_ptr,
    weight_ptr,
    row_scale_ptr,
    zero_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    T,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    ZERO: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """(x_TI - zero) @ weight.T * row_scale * scale + bias as out_TO; with SPLITS > 1 the sums alone as int32, out_STO.

    ZERO: whether the code of zero (1,) is read; it is a whole number. row_scale: (T,).
    """
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    real_T, real_O = t_T < T, o_O < OUTPUTS
    share: tl.constexpr = (INPUTS + BLOCK_I * SPLITS - 1) // (BLOCK_I * SPLITS)
    first = split * share
    last = tl.minimum(first + share, (INPUTS + BLOCK_I - 1) // BLOCK_I)

    sum_OT = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.int32)
    # The sum of each output's codes, in all columns: a product with ones.
    codes_O16 = tl.zeros([BLOCK_O, 16], dtype=tl.int32)
    for step in range(first, last):
        n_N = step * BLOCK_I + tl.arange(0, BLOCK_I)
        mask_ON, mask_NT = real_O[:, None], real_T[None, :]
        if INPUTS % BLOCK_I:
            mask_ON, mask_NT = mask_ON & (n_N < INPUTS)[None, :], mask_NT & (n_N < INPUTS)[:, None]
        code_ON = tl.load(weight_ptr + o_O[:, None] * INPUTS + n_N[None, :], mask=mask_ON, other=0)
        x_NT = tl.load(x_ptr + t_T[None, :] * INPUTS + n_N[:, None], mask=mask_NT, other=0)
        sum_OT = tl.dot(code_ON, x_NT, sum_OT, out_dtype=tl.int32)
        if ZERO:
            ones_N16 = tl.full([BLOCK_I, 16], 1, dtype=tl.int8)
            codes_O16 = tl.dot(code_ON, ones_N16, codes_O16, out_dtype=tl.int32)
    if ZERO:
        sum_OT -= tl.max(codes_O16, axis=1)[:, None] * tl.load(zero_ptr).to(tl.int32)

    at_OT = (split * T + t_T)[None, :] * OUTPUTS + o_O[:, None]
    mask_OT = real_O[:, None] & real_T[None, :]
    if SPLITS > 1:
        tl.store(out_ptr + at_OT, sum_OT, mask=mask_OT)
    else:
        row_scale_T = tl.load(row_scale_ptr + t_T, mask=real_T, other=0.0)
        out_OT = sum_OT.to(tl.float32) * row_scale_T[None, :]
        out_OT *= tl.load(scale_ptr + o_O, mask=real_O, other=0.0)[:, None]
        if BIASED:
            out_OT += tl.load(bias_ptr + o_O, mask=real_O, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at_OT, out_OT.to(out_ptr.dtype.element_ty), mask=mask_OT)


@operation
def coded_product(
    x_TI: Tensor,
    words: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    code: str,
    segment: int,
    count: int,
) -> Tensor:
    """x_TI @ weight.T + bias -> (T, O), over `count` splits of the inputs. x is contiguous.

    words: int32 (O, words). code: that of the format. segment: inputs of a tile that share a scale.
    """
    (T, inputs), (outputs, groups) = x_TI.shape, scale.shape
    tile = tile_for(T, x_TI.dtype == torch.float32)
    size, dtype = ((T, outputs), x_TI.dtype) if count == 1 else ((count, T, outputs), torch.float32)
    out = torch.empty(size, dtype=dtype, device=x_TI.device)
    # Tensors that a kernel doesn't read are passed another one.
    sums_TG = scale if shift is None else x_TI.float().view(T, groups, -1).sum(-1)
    wrap_triton(_coded)[(-(-T // tile.rows), -(-outputs // tile.outputs), count)](
        x_TI,
        words,
        scale,
        scale if shift is None else shift,
        sums_TG,
        scale if codebook is None else codebook,
        scale if bias is None else bias,
        out,
        T,
        OUTPUTS=outputs,
        INPUTS=inputs,
        GROUPS=groups,
        SPLITS=count,
        CODE=code,
        SLOTS=inputs // words.shape[1],
        SEGMENT=segment,
        FACTOR=WHOLE if code in ("int8", "int4") else 1.0,
        SHIFTED=shift is not None,
        BIASED=bias is not None,
        BLOCK_T=tile.rows,
        BLOCK_O=tile.outputs,
        BLOCK_I=BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if count == 1:
        return out
    total = out.sum(0)
    return (total if bias is None else total + bias.float()).to(x_TI.dtype)


@operation
def integer_product(
    x_TI: Tensor,
    row_scale_T: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    count: int,
) -> Tensor:
    """(x_TI - zero) @ weight.T * row_scale * scale + bias -> (T, O) in `dtype`, over `count` splits of the inputs.

    x, contiguous, and weight are int8; the sums of products are exact.
    """
    (T, inputs), outputs = x_TI.shape, len(weight)
    tile = tile_for(T, False)
    out = torch.empty(
        (T, outputs) if count == 1 else (count, T, outputs),
        dtype=dtype if count == 1 else torch.int32,
        device=x_TI.device,
    )
    wrap_triton(_integers)[(-(-T // tile.rows), -(-outputs // tile.outputs), count)](
        x_TI,
        weight,
        row_scale_T,
        # Tensors that the kernel doesn't read are passed another one.
        scale if zero is None else zero,
        scale,
        scale if bias is None else bias,
        out,
        T,
        OUTPUTS=outputs,
        INPUTS=inputs,
        SPLITS=count,
        ZERO=zero is not None,
        BIASED=bias is not None,
        BLOCK_T=tile.rows,
        BLOCK_O=tile.outputs,
        BLOCK_I=BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if count == 1:
        return out
    total = out.sum(0, dtype=torch.int32).float() * row_scale_T[:, None] * scale[:, 0]
    return (total if bias is None else total + bias.float()).to(dtype)
