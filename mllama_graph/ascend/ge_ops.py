"""What every operation of a GE graph computes, in plain PyTorch, and the documented rules that nothing else checks.

One function an operation. Its parameters are the inputs and, behind the star, the attributes by their names in the
graph, with the IR's defaults: an input or attribute that it doesn't list is refused. `source` names what defines it:

    IR NAME      the operator's definition, REG_OP(NAME), in torch_npu/dynamo/torchair: _ge_concrete_graph/
                 auto_generated_ge_raw_ops.py, _ge_concrete_graph/ge_apis.py or ge/_ge_graph.py
    docs NAME    torch_npu/_op_plugin_docs.py under NAME: formula, layouts, dtypes, limits
    ONNX / TF    CANN's IR says "compatible with" that operator

Arithmetic on 16-bit tensors is in fp32, rounded once at the end of an operation. Kernels may round elsewhere: that is
not shown here.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

INT_MAX = 2147483647
# docs npu_fused_infer_attention_score: side of the fixed mask of the causal modes.
MASK_SIDE = 2048
SIXTEEN_BIT = (torch.float16, torch.bfloat16)

# Numbers of ge::DataType, as attributes hold them (torchair.ge.DataType).
DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16,
          9: torch.int64, 11: torch.float64, 12: torch.bool, 27: torch.bfloat16}


class GraphError(ValueError):
    """A graph that breaks a documented rule, or one that the interpreter can't vouch for."""


@dataclass(frozen=True)
class Operation:
    """An entry of the table. `written` are the inputs that it overwrites, in the order of its outputs."""

    compute: Callable
    source: str
    written: tuple[str, ...]
    inputs: tuple[str, ...]
    lists: tuple[str, ...]
    attributes: tuple[str, ...]

    def parameter(self, name: str) -> str:
        """The parameter that takes the graph's input `name`: x0, x1, ... are one list. Raises GraphError."""
        stem = re.sub(r"\d+$", "", name)
        for parameter in (name, f"{name}_", stem):
            if parameter in self.inputs and (parameter in self.lists) == (parameter == stem != name):
                return parameter
        raise GraphError(f"input {name!r} is not known")


OPERATIONS: dict[str, Operation] = {}


def operation(*names: str, source: str, written: tuple[str, ...] = ()) -> Callable:
    """Enters a function in the table; its signature says which inputs and attributes it knows."""

    def enter(compute: Callable) -> Callable:
        parameters = inspect.signature(compute).parameters.values()
        taken = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        lists = tuple(p.name for p in taken if p.annotation == list[Tensor])
        attributes = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        for name in names:
            OPERATIONS[name] = Operation(compute, source, written, tuple(p.name for p in taken), lists, attributes)
        return compute

    return enter


def rule(holds: bool, text: str) -> None:
    """Raises GraphError with `text` where a documented rule does not hold."""
    if not holds:
        raise GraphError(text)


def ints(x: Tensor) -> list[int]:
    """The numbers of an integer tensor."""
    return [int(value) for value in x.reshape(-1).tolist()]


def rounded(value: Tensor, like: Tensor) -> Tensor:
    """A result in fp32 rounded to the dtype of an input."""
    return value.to(like.dtype)


# ---- shapes


@operation("Identity", source="IR Identity")
def identity(x: Tensor):
    return x


@operation("Reshape", source="IR Reshape")
def reshape(x: Tensor, shape: Tensor, *, axis=0, num_axes=-1):
    rule((axis, num_axes) == (0, -1), "Reshape of a part of the axes is not known")
    return x.reshape(ints(shape))


@operation("Unsqueeze", source="IR Unsqueeze; ONNX Unsqueeze")
def unsqueeze(x: Tensor, *, axes=()):
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


@operation("Transpose", source="IR Transpose; TF Transpose")
def transpose(x: Tensor, perm: Tensor):
    return x.permute(ints(perm)).contiguous()


@operation("BroadcastTo", source="IR BroadcastTo; TF BroadcastTo")
def broadcast_to(x: Tensor, shape: Tensor):
    # torchair writes -1 for an axis that stays.
    return x.expand(ints(shape)).contiguous()


@operation("ConcatV2", source="IR ConcatV2; TF ConcatV2")
def concat(x: list[Tensor], concat_dim: Tensor, *, N=None):
    rule(N == len(x), f"N={N} for {len(x)} inputs")
    return torch.cat(x, int(concat_dim))


@operation("Pack", source="IR Pack; TF Pack")
def pack(x: list[Tensor], *, axis=0, N=None):
    rule(N == len(x), f"N={N} for {len(x)} inputs")
    return torch.stack(x, axis)


@operation("SplitV", source="IR SplitV; TF SplitV")
def split(x: Tensor, size_splits: Tensor, split_dim: Tensor, *, num_split=None):
    sizes, axis = ints(size_splits), int(split_dim)
    rule(num_split == len(sizes), f"num_split={num_split} for {len(sizes)} sizes")
    sizes = [x.shape[axis] - sum(sizes) - 1 if size == -1 else size for size in sizes]
    return tuple(part.contiguous() for part in torch.split(x, sizes, axis))


@operation("StridedSliceV2", source="IR StridedSliceV2; ONNX Slice")
def strided_slice(x: Tensor, begin: Tensor, end: Tensor, axes: Tensor, strides: Tensor, *, begin_mask=0, end_mask=0,
                  ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0):
    masks = (begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_axis_mask)
    rule(not any(masks), f"masks {masks} are not known")
    index = [slice(None)] * x.dim()
    for axis, start, stop, step in zip(*map(ints, (axes, begin, end, strides)), strict=True):
        index[axis] = slice(start, stop, step)
    return x[tuple(index)].contiguous()


@operation("PadV3", source="IR PadV3; ONNX Pad")
def pad(x: Tensor, paddings: Tensor, constant_values: Optional[Tensor] = None, *, mode="constant",
        paddings_contiguous=True):
    rule(mode == "constant" and paddings_contiguous,
         f"mode {mode!r}, paddings_contiguous={paddings_contiguous} are not known")
    # One pair (before, after) an axis; F.pad wants the last axis first.
    pairs = paddings.view(-1, 2).flip(0)
    return F.pad(x, ints(pairs), value=0 if constant_values is None else constant_values.item())


@operation("GatherV2", source="IR GatherV2; TF GatherV2")
def gather(x: Tensor, indices: Tensor, axis: Tensor, *, batch_dims=0, is_preprocessed=False,
           negative_index_support=False):
    rule(batch_dims == 0 and not is_preprocessed, "batch_dims and preprocessed indices are not known")
    at, flat = int(axis), indices.reshape(-1).long()
    if negative_index_support:
        flat = torch.where(flat < 0, flat + x.shape[at], flat)
    rule(bool(((flat >= 0) & (flat < x.shape[at])).all()), f"an index is outside of 0 .. {x.shape[at] - 1}")
    return x.index_select(at, flat).view(*x.shape[:at], *indices.shape, *x.shape[at + 1:])


# ---- numbers


@operation("Cast", source="IR Cast")
def cast(x: Tensor, *, dst_type=None):
    rule(dst_type in DTYPES, f"dst_type {dst_type} is not known")
    return x.to(DTYPES[dst_type])


@operation("Range", source="IR Range; TF Range")
def range_of(start: Tensor, limit: Tensor, delta: Tensor, *, is_closed=False):
    rule(not is_closed, "a closed Range is not known")
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operation("Fill", source="IR Fill; TF Fill")
def fill(dims: Tensor, value: Tensor):
    return torch.full(ints(dims), value.item(), dtype=value.dtype)


def _elementwise(name: str, source: str, function: Callable) -> None:
    """Operations of two operands that broadcast, both of one dtype."""

    @operation(name, source=source)
    def compute(x1: Tensor, x2: Tensor):
        rule(x1.dtype == x2.dtype, f"{x1.dtype} and {x2.dtype} are mixed")
        return function(x1, x2)


# One operation, so that 16-bit operands are rounded once, as PyTorch does.
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


@operation("Sxpy", source="IR Sxpy; torchair's converter of aten.rsub: x1 - alpha * x2")
def sxpy(x1: Tensor, x2: Tensor, alpha: Optional[Tensor] = None):
    scale = 1 if alpha is None else alpha.item()
    return rounded(x1.float() - scale * x2.float(), x2)


@operation("ReduceSum", source="IR ReduceSum; TF Sum")
def reduce_sum(x: Tensor, axes: Tensor, *, keep_dims=False, noop_with_empty_axes=True):
    rule(axes.numel() > 0, "a sum over no axes is not known")
    wide = x.float() if x.is_floating_point() else x
    return wide.sum(ints(axes), keepdim=keep_dims).to(x.dtype)


@operation("ClipByValueV2", source="IR ClipByValueV2")
def clip(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor):
    rule(x.dtype == clip_value_min.dtype == clip_value_max.dtype, "the limits must have the dtype of x")
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max)


@operation("SelectV2", source="IR SelectV2; TF SelectV2")
def select(condition: Tensor, then: Tensor, else_: Tensor):
    rule(condition.dtype == torch.bool and then.dtype == else_.dtype, "bool condition and two equal dtypes are needed")
    return torch.where(condition, then, else_)


@operation("Cos", source="IR Cos; TF Cos")
def cos(x: Tensor):
    return x.cos()


@operation("Sin", source="IR Sin; TF Sin")
def sin(x: Tensor):
    return x.sin()


@operation("Tanh", source="IR Tanh; TF Tanh")
def tanh(x: Tensor):
    return x.tanh()


@operation("GeluV2", source="IR GeluV2; torch.nn.functional.gelu: approximate none is the exact one (erf)")
def gelu(x: Tensor, *, approximate="none"):
    rule(approximate in ("none", "tanh"), f"approximate {approximate!r} is not known")
    return rounded(F.gelu(x.float(), approximate=approximate), x)


@operation("SwiGlu", source="docs npu_swiglu: swish(a) * b of the two halves")
def swiglu(x: Tensor, *, dim=-1):
    a, b = x.float().chunk(2, dim)
    return rounded(F.silu(a) * b, x)


# ---- products


@operation("MatMul", "MatMulV2", source="IR MatMul, MatMulV2")
def matmul(x1: Tensor, x2: Tensor, bias: Optional[Tensor] = None, *, transpose_x1=False, transpose_x2=False,
           offset_x=0):
    rule(x1.dim() == x2.dim() == 2 and x1.dtype == x2.dtype and offset_x == 0, "two matrices of one dtype are needed")
    a, b = x1.T if transpose_x1 else x1, x2.T if transpose_x2 else x2
    return rounded(F.linear(a.float(), b.T.float(), None if bias is None else bias.float()), x1)


@operation("Conv2D", source="IR Conv2D; TF Conv2D, in NCHW")
def conv2d(x: Tensor, filter: Tensor, bias: Optional[Tensor] = None, *, strides=(1, 1, 1, 1), pads=(0, 0, 0, 0),
           dilations=(1, 1, 1, 1), groups=1, data_format="NCHW", offset_x=0, input_layout_info=None,
           output_layout_info=None):
    rule(data_format == "NCHW" and offset_x == 0, f"{data_format} with offset {offset_x} is not known")
    rule(pads[0] == pads[1] and pads[2] == pads[3], f"uneven pads {pads} are not known")
    y = F.conv2d(x.float(), filter.float(), None if bias is None else bias.float(), strides[2:], (pads[0], pads[2]),
                 dilations[2:], groups)
    return rounded(y, x)


# ---- norms


def _rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    rule(x.dtype == gamma.dtype, f"docs npu_rms_norm: gamma is {gamma.dtype} for x of {x.dtype}, they must be equal")
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return rounded(wide * scale * gamma.float(), x), scale


@operation("RmsNorm", source="docs npu_rms_norm")
def rms_norm(x: Tensor, gamma: Tensor, *, epsilon=1e-6):
    return _rms(x, gamma, epsilon)


@operation("AddRmsNorm", source="IR AddRmsNorm; docs npu_rms_norm on x1 + x2")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon=1e-6):
    rule(x1.shape == x2.shape and x1.dtype == x2.dtype, "both summands must have one shape and dtype")
    total = rounded(x1.float() + x2.float(), x1)
    return (*_rms(total, gamma, epsilon), total)


@operation("LayerNormV4", source="IR LayerNormV4; torch.nn.functional.layer_norm")
def layer_norm(x: Tensor, normalized_shape: Tensor, gamma: Optional[Tensor] = None, beta: Optional[Tensor] = None, *,
               epsilon=1e-5):
    shape, wide = ints(normalized_shape), x.float()
    y = F.layer_norm(wide, shape, *(None if w is None else w.float() for w in (gamma, beta)), epsilon)
    axes = tuple(range(-len(shape), 0))
    mean = wide.mean(axes, keepdim=True)
    return rounded(y, x), mean, torch.rsqrt((wide - mean).pow(2).mean(axes, keepdim=True) + epsilon)


# ---- positions and pages


@operation("RotaryMul", source="docs npu_rotary_mul, mode half")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor):
    rule(x.dim() == r1.dim() == r2.dim() == 4, "docs npu_rotary_mul: all inputs have 4 axes")
    B, S, N, D = x.shape
    # In 1S1D, of x in BSND: the one layout that is used here.
    rule(tuple(r1.shape) == tuple(r2.shape) == (1, S, 1, D),
         f"cos {tuple(r1.shape)} is not 1S1D of x {tuple(x.shape)} in BSND")
    rule(x.dtype == r1.dtype == r2.dtype, f"{x.dtype} is rotated by {r1.dtype} and {r2.dtype}")
    rule(B < 1000 and N < 1000 and D < 896 and D % 2 == 0,
         f"docs npu_rotary_mul: B, N < 1000 and an even D < 896, not {B, N, D}")
    rule(bool((r1.abs() <= 1).all() and (r2.abs() <= 1).all()), "docs npu_rotary_mul: cos and sin lie in [-1, 1]")
    low, high = x.float().chunk(2, -1)
    return rounded(x.float() * r1.float() + torch.cat((-high, low), -1) * r2.float(), x)


@operation("ScatterPaKvCache", source="docs npu_scatter_pa_kv_cache, second form", written=("key_cache", "value_cache"))
def scatter_pages(key: Tensor, key_cache: Tensor, slot_mapping: Tensor, value: Tensor, value_cache: Tensor, *,
                  cache_mode="Norm", scatter_mode="None", strides=(1, 1), offsets=(0, 0)):
    where = "docs npu_scatter_pa_kv_cache: "
    rule(cache_mode == "Norm" and scatter_mode == "None", f"modes {cache_mode!r}, {scatter_mode!r} are not known")
    rule(tuple(strides) == (1, 1) and tuple(offsets) == (0, 0), f"strides {strides}, offsets {offsets} are not known")
    rule(len({t.dtype for t in (key, value, key_cache, value_cache)}) == 1,
         where + "keys, values and caches have one dtype")
    rule(slot_mapping.dtype in (torch.int32, torch.int64),
         where + f"slots are int32 or int64, not {slot_mapping.dtype}")
    slots = slot_mapping.long()
    for rows, cache in ((key, key_cache), (value, value_cache)):
        rule(cache.dim() == 4 and rows.dim() == 3 and rows.shape[1:] == cache.shape[2:]
             and rows.shape[:1] == slots.shape,
             where + f"rows {tuple(rows.shape)} with {tuple(slots.shape)} slots don't fit pages {tuple(cache.shape)}")
        rule(bool(((slots >= 0) & (slots < cache.shape[0] * cache.shape[1])).all()),
             where + "a slot is outside of the pages")
    rule(len(slots.unique()) == len(slots), where + "slots are not unique")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slots] = rows
    return key_cache, value_cache


# ---- attention


@operation("FusedInferAttentionScore", source="docs npu_fused_infer_attention_score")
def attention(query: Tensor, key0: Tensor, value0: Tensor, atten_mask: Optional[Tensor] = None,
              actual_seq_lengths_kv: Optional[Tensor] = None, block_table: Optional[Tensor] = None, *, num_heads=1,
              num_key_value_heads=0, scale=1.0, input_layout="BSH", sparse_mode=0, inner_precise=0, block_size=0,
              pre_tokens=INT_MAX, next_tokens=INT_MAX, antiquant_mode=0, key_antiquant_mode=0, value_antiquant_mode=0,
              query_quant_mode=0, softmax_lse_flag=False, pse_type=0, out_dtype=0, wide=False):
    """Layout BSH, contiguous or paged keys, no quantisation. `wide` allows fp32, which no kernel takes."""
    unused = (pre_tokens != INT_MAX, next_tokens != INT_MAX, antiquant_mode, key_antiquant_mode, value_antiquant_mode,
              query_quant_mode, softmax_lse_flag, pse_type, out_dtype)
    rule(not any(unused), "quantisation, token windows, pse and softmax_lse are not known")
    rule(input_layout == "BSH", f"layout {input_layout!r} is not known")
    kv_heads = num_key_value_heads or num_heads
    B, R, D = query.shape[0], query.shape[1], query.shape[2] // num_heads
    _check_heads(query, key0, value0, num_heads, kv_heads, D, wide)
    paged = block_table is not None
    if paged:
        lengths = _check_pages(key0, block_table, actual_seq_lengths_kv, block_size, B, R)
        columns = block_table.shape[1] * block_size
    else:
        rule(actual_seq_lengths_kv is None and block_size == 0, "lengths without pages are not known")
        rule(key0.shape[0] == B, _DOCS + f"{key0.shape[0]} sequences of keys for {B} of queries")
        lengths, columns = [key0.shape[1]] * B, key0.shape[1]
    _check_mask(atten_mask, sparse_mode, inner_precise, B, R, columns)
    outs = []
    for b, length in enumerate(lengths):
        if paged:
            pages = block_table[b, :-(-length // block_size)].long()
            rule(bool(((pages >= 0) & (pages < key0.shape[0])).all()),
                 f"block table {b} names a page that is not there")
            k, v = (data[pages].view(-1, kv_heads, D)[:length] for data in (key0, value0))
        else:
            k, v = (data[b].view(-1, kv_heads, D) for data in (key0, value0))
        unseen = None
        if R > 1 and sparse_mode == 3:
            unseen = torch.arange(length)[None, :] > torch.arange(R)[:, None] + length - R
        elif atten_mask is not None:
            unseen = atten_mask[b if atten_mask.shape[0] > 1 else 0, 0, :, :length].bool()
        outs.append(_attend(query[b].view(R, num_heads, D), k, v, unseen, scale))
    # softmax_lse is not asked for, and nothing may read it.
    return torch.stack(outs).view(B, R, num_heads * D).to(query.dtype), None


_DOCS = "docs npu_fused_infer_attention_score: "


def _check_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, D: int, wide: bool) -> None:
    allowed = (*SIXTEEN_BIT, torch.float32) if wide else SIXTEEN_BIT
    rule(q.dtype == k.dtype == v.dtype and q.dtype in allowed, _DOCS + f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    rule(q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape,
         _DOCS + "BSH tensors have 3 axes, K and V one shape")
    rule(q.shape[2] == heads * D and k.shape[2] == kv_heads * D,
         _DOCS + f"{q.shape[2]} and {k.shape[2]} are not heads * {D}")
    rule(heads % kv_heads == 0 and heads // kv_heads <= 64,
         _DOCS + f"{heads} query heads over {kv_heads} key-value heads")
    rule(q.shape[0] <= 65536 and heads <= 256 and D <= 512, _DOCS + f"B={q.shape[0]}, N={heads}, D={D} are too large")
    rule(D % 16 == 0, _DOCS + f"a head width of {D} is not a multiple of 16")
    rule(q.shape[1] == 1 or heads * D < 65535, _DOCS + f"N * D = {heads * D} is not below 65535")


def _check_pages(pages: Tensor, table: Tensor, lengths: Optional[Tensor], block_size: int, B: int, R: int) -> list[int]:
    """The length of each sequence."""
    multiple, least = (16, 16) if R == 1 else (128, 128)
    rule(block_size == pages.shape[1], f"block_size={block_size}, but pages hold {pages.shape[1]}")
    rule(least <= block_size <= 512 and block_size % multiple == 0,
         _DOCS + f"a page of {block_size} tokens for {R} query rows; a multiple of {multiple} up to 512 is needed")
    rule(pages.numel() < 2**31, _DOCS + f"a cache of {pages.numel()} elements; it must stay below 2^31")
    rule(pages.shape[2] <= 65535, _DOCS + f"KV_N * D = {pages.shape[2]} is above 65535")
    rule(table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == B,
         _DOCS + f"a block table of {table.dtype} {tuple(table.shape)} for {B} sequences")
    rule(lengths is not None and lengths.dtype == torch.int64, _DOCS + "pages need actual_seq_lengths_kv in int64")
    values = ints(lengths)
    rule(len(values) in (1, B), _DOCS + f"{len(values)} lengths for {B} sequences")
    values = values * B if len(values) == 1 else values
    used = [-(-value // block_size) for value in values]
    rule(min(values) >= 0 and max(used) <= table.shape[1],
         _DOCS + f"lengths {values} in a table of {table.shape[1]} pages")
    rule(sum(used) <= pages.shape[0], _DOCS + f"{sum(used)} pages are used by all sequences, {pages.shape[0]} exist")
    return values


def _check_mask(mask: Optional[Tensor], sparse_mode: int, inner_precise: int, B: int, R: int, columns: int) -> None:
    rule(sparse_mode in (0, 3), f"sparse_mode {sparse_mode} is not known")
    rule(inner_precise in ((0, 1) if R == 1 else (0, 1, 2, 3)),
         _DOCS + f"inner_precise {inner_precise} for {R} query rows")
    if mask is not None:
        rule(mask.dtype in (torch.bool, torch.int8, torch.uint8), _DOCS + f"a mask of {mask.dtype}")
    if sparse_mode == 3 and R > 1:
        rule(mask is not None and tuple(mask.shape) == (MASK_SIDE, MASK_SIDE),
             _DOCS + "sparse_mode 3 takes a 2048 x 2048 mask")
        triangle = torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.bool).triu(1)
        rule(bool((mask.bool() == triangle).all()),
             _DOCS + "the mask of sparse_mode 3 hides what lies above the diagonal")
    elif mask is not None:
        rule(tuple(mask.shape) in ((B, 1, R, columns), (1, 1, R, columns)),
             _DOCS + f"a mask {tuple(mask.shape)} for {B} x {R} rows and {columns} columns")
        rule(not bool(mask.bool().all(-1).any()) or inner_precise >= 2,
             _DOCS + "a row is wholly masked, which needs inner_precise 2 or 3")


def _attend(q_RQD: Tensor, k_LKD: Tensor, v_LKD: Tensor, unseen: Optional[Tensor], scale: float) -> Tensor:
    """softmax(scale * q k + mask) v of one sequence in fp32; 0 for a row that sees nothing."""
    group = q_RQD.shape[1] // k_LKD.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k_LKD, v_LKD))
    score = torch.einsum("rqd,lqd->qrl", q_RQD.float(), k) * scale
    if unseen is not None:
        score = score.masked_fill(unseen, -torch.inf)
    return torch.einsum("qrl,lqd->rqd", score.softmax(-1).nan_to_num(0.0), v).reshape(q_RQD.shape[0], -1)


# ---- collectives


def _members(group: str) -> int:
    """How many ranks a group has. Raises GraphError where this process is not one of exactly these."""
    found = re.search(r"rank_list=([\d,]+)", group)
    ranks = [int(rank) for rank in found.group(1).split(",")] if found else []
    rule(dist.is_initialized(), f"group {group!r}, but this process is in none")
    rule(ranks == list(range(dist.get_world_size())), f"group {group!r} is not all of {dist.get_world_size()} ranks")
    return len(ranks)


@operation("HcomAllReduce", source="IR HcomAllReduce")
def all_reduce(x: Tensor, *, reduction=None, group=None, fusion=1, fusion_id=-1):
    rule(reduction == "sum" and fusion_id == -1, f"reduction {reduction!r}, fusion_id {fusion_id} are not known")
    _members(group)
    # The sum is in fp32 and rounded once; HCCL's order and rounding are not shown here.
    total = x.float()
    total = total.clone() if total is x else total
    dist.all_reduce(total)
    return rounded(total, x)


@operation("HcomAllGather", source="IR HcomAllGather: along axis 0")
def all_gather(x: Tensor, *, rank_size=None, group=None, fusion=0, fusion_id=-1):
    rule(_members(group) == rank_size and fusion_id == -1,
         f"rank_size {rank_size}, fusion_id {fusion_id} are not known")
    parts = [torch.empty_like(x) for _ in range(rank_size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
