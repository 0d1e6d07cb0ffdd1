"""The graphs of quantised models break no rule; each limit of a quantised layer finds its fault in a modified one."""

from dataclasses import replace

import pytest
import torch_npu
from graphs import CHUNK, DECODE, LEAN, VISION, broken, spec_of

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.graph import Context
from mllama_graph.ascend.lint import lint
from mllama_graph.model.formats import CHOICES, PARTS, STATIC, Format, chosen
from mllama_graph.model.shape import shape_of
from mllama_graph.ops.npu import npu_ops

# The released model's sizes, with one layer of each kind: no weight is allocated.
RELEASED = shortened(shape_of({"model_type": "mllama"}))
# Two cross layers, which read the same vision features.
CROSSES = shortened(shape_of({"model_type": "mllama"}), cross_layers=2)
TEXT, ALL = ("text",), tuple(part for part in PARTS if part != "embedding")


def quantised(form, parts=TEXT, ranks=1, shape=RELEASED, **changes):
    """The spec of graphs whose layers have one format."""
    formats = tuple((path, form) for path, _ in chosen("w8a16", 128, parts, shape, ranks))
    pages = {"num_pages": 64, "num_image_pages": 64}
    return replace(spec_of("base", ranks, formats=formats, **changes), shape=shape, **pages)


def found(spec, bucket, change=None):
    captured = capture(spec, bucket)
    captured = broken(captured, change) if change else captured
    return [f"{finding.rule}: {finding.message}" for finding in lint(captured, Context(spec, bucket))]


NZ = (("weight_format", "nz"),)
PADDED = (*NZ, ("pad_vision_heads", True))
CLEAN = {
    "floating point in tiles, heads padded": (quantised(CHOICES["w8a16"], (), options=PADDED), (VISION, LEAN)),
    "w8a16": (quantised(CHOICES["w8a16"]), (DECODE, VISION, CHUNK)),
    "w8a16 in tiles, two ranks, everything": (quantised(CHOICES["w8a16"], ALL, 2, options=NZ), (DECODE, VISION)),
    "w4a16": (quantised(CHOICES["w4a16"]), (DECODE, VISION)),
    "sorted and shifted": (quantised(Format("int4", group=128, shifted=True, sorted=True)), (LEAN,)),
    "w8a8, two ranks, everything": (quantised(CHOICES["w8a8"], ALL, 2), (DECODE, VISION, CHUNK)),
    "w8a8, two cross layers": (quantised(CHOICES["w8a8"], shape=CROSSES), (VISION,)),
    "w8a8 in tiles": (quantised(CHOICES["w8a8"], options=NZ), (LEAN,)),
    "static, everything": (quantised(Format("int8", activations=STATIC), ALL, 2), (DECODE, VISION)),
}


@pytest.mark.parametrize("name", CLEAN)
def test_the_graphs_of_each_format_break_no_rule(name):
    spec, buckets = CLEAN[name]
    for bucket in buckets:
        assert found(spec, bucket) == []


def test_a_head_of_more_than_65535_outputs_is_found():
    [message] = found(quantised(CHOICES["w8a16"], ("head",)), LEAN)
    assert message.startswith("layouts: WeightQuantBatchMatmulV2 ")
    assert "K and N are at most 65535, not 4096 and 128256, at mllama_graph/model/text.py" in message


@pytest.mark.parametrize(
    ("form", "operation", "change", "text"),
    [
        ("w4a16", "WeightQuantBatchMatmulV2", {"antiquant_group_size": 48}, "groups are multiples of 32"),
        ("w4a16", "WeightQuantBatchMatmulV2", {"antiquant_group_size": 64}, "scale is (32, 6144), not (64, 6144)"),
        ("w8a8", "QuantBatchMatmulV3", {"dtype": 3}, "an output of torch.int32 is not known"),
    ],
)
def test_a_layer_outside_of_its_documented_limits_is_found(form, operation, change, text):
    def changed(ops):
        for name, value in change.items():
            ops[operation].attr[name].i = value

    messages = found(quantised(CHOICES[form]), LEAN, changed)
    assert any(text in message for message in messages), messages


def half_scales(x, leaf):
    return torch_npu.npu_weight_quant_batchmatmul(x, leaf.weight.transpose(0, 1), leaf.scale.half())


def test_scales_in_another_dtype_than_the_activations_are_found():
    spec = quantised(CHOICES["w8a16"], ALL, ranks=2)
    captured = capture(spec, LEAN, replace(npu_ops(2), linear=half_scales))
    [message] = [finding.message for finding in lint(captured, Context(spec, LEAN)) if finding.rule == "layouts"]
    assert "scale is torch.float16 for x of torch.bfloat16, they must be equal" in message


def test_a_transpose_that_something_else_reads_is_found():
    def changed(ops):
        ops["WeightQuantBatchMatmulV2"].input[0] = "Transpose:0"

    messages = found(quantised(CHOICES["w8a16"]), LEAN, changed)
    assert any(message.startswith("weights: Transpose Transpose: rewrites weights.") for message in messages), messages


def test_a_missing_exchange_of_scales_and_one_too_many_are_found():
    int8, weights = quantised(CHOICES["w8a8"], ranks=2), quantised(CHOICES["w8a16"], ranks=2)
    for made, judged, text in (
        (int8, weights, "ranks exchange the scales of weights.text.layers.0.{}.weight without need"),
        (weights, int8, "ranks do not exchange the scales of weights.text.layers.0.{}.weight"),
    ):
        findings = lint(capture(made, LEAN), Context(judged, LEAN))
        messages = [finding.message for finding in findings if finding.rule == "collectives"]
        assert all(any(text.format(end) in message for message in messages) for end in ("o", "down")), messages
