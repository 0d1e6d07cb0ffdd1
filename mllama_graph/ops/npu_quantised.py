"""Quantised linear layers on an NPU: the layout of their weights, and the operations that read it.

Never run on an NPU. Sources, beside "docs" of npu.py: "aclnn NAME" is the page of that operation in CANN's ops-nn.

    float activations    npu_weight_quant_batchmatmul: (code + offset) * scale, scale and offset in the dtype of x
    dynamic activations  npu_dynamic_quant, then npu_quant_matmul with a scale per row
    static activations   npu_quantize, then npu_quant_matmul; an int32 bias takes away what the code of zero adds
    one scale per row    weights (out, in), passed as a transposed view (docs npu_weight_quant_batchmatmul: faster in
                         ND). CANN's fusion passes turn the Transpose into a flag of the product.
    groups               weights (in, out) (aclnn WeightQuantBatchMatmulV2: faster for groups)
    NZ                   int8 with one scale per row: (in, out) (same page). Others have no kernel there and stay ND.
    4 bits               eight codes of the last axis in an int32, the first in its lowest bits, two's complement (aclnn
                         ConvertWeightToINT4Pack)
"""

from collections.abc import Callable

import torch
import torch_npu
from torch import Tensor, nn

from mllama_graph.model.codes import pack, unpack
from mllama_graph.model.formats import DYNAMIC, FLOAT, Format
from mllama_graph.model.tree import Linear, Weights, linears

# The smallest scale of a row: a row of zeros is divided by it.
LEAST = 1e-30
# Flips the sign bit of both 4-bit codes of a byte: codes that count from -8 become two's complement.
SIGNS = 0x88


def grouped(form: Format, inputs: int) -> bool:
    """Whether several scales share an output. A group as wide as the layer is none (docs: groups of at most K - 1)."""
    return form.groups(inputs) > 1


def inputs_first(form: Format, inputs: int, nz: bool) -> bool:
    """Whether a weight is stored as (in, out)."""
    return grouped(form, inputs) or in_tiles(form, inputs, nz)


def in_tiles(form: Format, inputs: int, nz: bool) -> bool:
    """Whether a weight is cast to NZ."""
    return nz and form.code == "int8" and not grouped(form, inputs)


def lay_out(weights: Weights, dtype: torch.dtype, nz: bool = False) -> None:
    """Convert quantised layers in place to what `linear` reads, on the host. dtype: of activations."""
    for leaf in linears(weights):
        if leaf.format:
            _lay_out(leaf, leaf.format, dtype, nz)


def _lay_out(leaf: Linear, form: Format, dtype: torch.dtype, nz: bool) -> None:
    assert leaf.scale is not None
    device, scale_OG = leaf.weight.device, leaf.scale.cpu()
    inputs = leaf.weight.shape[1] * 8 // form.bits
    laid: dict[str, Tensor] = {}
    if inputs_first(form, inputs, nz):
        codes_OI = unpack(leaf.weight.cpu(), form)
        laid["weight"] = pack(codes_OI.T, form).contiguous()
    if form.code == "int4":
        laid["weight"] = (laid.get("weight", leaf.weight.cpu()) ^ SIGNS).view(torch.int32)
    bias_dtype = torch.float32
    if form.activations == FLOAT:
        found = {"scale": scale_OG}
        if leaf.shift is not None:
            found["shift"] = leaf.shift.cpu() / torch.where(scale_OG != 0, scale_OG, 1.0)
        for name, value in found.items():
            laid[name] = (value.T.contiguous() if grouped(form, inputs) else value[:, 0]).to(dtype)
        # docs: a bias in fp32 for x in bf16, and in fp16 for fp16.
        bias_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    elif form.activations == DYNAMIC:
        laid["scale"] = scale_OG[:, 0]
    else:
        assert leaf.input_scale is not None and leaf.input_zero is not None
        laid["input_zero"] = leaf.input_zero.cpu().to(torch.int32)
        laid["shift"] = -laid["input_zero"] * leaf.weight.cpu().sum(1, dtype=torch.int32)
        laid["scale"] = scale_OG[:, 0] * leaf.input_scale.cpu()
        bias_dtype = dtype
    if leaf.bias is not None:
        laid["bias"] = leaf.bias.cpu().to(bias_dtype)
    for name, value in laid.items():
        leaf.register_parameter(name, nn.Parameter(value.to(device), requires_grad=False))


def linear(x: Tensor, leaf: Linear, nz: bool, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """x @ weight.T + bias in the dtype of x, for a layer that `lay_out` has converted.

    over_ranks: the largest value of all ranks, for layers of which each rank has a part of the inputs.
    """
    assert leaf.format and leaf.scale is not None
    form, rows_TI = leaf.format, x.flatten(0, -2)
    inputs = rows_TI.shape[1]
    if leaf.order is not None:
        rows_TI = rows_TI.index_select(1, leaf.order)
    weight = leaf.weight if inputs_first(form, inputs, nz) else leaf.weight.transpose(0, 1)
    if form.activations == FLOAT:
        size = form.group if grouped(form, inputs) else 0
        y = torch_npu.npu_weight_quant_batchmatmul(
            rows_TI, weight, leaf.scale, leaf.shift, bias=leaf.bias, antiquant_group_size=size
        )
        return y.view(*x.shape[:-1], y.shape[-1])
    if form.activations == DYNAMIC:
        codes_TI, per_row = torch_npu.npu_dynamic_quant(rows_TI)
        if over_ranks and leaf.splits_inputs:
            # npu_dynamic_quant takes no scale. In fp32, since scales have the dtype of x (aclnn Quantize).
            per_row = over_ranks(per_row).clamp(min=LEAST)
            codes_TI = torch_npu.npu_quantize(rows_TI.float(), per_row, None, torch.qint8, 0, True)
        y = torch_npu.npu_quant_matmul(
            codes_TI, weight, leaf.scale, pertoken_scale=per_row, bias=leaf.bias, output_dtype=x.dtype
        )
        return y.view(*x.shape[:-1], y.shape[-1])
    assert leaf.input_scale is not None
    codes_TI = torch_npu.npu_quantize(rows_TI.float(), leaf.input_scale, leaf.input_zero, torch.qint8, -1, True)
    y = torch_npu.npu_quant_matmul(codes_TI, weight, leaf.scale, bias=leaf.shift, output_dtype=x.dtype)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if leaf.bias is None else y + leaf.bias
