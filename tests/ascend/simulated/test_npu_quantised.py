"""Quantised linear layers on an NPU, lowered by torchair and executed by the interpreter, against ops/plain.py in fp32.

In 16 bits the oracle gets the same rounded inputs, and scales that the dtype holds. In fp32 ("wide") the graph differs
only in its dtypes.
"""

from dataclasses import replace

import pytest
import torch
from lowered import lower, to_npu
from test_npu_ops import DTYPES, close, normal

from mllama_graph.model.codes import pack, quantise
from mllama_graph.model.formats import CHOICES, STATIC, Format
from mllama_graph.model.tree import Linear
from mllama_graph.ops import npu_quantised
from mllama_graph.ops.npu import npu_ops
from mllama_graph.ops.plain import PLAIN

OUT, INTO = 48, 128
FORMATS = {
    "int8": CHOICES["w8a16"],
    "int8 shifted": Format("int8", shifted=True),
    "int8 grouped": Format("int8", group=64),
    "int4": Format("int4"),
    "int4 one group": Format("int4", group=INTO),
    "int4 grouped": Format("int4", group=32),
    "int4 shifted": Format("int4", group=64, shifted=True),
    "int4 sorted": Format("int4", group=32, sorted=True),
    "dynamic": CHOICES["w8a8"],
    "static": Format("int8", activations=STATIC),
}
EXPECTED = {
    "int8": {"WeightQuantBatchMatmulV2": 1, "Transpose": 1},
    "int4 grouped": {"WeightQuantBatchMatmulV2": 1},
    "dynamic": {"DynamicQuant": 1, "QuantBatchMatmulV3": 1, "Transpose": 1},
    "static": {"Cast": 1, "Unsqueeze": 2, "Quantize": 1, "QuantBatchMatmulV3": 1, "Transpose": 1},
}


def module(form, dtype, bias=False, out=OUT, into=INTO):
    """A quantised layer in its canonical layout, with scales and bias that `dtype` holds and zero points 0 .. 15."""
    whole = replace(form, shifted=False, sorted=False, activations="float")
    found = quantise(normal(out, into) / into**0.5, whole)
    leaf = Linear()
    leaf.format = form
    scale = found.scale.to(dtype).float()
    given = {"weight": pack(found.codes, form), "scale": scale}
    if form.shifted:
        zero = torch.randint(-7, 8, scale.shape, generator=torch.Generator().manual_seed(1))
        given["shift"] = -zero * scale
    if form.sorted:
        given["order"] = torch.randperm(into, generator=torch.Generator().manual_seed(2)).int()
    if form.activations == STATIC:
        given |= {"input_scale": torch.tensor([0.021]), "input_zero": torch.tensor([-3.0])}
    if bias:
        given["bias"] = normal(out, dtype=dtype)
    for name, value in given.items():
        leaf.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return leaf


def laid_out(leaf, dtype, nz=False):
    """A copy of a layer on the simulated device, in the layout of its operation."""
    copy = Linear()
    copy.format, copy.splits_inputs = leaf.format, leaf.splits_inputs
    for name, value in leaf.named_parameters():
        copy.register_parameter(name, torch.nn.Parameter(value.to("npu"), requires_grad=False))
    root = torch.nn.ModuleList([copy])
    npu_quantised.lay_out(root, dtype, nz)
    return copy


def run(leaf, x, dtype, nz=False):
    """The result of a layer, and its graph's operations."""
    held, ops = laid_out(leaf, dtype, nz), npu_ops(1, nz=nz)
    lowered = lower(lambda x: ops.linear(x, held), wide=dtype == torch.float32)
    with torch.no_grad():
        return lowered(to_npu(x)), lowered.operations


@DTYPES
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_layer_of_each_format(name, bias, dtype):
    leaf, x = module(FORMATS[name], dtype, bias), normal(5, INTO, dtype=dtype)
    if name == "static" and dtype == torch.float16:
        with pytest.raises(Exception, match="an output in fp16 needs a scale of each row"):
            run(leaf, x, dtype)
        return
    got, operations = run(leaf, x, dtype)
    wanted = PLAIN.linear(x.float(), leaf)
    close(got, wanted, dtype, roundings=2 if bias and name == "static" else 1)
    if not bias and dtype == torch.bfloat16 and name in EXPECTED:
        assert operations == EXPECTED[name]


@pytest.mark.parametrize("name", ["int8", "int8 shifted", "dynamic", "static"])
def test_weights_in_tiles_need_no_transpose(name):
    leaf, x = module(FORMATS[name], torch.bfloat16), normal(5, INTO, dtype=torch.bfloat16)
    got, operations = run(leaf, x, torch.bfloat16, nz=True)
    close(got, PLAIN.linear(x.float(), leaf), torch.bfloat16)
    assert "Transpose" not in operations


def test_leading_axes_are_kept():
    leaf, x = module(CHOICES["w8a16"], torch.float32), normal(2, 3, INTO)
    close(run(leaf, x, torch.float32)[0], PLAIN.linear(x, leaf), torch.float32)


@DTYPES
def test_a_row_of_zeros_has_the_result_zero(dtype):
    leaf, x = module(CHOICES["w8a8"], dtype), torch.zeros(3, INTO, dtype=dtype)
    assert not run(leaf, x, dtype)[0].any()
