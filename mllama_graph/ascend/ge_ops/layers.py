"""GE operations of layers: matrix products, norms, rotary embedding, and the write to K/V pages."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_graph.ascend.ge_ops.registry import integers, operation, require, rounded

# ---- products


@operation("MatMul", "MatMulV2", source="IR MatMul, MatMulV2")
def matmul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    *,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    offset_x: int = 0,
) -> Tensor:
    require(
        x1.dim() == x2.dim() == 2 and x1.dtype == x2.dtype and offset_x == 0, "two matrices of one dtype are needed"
    )
    # ops-nn, mat_mul_v3_def.cpp, ascend910b: a bias is fp32, or fp16 for fp16.
    bias_dtypes = (torch.float32, torch.float16) if x1.dtype == torch.float16 else (torch.float32,)
    require(
        bias is None or bias.dtype in bias_dtypes,
        f"no kernel adds a bias in {bias.dtype if bias is not None else None} to {x1.dtype}",
    )
    a, b = x1.T if transpose_x1 else x1, x2.T if transpose_x2 else x2
    return rounded(F.linear(a.float(), b.T.float(), None if bias is None else bias.float()), x1)


@operation("Conv2D", source="IR Conv2D; TF Conv2D, in NCHW")
def conv2d(
    x: Tensor,
    filter_: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int] = (1, 1, 1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1, 1, 1),
    groups: int = 1,
    data_format: str = "NCHW",
    offset_x: int = 0,
    input_layout_info: object = None,
    output_layout_info: object = None,
) -> Tensor:
    require(data_format == "NCHW" and offset_x == 0, f"{data_format} with offset {offset_x} is not known")
    require(pads[0] == pads[1] and pads[2] == pads[3], f"uneven pads {pads} are not known")
    y = F.conv2d(
        x.float(),
        filter_.float(),
        None if bias is None else bias.float(),
        list(strides[2:]),
        (pads[0], pads[2]),
        list(dilations[2:]),
        groups,
    )
    return rounded(y, x)


# ---- norms


def _rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    require(x.dtype == gamma.dtype, f"docs npu_rms_norm: gamma is {gamma.dtype} for x of {x.dtype}, they must be equal")
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return rounded(wide * scale * gamma.float(), x), scale


@operation("SoftmaxV2", source="IR SoftmaxV2; torch.nn.functional.softmax")
def softmax(x: Tensor, *, axes: Sequence[int] = (-1,), half_to_float: bool = False) -> Tensor:
    require(len(axes) == 1, f"SoftmaxV2 over the axes {list(axes)} is not known")
    return rounded(x.float().softmax(axes[0]), x)


@operation("RmsNorm", source="docs npu_rms_norm")
def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return _rms(x, gamma, epsilon)


@operation("AddRmsNorm", source="IR AddRmsNorm; docs npu_rms_norm on x1 + x2")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "both summands must have one shape and dtype")
    total = rounded(x1.float() + x2.float(), x1)
    return (*_rms(total, gamma, epsilon), total)


@operation("LayerNormV4", source="IR LayerNormV4; torch.nn.functional.layer_norm")
def layer_norm(
    x: Tensor,
    normalized_shape: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, wide = integers(normalized_shape), x.float()
    weight, bias = (None if parameter is None else parameter.float() for parameter in (gamma, beta))
    y = F.layer_norm(wide, shape, weight, bias, epsilon)
    axes = tuple(range(-len(shape), 0))
    mean = wide.mean(axes, keepdim=True)
    return rounded(y, x), mean, torch.rsqrt((wide - mean).pow(2).mean(axes, keepdim=True) + epsilon)


# ---- positions and pages


@operation("RotaryMul", source="docs npu_rotary_mul, mode half")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    require(x.dim() == r1.dim() == r2.dim() == 4, "docs npu_rotary_mul: all inputs have 4 axes")
    B, S, N, D = x.shape
    # The one layout that is used here: x in BSND, cos (r1) and sin (r2) in 1S1D.
    require(
        tuple(r1.shape) == tuple(r2.shape) == (1, S, 1, D),
        f"cos {tuple(r1.shape)} is not 1S1D of x {tuple(x.shape)} in BSND",
    )
    require(x.dtype == r1.dtype == r2.dtype, f"{x.dtype} is rotated by {r1.dtype} and {r2.dtype}")
    require(
        B < 1000 and N < 1000 and D < 896 and D % 2 == 0,
        f"docs npu_rotary_mul: B, N < 1000 and an even D < 896, not {B, N, D}",
    )
    require(bool((r1.abs() <= 1).all() and (r2.abs() <= 1).all()), "docs npu_rotary_mul: cos and sin lie in [-1, 1]")
    low, high = x.float().chunk(2, -1)
    return rounded(x.float() * r1.float() + torch.cat((-high, low), -1) * r2.float(), x)


_SCATTER_DOCS = "docs npu_scatter_pa_kv_cache: "
# Kernels of a 910B (ops-transformer, scatter_pa_kv_cache of CANN 8.5 to 9.1). The docs name more dtypes.
SCATTERED = (torch.float16, torch.bfloat16, torch.int8)


@operation(
    "ScatterPaKvCache", source="docs npu_scatter_pa_kv_cache, second form", overwritten=("key_cache", "value_cache")
)
def scatter_pages(
    key: Tensor,
    key_cache: Tensor,
    slot_mapping: Tensor,
    value: Tensor,
    value_cache: Tensor,
    *,
    cache_mode: str = "Norm",
    scatter_mode: str = "None",
    strides: Sequence[int] = (1, 1),
    offsets: Sequence[int] = (0, 0),
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    require(cache_mode == "Norm" and scatter_mode == "None", f"modes {cache_mode!r}, {scatter_mode!r} are not known")
    require(
        tuple(strides) == (1, 1) and tuple(offsets) == (0, 0), f"strides {strides}, offsets {offsets} are not known"
    )
    require(
        len({t.dtype for t in (key, value, key_cache, value_cache)}) == 1,
        _SCATTER_DOCS + "keys, values and caches have one dtype",
    )
    require(key.dtype in SCATTERED or wide, f"scatter_pa_kv_cache of CANN 8.5 to 9.1 has no kernel for {key.dtype}")
    require(
        slot_mapping.dtype in (torch.int32, torch.int64),
        _SCATTER_DOCS + f"slots are int32 or int64, not {slot_mapping.dtype}",
    )
    slots = slot_mapping.long()
    for rows, cache in ((key, key_cache), (value, value_cache)):
        require(
            cache.dim() == 4
            and rows.dim() == 3
            and rows.shape[1:] == cache.shape[2:]
            and rows.shape[:1] == slots.shape,
            _SCATTER_DOCS
            + f"rows {tuple(rows.shape)} with {tuple(slots.shape)} slots don't fit pages {tuple(cache.shape)}",
        )
        require(
            bool(((slots >= 0) & (slots < cache.shape[0] * cache.shape[1])).all()),
            _SCATTER_DOCS + "a slot is outside of the pages",
        )
    require(len(slots.unique()) == len(slots), _SCATTER_DOCS + "slots are not unique")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slots] = rows
    return key_cache, value_cache


@operation("ScatterNdUpdate", source="docs npu_scatter_nd_update_", overwritten=("var",))
def scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor, *, use_locking: bool = False) -> Tensor:
    docs, depth = "docs npu_scatter_nd_update_: ", indices.shape[-1]
    require(var.dtype == updates.dtype, docs + f"updates in {updates.dtype} of {var.dtype}")
    require(indices.dtype in (torch.int32, torch.int64), docs + f"indices are int32 or int64, not {indices.dtype}")
    require(
        indices.dim() > 1 and updates.shape == (*indices.shape[:-1], *var.shape[depth:]),
        docs + f"updates {tuple(updates.shape)} with indices {tuple(indices.shape)} don't fit {tuple(var.shape)}",
    )
    places = indices.reshape(-1, depth).long()
    sizes = torch.tensor(var.shape[:depth])
    require(bool(((places >= 0) & (places < sizes)).all()), docs + "an index is out of bounds")
    require(len(places.unique(dim=0)) == len(places), "a place is updated twice, in no defined order")
    var[tuple(places.T)] = updates.reshape(-1, *var.shape[depth:])
    return var
