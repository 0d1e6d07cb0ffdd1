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

# Inputs of a tile, at most.
BLOCK = 128
# An E4M3 code's bits, moved to those of fp16, are the value / 256, as the exponents' biases differ by 8.
FP8_BIAS = 256.0


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
        return Tile(DOT, 64, 4, 2 if wide else 4)
    if wide:
        return Tile(32, 64, 8, 2)
    if rows <= 64:
        return Tile(32 if rows <= 32 else 64, 64, 4, 3)
    return Tile(128, 128, 8, 3)


@jit
def _decode(code, codebook_ptr, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """Values of codes in the dtype of x; those of E4M3 bits divided by FP8_BIAS."""
    if CODE == "int4":
        return (code.to(tl.int8) - 8).to(DTYPE)
    if CODE == "codebook":
        return tl.load(codebook_ptr + code.to(tl.int32)).to(DTYPE)
    if CODE == "fp8" and code.dtype == tl.uint8:
        bits = code.to(tl.uint16)
        return ((bits & 127) << 7 | (bits & 128) << 8).to(tl.float16, bitcast=True).to(DTYPE)
    return code.to(DTYPE)


@jit
def _coded(
    x_ptr,
    weight_ptr,
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
    FACTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """x_TI @ weight.T + bias as out_TO; with SPLITS > 1 out_STO in fp32, to be summed, without bias.

    sums (T, GROUPS): with SHIFTED, the sum of x over each group. FACTOR: what decoded values are to be multiplied by.
    """
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    real_T, real_O = t_T < T, o_O < OUTPUTS
    share: tl.constexpr = (INPUTS + BLOCK_I * SPLITS - 1) // (BLOCK_I * SPLITS)
    first = split * share
    last = tl.minimum(first + share, (INPUTS + BLOCK_I - 1) // BLOCK_I)
    dtype = x_ptr.dtype.element_ty
    # A group consists of whole tiles.
    tiles: tl.constexpr = INPUTS // GROUPS // BLOCK_I if GROUPS > 1 else 1

    out_OT = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    x_T = x_ptr + t_T[None, :] * INPUTS
    for step in range(first, last):
        if GROUPS > 1:
            # Loaded before it is needed, so that products hide the wait.
            scale_O = tl.load(scale_ptr + step // tiles * OUTPUTS + o_O, mask=real_O, other=0.0)
        mask_OB, mask_BT = real_O[:, None], real_T[None, :]
        if CODE == "int4" or CODE == "codebook":
            b_B = tl.arange(0, BLOCK_I // 2)
            low_B = step * BLOCK_I + b_B // 16 * 32 + b_B % 16
            if INPUTS % BLOCK_I != 0:
                # INPUTS is a multiple of 32: a run is inside or outside.
                mask_OB, mask_BT = mask_OB & (low_B < INPUTS)[None, :], mask_BT & (low_B < INPUTS)[:, None]
            at_OB = o_O[:, None] * (INPUTS // 2) + (step * (BLOCK_I // 2) + b_B)[None, :]
            byte_OB = tl.load(weight_ptr + at_OB, mask=mask_OB, other=0)
            low_BT = tl.load(x_T + low_B[:, None], mask=mask_BT, other=0.0)
            high_BT = tl.load(x_T + low_B[:, None] + 16, mask=mask_BT, other=0.0)
            part_OT = tl.dot(
                _decode(byte_OB & 15, codebook_ptr, CODE, dtype),
                low_BT,
                None if GROUPS > 1 else out_OT,
                input_precision="ieee",
            )
            part_OT = tl.dot(_decode(byte_OB >> 4, codebook_ptr, CODE, dtype), high_BT, part_OT, input_precision="ieee")
        else:
            n_B = step * BLOCK_I + tl.arange(0, BLOCK_I)
            if INPUTS % BLOCK_I != 0:
                mask_OB, mask_BT = mask_OB & (n_B < INPUTS)[None, :], mask_BT & (n_B < INPUTS)[:, None]
            code_OB = tl.load(weight_ptr + o_O[:, None] * INPUTS + n_B[None, :], mask=mask_OB, other=0)
            x_BT = tl.load(x_T + n_B[:, None], mask=mask_BT, other=0.0)
            value_OB = _decode(code_OB, codebook_ptr, CODE, dtype)
            part_OT = tl.dot(value_OB, x_BT, None if GROUPS > 1 else out_OT, input_precision="ieee")
        if GROUPS > 1:
            out_OT += part_OT * scale_O[:, None]
            if SHIFTED:
                if step % tiles == 0:
                    shift_O = tl.load(shift_ptr + step // tiles * OUTPUTS + o_O, mask=real_O, other=0.0)
                    sum_T = tl.load(sums_ptr + t_T * GROUPS + step // tiles, mask=real_T, other=0.0)
                    out_OT += shift_O[:, None] * sum_T[None, :]
        else:
            out_OT = part_OT

    if GROUPS == 1:
        out_OT *= tl.load(scale_ptr + o_O, mask=real_O, other=0.0)[:, None] * FACTOR
        if SHIFTED:
            if split == 0:
                shift_O = tl.load(shift_ptr + o_O, mask=real_O, other=0.0)
                out_OT += shift_O[:, None] * tl.load(sums_ptr + t_T, mask=real_T, other=0.0)[None, :]
    elif FACTOR != 1.0:
        out_OT *= FACTOR
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
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    code: str,
    block: int,
    count: int,
) -> Tensor:
    """x_TI @ weight.T + bias -> (T, O), over `count` splits of the inputs. x is contiguous.

    code: that of the format; E4M3 codes may be uint8. block: inputs of a tile, all of one group.
    """
    (T, inputs), (outputs, groups) = x_TI.shape, scale.shape
    tile = tile_for(T, x_TI.dtype == torch.float32)
    size, dtype = ((T, outputs), x_TI.dtype) if count == 1 else ((count, T, outputs), torch.float32)
    out = torch.empty(size, dtype=dtype, device=x_TI.device)
    # Tensors that a kernel doesn't read are passed another one.
    sums_TG = scale if shift is None else x_TI.float().view(T, groups, -1).sum(-1)
    wrap_triton(_coded)[(-(-T // tile.rows), -(-outputs // tile.outputs), count)](
        x_TI,
        weight,
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
        FACTOR=FP8_BIAS if code == "fp8" and weight.dtype == torch.uint8 else 1.0,
        SHIFTED=shift is not None,
        BIASED=bias is not None,
        BLOCK_T=tile.rows,
        BLOCK_O=tile.outputs,
        BLOCK_I=block,
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
