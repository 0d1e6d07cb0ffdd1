"""A graph of a plan as task=verify judges it, and the modelled work beside the products that are in the graph."""

from dataclasses import replace
from math import prod

import pytest

from graphs import CLASSES, DECODE, LEAN, spec_of

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.interpreter import attribute, metadata
from mllama_graph.ascend.lint import Graph
from mllama_graph.plan.cost import work
from mllama_graph.model.table import table
from mllama_graph.tasks.verify import Job, judge


def shape(graph, value):
    made = graph.maker(value)
    return tuple(made.output_desc[0].shape.dim) if made.type == "Data" else metadata(made.output_desc[0])[1]


def products(graph):
    """Floating-point operations of a graph's matrix products, convolutions and attention, from its own shapes."""
    total = 0
    for op in graph.of("MatMul", "Conv2D"):
        weight = shape(graph, dict(graph.fed(op))["filter" if op.type == "Conv2D" else "x2"])
        total += 2 * prod(metadata(op.output_desc[0])[1]) * prod(weight[1:])
    for op in graph.of("FusedInferAttentionScore"):
        taken, causal = dict(graph.fed(op)), attribute(op.attr["sparse_mode"]) == 3
        paged = "block_table" in taken
        keys = shape(graph, taken["block_table"])[1] * 128 if paged else shape(graph, taken["key0"])[1]
        total += 4 * prod(shape(graph, taken["query"])) * keys / (2 if causal else 1)
    return total


@pytest.mark.parametrize("bucket", CLASSES, ids=str)
def test_the_modelled_products_are_those_of_the_graph(bucket):
    spec = replace(spec_of("base"), shape=shortened(spec_of("base").shape))
    # Norms and biases are counted as if they were products; of a chunk behind earlier pages, hidden rows are not.
    assert work(spec.shape, spec.page_size, bucket, 2, 2)[1] == pytest.approx(products(Graph(capture(spec, bucket))), rel=0.02)


def test_a_graph_is_judged_whole_and_short():
    spec = spec_of("base")
    whole, short = judge(spec, Job(DECODE, True)), judge(spec, Job(DECODE, False))
    assert whole.findings == short.findings == [] and whole.structure and short.structure
    assert whole.operations > short.operations and whole.fused > short.fused and whole.sums == 0
    # What the image's keys and values are made of, only the vision graph reads; 16 frequencies are fp32.
    text = [entry for entry in table(spec.shape) if entry.path.startswith("text.")]
    read = [2 * prod(entry.shape) for entry in text if not entry.path.endswith((".kv.weight", ".k_norm"))]
    assert whole.weight_bytes == sum(read) + 4 * 16


def test_a_step_that_can_not_be_lowered_is_a_finding(monkeypatch):
    monkeypatch.setattr("mllama_graph.ops.npu.swiglu", lambda h_TF: h_TF.tolist())
    found = judge(spec_of("base"), Job(LEAN, True))
    [(name, message)] = found.findings
    assert name == "lowering" and "in mlp: h_TF = ops.swiglu(ops.linear(h_TD, w.gate_up))" in message
