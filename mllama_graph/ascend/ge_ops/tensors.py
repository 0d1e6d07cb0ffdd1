"""GE operations on shapes, integers and single elements."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.ascend.ge_ops.registry import GraphError, integers, operation, require, rounded

# Attributes hold a dtype as a number of ge::DataType (torchair.ge.DataType).
ATTRIBUTE_DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}


# ---- shapes


@operation("Identity", source="IR Identity")
def identity(x: Tensor) -> Tensor:
    return x


@operation("Reshape", source="IR Reshape")
def reshape(x: Tensor, shape: Tensor, *, axis: int = 0, num_axes: int = -1) -> Tensor:
    require((axis, num_axes) == (0, -1), "Reshape of a part of the axes is not known")
    return x.reshape(integers(shape))


@operation("Unsqueeze", source="IR Unsqueeze; ONNX Unsqueeze")
def unsqueeze(x: Tensor, *, axes: Sequence[int] = ()) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


@operation("Transpose", source="IR Transpose; TF Transpose")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(integers(perm)).contiguous()


@operation("BroadcastTo", source="IR BroadcastTo; TF BroadcastTo")
def broadcast_to(x: Tensor, shape: Tensor) -> Tensor:
    # torchair writes -1 for an axis that keeps its size.
    return x.expand(integers(shape)).contiguous()


@operation("ConcatV2", source="IR ConcatV2; TF ConcatV2")
def concat(x: list[Tensor], concat_dim: Tensor, *, N: int | None = None) -> Tensor:
    require(len(x) == N, f"N={N} for {len(x)} inputs")
    return torch.cat(x, int(concat_dim))


@operation("Pack", source="IR Pack; TF Pack")
def pack(x: list[Tensor], *, axis: int = 0, N: int | None = None) -> Tensor:
    require(len(x) == N, f"N={N} for {len(x)} inputs")
    return torch.stack(x, axis)


@operation("SplitV", source="IR SplitV; TF SplitV")
def split(x: Tensor, size_splits: Tensor, split_dim: Tensor, *, num_split: int | None = None) -> tuple[Tensor, ...]:
    sizes, axis = integers(size_splits), int(split_dim)
    require(num_split == len(sizes), f"num_split={num_split} for {len(sizes)} sizes")
    # -1 stands for the remaining size; the sum includes that -1.
    sizes = [x.shape[axis] - sum(sizes) - 1 if size == -1 else size for size in sizes]
    return tuple(part.contiguous() for part in torch.split(x, sizes, axis))


@operation("StridedSliceV2", source="IR StridedSliceV2; ONNX Slice")
def strided_slice(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    axes: Tensor,
    strides: Tensor,
    *,
    begin_mask: int = 0,
    end_mask: int = 0,
    ellipsis_mask: int = 0,
    new_axis_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Tensor:
    masks = (begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_axis_mask)
    require(not any(masks), f"masks {masks} are not known")
    index = [slice(None)] * x.dim()
    for axis, start, stop, step in zip(*map(integers, (axes, begin, end, strides)), strict=True):
        index[axis] = slice(start, stop, step)
    return x[tuple(index)].contiguous()


@operation("PadV3", source="IR PadV3; ONNX Pad")
def pad(
    x: Tensor,
    paddings: Tensor,
    constant_values: Tensor | None = None,
    *,
    mode: str = "constant",
    paddings_contiguous: bool = True,
) -> Tensor:
    require(
        mode == "constant" and paddings_contiguous,
        f"mode {mode!r}, paddings_contiguous={paddings_contiguous} are not known",
    )
    # One pair (before, after) per axis, the first axis first; F.pad takes the last axis first.
    pairs = paddings.view(-1, 2).flip(0)
    return F.pad(x, integers(pairs), value=0 if constant_values is None else constant_values.item())


@operation("GatherV2", source="IR GatherV2; TF GatherV2")
def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor,
    *,
    batch_dims: int = 0,
    is_preprocessed: bool = False,
    negative_index_support: bool = False,
) -> Tensor:
    require(batch_dims == 0 and not is_preprocessed, "batch_dims and preprocessed indices are not known")
    at, flat = int(axis), indices.reshape(-1).long()
    if negative_index_support:
        flat = torch.where(flat < 0, flat + x.shape[at], flat)
    require(bool(((flat >= 0) & (flat < x.shape[at])).all()), f"an index is outside of 0 .. {x.shape[at] - 1}")
    return x.index_select(at, flat).view(*x.shape[:at], *indices.shape, *x.shape[at + 1 :])


# ---- numbers


@operation("Cast", source="IR Cast")
def cast(x: Tensor, *, dst_type: int | None = None) -> Tensor:
    if dst_type not in ATTRIBUTE_DTYPES:
        raise GraphError(f"dst_type {dst_type} is not known")
    return x.to(ATTRIBUTE_DTYPES[dst_type])


@operation("Range", source="IR Range; TF Range")
def range_of(start: Tensor, limit: Tensor, delta: Tensor, *, is_closed: bool = False) -> Tensor:
    require(not is_closed, "a closed Range is not known")
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operation("Fill", source="IR Fill; TF Fill")
def fill(dims: Tensor, value: Tensor) -> Tensor:
    return torch.full(integers(dims), value.item(), dtype=value.dtype)


def _elementwise(name: str, source: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Adds an operation on two operands of one dtype that broadcast."""

    @operation(name, source=source)
    def compute(x1: Tensor, x2: Tensor) -> Tensor:
        require(x1.dtype == x2.dtype, f"{x1.dtype} and {x2.dtype} are mixed")
        return function(x1, x2)


# PyTorch rounds each of these once for 16-bit operands.
_elementwise("Add", "IR Add; TF Add", torch.add)
_elementwise("Sub", "IR Sub; TF Sub", torch.sub)
_elementwise("Mul", "IR Mul; TF Mul", torch.mul)
_elementwise("RealDiv", "IR RealDiv; TF RealDiv", torch.div)
_elementwise("FloorDiv", "IR FloorDiv; TF FloorDiv", lambda a, b: torch.div(a, b, rounding_mode="floor"))
_elementwise("FloorMod", "IR FloorMod; TF FloorMod", torch.remainder)
_elementwise("Less", "IR Less; TF Less", torch.lt)
_elementwise("Greater", "IR Greater; TF Greater", torch.gt)
_elementwise("GreaterEqual", "IR GreaterEqual; TF GreaterEqual", torch.ge)
_elementwise("LogicalAnd", "IR LogicalAnd; TF LogicalAnd", torch.logical_and)
_elementwise("LogicalOr", "IR LogicalOr; TF LogicalOr", torch.logical_or)


@operation("Neg", source="IR Neg; TF Neg")
def neg(x: Tensor) -> Tensor:
    return -x


@operation("ReduceSum", source="IR ReduceSum; TF Sum")
def reduce_sum(x: Tensor, axes: Tensor, *, keep_dims: bool = False, noop_with_empty_axes: bool = True) -> Tensor:
    require(axes.numel() > 0, "a sum over no axes is not known")
    wide = x.float() if x.is_floating_point() else x
    return wide.sum(integers(axes), keepdim=keep_dims).to(x.dtype)


@operation("Exp", source="IR Exp")
def exp(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    require((base, scale, shift) == (-1.0, 1.0, 0.0), "Exp of another base or of a scaled value is not known")
    return rounded(x.float().exp(), x)


# No source says where equal values and NaN are put, so that these two put them where a host must not rely on: the last
# of equal values first, and NaN behind all numbers.


@operation("TopKV2", source="IR TopKV2")
def top_k(x: Tensor, k: Tensor, *, sorted: bool = True, dim: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    require(k.dtype == torch.int32, f"k is {k.dtype}; the IR of CANN 8.5 takes int32 alone")
    require(sorted and largest and dim in (-1, x.dim() - 1), "only the largest of the last axis, sorted, are known")
    order = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flip(-1)
    columns = x.shape[-1] - 1 - order.sort(dim=-1, descending=True, stable=True).indices[..., : int(k)]
    return x.gather(-1, columns), columns.int()


@operation("ArgMaxWithValue", source="IR ArgMaxWithValue")
def arg_max(x: Tensor, *, dimension: int = 0, keep_dims: bool = False) -> tuple[Tensor, Tensor]:
    require(keep_dims and dimension == x.dim() - 1, "only the last axis, kept, is known")
    value, column = top_k(x, torch.tensor(1, dtype=torch.int32))
    return column, value


@operation("ClipByValueV2", source="IR ClipByValueV2")
def clip(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    require(x.dtype == clip_value_min.dtype == clip_value_max.dtype, "the limits must have the dtype of x")
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max)


@operation("SelectV2", source="IR SelectV2; TF SelectV2")
def select(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    require(
        condition.dtype == torch.bool and then.dtype == else_.dtype,
        "a bool condition and two operands of one dtype are needed",
    )
    return torch.where(condition, then, else_)


@operation("Cos", source="IR Cos; TF Cos")
def cos(x: Tensor) -> Tensor:
    return x.cos()


@operation("Sin", source="IR Sin; TF Sin")
def sin(x: Tensor) -> Tensor:
    return x.sin()


@operation("Tanh", source="IR Tanh; TF Tanh")
def tanh(x: Tensor) -> Tensor:
    return x.tanh()


@operation("GeluV2", source="IR GeluV2; torch.nn.functional.gelu, where approximate=none is the exact one (erf)")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    require(approximate in ("none", "tanh"), f"approximate {approximate!r} is not known")
    return rounded(F.gelu(x.float(), approximate=approximate), x)


@operation("SwiGlu", source="docs npu_swiglu: swish(a) * b of the two halves")
def swiglu(x: Tensor, *, dim: int = -1) -> Tensor:
    a, b = x.float().chunk(2, dim)
    return rounded(F.silu(a) * b, x)
