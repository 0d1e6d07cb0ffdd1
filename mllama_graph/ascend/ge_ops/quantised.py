"""GE operations of quantised layers.

"aclnn NAME" is the page of that operation in CANN's ops-nn, which GE's operators share their kernels with. Codes are
multiplied exactly, as int32 sums are; weights of float activations are computed in fp32 and not rounded before the
product, which a kernel may do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mllama_graph.ascend.ge_ops.layers import add_rms_norm
from mllama_graph.ascend.ge_ops.registry import operation, require, rounded
from mllama_graph.ascend.ge_ops.tensors import ATTRIBUTE_DTYPES

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# docs npu_weight_quant_batchmatmul: K and N; docs npu_quant_matmul: the last axes.
LARGEST = 65535
INT8 = 2
_WEIGHT = "docs npu_weight_quant_batchmatmul: "
_PRODUCT = "docs npu_quant_matmul: "


def _nibbles(packed: Tensor) -> Tensor:
    """The eight signed 4-bit codes of each int32, on a new last axis."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (((packed[..., None] >> shifts) & 15) ^ 8) - 8


def _codes(weight: Tensor, inputs: int) -> Tensor:
    """The codes (K, N) of a weight: int8, or int32 with eight of 4 bits along N, or along K if it was transposed."""
    if weight.dtype == torch.int8:
        return weight
    require(weight.dtype == torch.int32, _WEIGHT + f"weights are int8 or int32, not {weight.dtype}")
    if weight.shape[0] == inputs:
        return _nibbles(weight).flatten(1)
    return _nibbles(weight).transpose(1, 2).flatten(0, 1)


@operation(
    "WeightQuantBatchMatmulV2", source="docs npu_weight_quant_batchmatmul; aclnn WeightQuantBatchMatmulV2: y = x @ "
    "((weight + offset) * scale) + bias"
)  # fmt: skip
def weight_quant_matmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    transpose_x: bool = False,
    transpose_weight: bool = False,
    antiquant_group_size: int = 0,
    dtype: int = -1,
    inner_precise: int = 0,
    wide: bool = False,
) -> Tensor:
    require(not (transpose_x or transpose_weight or inner_precise) and dtype == -1, "these attributes are not known")
    require(
        x.dtype in SIXTEEN_BIT or (wide and x.dtype == torch.float32), _WEIGHT + f"x is fp16 or bf16, not {x.dtype}"
    )
    require(x.dim() == weight.dim() == 2, _WEIGHT + f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are matrices")
    codes, K, scale, group = _codes(weight, x.shape[1]), x.shape[1], antiquant_scale, antiquant_group_size
    N = codes.shape[1]
    require(codes.shape[0] == K, _WEIGHT + f"a weight of {tuple(codes.shape)} for {K} inputs")
    require(K <= LARGEST and N <= LARGEST, _WEIGHT + f"K and N are at most {LARGEST}, not {K} and {N}")
    if group:
        require(group % 32 == 0 and 32 <= group < K, _WEIGHT + f"groups are multiples of 32 below K = {K}, not {group}")
    shapes = ((-(-K // group), N),) if group else ((N,), (1, N), (1,), (1, 1))
    for name, given in (("scale", scale), ("offset", antiquant_offset)):
        if given is not None:
            require(
                tuple(given.shape) in shapes and given.shape == scale.shape,
                _WEIGHT + f"{name} is {tuple(given.shape)}, not {shapes[0]}",
            )
            require(given.dtype == x.dtype, _WEIGHT + f"{name} is {given.dtype} for x of {x.dtype}, they must be equal")
    if bias is not None:
        wanted = torch.float16 if x.dtype == torch.float16 else torch.float32
        require(
            bias.dtype == wanted and tuple(bias.shape) in ((N,), (1, N)),
            _WEIGHT + f"a bias {bias.dtype} {tuple(bias.shape)} for x of {x.dtype} and {N} outputs",
        )

    def of_inputs(t: Tensor) -> Tensor:
        return t.float().repeat_interleave(group, 0)[:K] if group else t.float()

    values = codes.float() if antiquant_offset is None else codes.float() + of_inputs(antiquant_offset)
    y = x.float() @ (values * of_inputs(scale))
    return rounded(y if bias is None else y + bias.float(), x)


@operation("DynamicQuant", source="docs npu_dynamic_quant: scale = max |x| / 127, y = round(x / scale)")
def dynamic_quant(x: Tensor, *, dst_type: int = INT8, wide: bool = False) -> tuple[Tensor, Tensor]:
    require(dst_type == INT8, f"dst_type {dst_type} is not known")
    require(
        (x.dtype in SIXTEEN_BIT or (wide and x.dtype == torch.float32)) and x.dim() > 1,
        f"docs npu_dynamic_quant: x is fp16 or bf16 with at least 2 axes, not {x.dtype} {tuple(x.shape)}",
    )
    scale = x.float().abs().amax(-1) / 127.0
    # The documents say nothing about a row of zeros; its codes are taken as zeros.
    y = x.float() / torch.where(scale > 0, scale, 1.0)[..., None]
    return y.round().to(torch.int8), scale


@operation(
    "AddRmsNormDynamicQuant",
    source="docs npu_add_rms_norm_dynamic_quant, into which torchair fuses AddRmsNorm and DynamicQuant",
)
def add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] = (),
    dst_type: int = INT8,
    wide: bool = False,
) -> tuple[Tensor | None, ...]:
    require(list(output_mask) in ([], [True, False]), f"output_mask {output_mask} is not known")
    # The norm is rounded as the separate operations' is; a fused kernel may keep it in fp32.
    normed, _, total = add_rms_norm(x1, x2, gamma, epsilon=epsilon)
    y, scale = dynamic_quant(normed, dst_type=dst_type, wide=wide)
    return y, None, total, scale, None


@operation(
    "AddRmsNormCast", source="docs npu_add_rms_norm_cast, into which torchair fuses AddRmsNorm and a Cast to fp32"
)
def add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, scale, total = add_rms_norm(x1, x2, gamma, epsilon=epsilon)
    return normed.float(), normed, scale, total


@operation("Quantize", source="docs npu_quantize, div_mode; aclnn Quantize: round(x / scales + zero_points)")
def quantize(x: Tensor, scales: Tensor, zero_points: Tensor | None = None, *, dtype: str = "", axis: int = 1) -> Tensor:
    require(dtype == "torch.qint8", f"dtype {dtype} is not known")
    sizes = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    for name, given in (("scales", scales), ("zero_points", zero_points)):
        if given is not None:
            require(
                given.numel() == 1 or tuple(given.shape) == sizes,
                f"docs npu_quantize: {name} {tuple(given.shape)} for axis {axis} of x {tuple(x.shape)}",
            )
    require(x.dtype == scales.dtype, f"aclnn Quantize: scales are {scales.dtype} for x of {x.dtype}")
    require(
        zero_points is None or zero_points.dtype == torch.int32, "zero points of other dtypes than int32 are not known"
    )
    y = x.float() / scales.float()
    return (y if zero_points is None else y + zero_points).round().clamp(-128, 127).to(torch.int8)


# docs npu_quant_matmul, table of dtypes for Atlas A2: output -> (scale, bias) of int8 operands.
_COMBINED = {
    torch.bfloat16: ((torch.float32, torch.bfloat16), (torch.int32, torch.bfloat16, torch.float32)),
    torch.float16: ((torch.float32,), (torch.int32, torch.float16, torch.float32)),
    torch.float32: ((torch.float32,), (torch.int32, torch.float32)),
}


@operation("QuantBatchMatmulV3", source="docs npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    *,
    dtype: int = INT8,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    wide: bool = False,
) -> Tensor:
    out = ATTRIBUTE_DTYPES.get(dtype)
    require(not (transpose_x1 or transpose_x2), "transpose flags are not known")
    require(out in SIXTEEN_BIT or (wide and out == torch.float32), f"an output of {out} is not known")
    assert out is not None
    require(
        x1.dtype == x2.dtype == torch.int8 and x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0],
        _PRODUCT + f"two int8 matrices, not {x1.dtype} {tuple(x1.shape)} and {x2.dtype} {tuple(x2.shape)}",
    )
    (M, K), N = x1.shape, x2.shape[1]
    require(K <= LARGEST and N <= LARGEST, _PRODUCT + f"last axes are at most {LARGEST}, not {K} and {N}")
    scales, biases = _COMBINED[out]
    require(
        scale.dtype in scales and tuple(scale.shape) in ((1,), (N,)),
        _PRODUCT + f"a scale {scale.dtype} {tuple(scale.shape)} for {N} outputs in {out}",
    )
    require(
        bias is None or (bias.dtype in biases and tuple(bias.shape) in ((N,), (1, N))),
        _PRODUCT + f"a bias {bias.dtype if bias is not None else ''} for an output in {out}",
    )
    require(
        pertoken_scale is not None or out != torch.float16, _PRODUCT + "an output in fp16 needs a scale of each row"
    )
    require(
        pertoken_scale is None or (pertoken_scale.dtype == torch.float32 and tuple(pertoken_scale.shape) == (M,)),
        _PRODUCT + f"one fp32 scale for each of {M} rows",
    )
    total = x1.double() @ x2.double()
    if bias is not None and bias.dtype == torch.int32:
        total, bias = total + bias, None
    y = total.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale[:, None]
    y = y * scale.float()
    return (y if bias is None else y + bias.float()).to(out)
