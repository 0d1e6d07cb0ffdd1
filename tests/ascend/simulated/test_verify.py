"""How task=verify judges a graph, and the modelled FLOPs against those of the matrix products in the graph."""

from dataclasses import replace
from math import prod

import pytest
from graphs import CLASSES, DECODE, LEAN, spec_of

from mllama_graph.ascend.capture import capture, shortened, shortened_formats
from mllama_graph.ascend.graph import LoweredGraph
from mllama_graph.ascend.graphdef import attribute, constant, described_shape, inputs_of, metadata
from mllama_graph.model import shape as shapes
from mllama_graph.model.formats import chosen
from mllama_graph.model.table import table
from mllama_graph.plan.cost import work
from mllama_graph.tasks.verify import Job, judge


def shape_of(graph, value):
    made = graph.maker(value)
    return described_shape(made) if made.type == "Data" else metadata(made.output_desc[0]).shape


def products(graph, bucket):
    """Floating-point operations of a graph's matrix products, convolutions and attention, from the graph's shapes.

    Several prompts' rows are spread over B * T rows, of which attention computes T.
    """
    total = 0
    for op in graph.of_type("MatMul", "Conv2D"):
        weight = shape_of(graph, dict(inputs_of(op))["filter" if op.type == "Conv2D" else "x2"])
        total += 2 * prod(metadata(op.output_desc[0]).shape) * prod(weight[1:])
    for op in graph.of_type("FusedInferAttentionScore"):
        inputs, causal = dict(inputs_of(op)), attribute(op.attr["sparse_mode"]) == 3
        paged, prompts, query = "block_table" in inputs, bucket.prompts or bucket, shape_of(graph, inputs["query"])
        several = prompts.rows if prompts.phase == "prefill" and query[1] > 1 else 1
        keys = shape_of(graph, inputs["block_table"])[1] * 128 if paged else shape_of(graph, inputs["key0"])[1]
        length = graph.maker(inputs.get("actual_seq_lengths_kv", inputs["query"]))
        if length.type == "Const":
            keys = int(constant(length)[0])
        if paged and causal:
            # The table's last tokens are a sequence's new rows, of which a row sees half on average.
            keys -= query[1] / several / 2
        total += 4 * prod(query) / several * keys / (2 if causal and not paged else 1)
    return total


@pytest.mark.parametrize("bucket", CLASSES, ids=str)
def test_the_modelled_products_are_those_of_the_graph(bucket):
    spec = replace(spec_of("base"), shape=shortened(spec_of("base").shape))
    graph = LoweredGraph(capture(spec, bucket))
    # The model also counts norms and biases, and leaves out the masked keys of a chunk after earlier pages.
    assert work(spec.shape, spec.page_size, bucket, spec.storage)[1] == pytest.approx(products(graph, bucket), rel=0.02)


def test_a_graph_is_judged_whole_and_shortened():
    spec = spec_of("base")
    whole, short = judge(spec, Job(DECODE, True)), judge(spec, Job(DECODE, False))
    assert whole.findings == short.findings == []
    assert whole.structure
    assert short.structure
    assert whole.operations > short.operations
    assert whole.fused > short.fused
    assert whole.sums == 0
    # Only the vision graph reads the weights of the images' keys and values; the 16 rotary frequencies are fp32.
    text = [entry for entry in table(spec.shape) if entry.path.startswith("text.")]
    read = [2 * prod(entry.shape) for entry in text if not entry.path.endswith((".kv.weight", ".k_norm"))]
    assert whole.weight_bytes == sum(read) + 4 * 16


def test_a_step_that_can_not_be_lowered_is_a_finding(monkeypatch):
    monkeypatch.setattr("mllama_graph.ops.npu.swiglu", lambda h_TF: h_TF.tolist())
    found = judge(spec_of("base"), Job(LEAN, True))
    [(name, message)] = found.findings
    assert name == "lowering"
    assert "in mlp: h_TF = ops.swiglu(ops.linear(h_TD, w.gate_up))" in message


@pytest.mark.parametrize("parts", [["text"], ["text", "head", "vision", "projector"]], ids=",".join)
def test_a_shortened_model_has_the_formats_that_are_chosen_for_it(parts):
    """The released layers, where the second one is not the one that attends to images, as in a shortened model."""
    whole = shapes.shape_of({"model_type": "mllama"})
    short = shortened(whole)
    formats = [chosen("w8a16", 128, parts, shape, 4) for shape in (whole, short)]
    assert sorted(shortened_formats(formats[0], whole, short)) == sorted(formats[1]) != []
