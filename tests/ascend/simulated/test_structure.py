"""The buckets of one class and all ranks have the same graph structure, and parts are counted as in golden.json."""

import re
from dataclasses import replace

import pytest
from graphs import CHUNK_LEAN, DECODE, LEAN, VISION, spec_of

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.golden import counts, parts
from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.structure import structure
from mllama_graph.ops.npu import NPU
from mllama_graph.plan.bucket import Bucket
from mllama_graph.tasks.verify import difference, kind

# Three layers, of which the second attends to images.
BASE = replace(spec_of("base"), shape=shortened(spec_of("base").shape, self_layers=2))


@pytest.fixture(scope="module")
def decode():
    return capture(BASE, DECODE)


def test_the_buckets_of_a_class_have_one_structure():
    """Also where sizes happen to be equal: as many tokens as in one page, or as in all of a sequence's pages."""
    spec = replace(BASE, shape=shortened(BASE.shape))
    buckets = [
        *(Bucket("vision", 1, 1, 0, 2, tiles) for tiles in (1, 2, 3, 4)),
        *(Bucket("decode", rows, rows, pages, images) for rows, pages in ((1, 1), (4, 3)) for images in (0, 2)),
        *(
            Bucket("prefill", rows, tokens, pages, images)
            for rows, tokens, pages in ((1, 128, 0), (1, 512, 0), (1, 128, 3), (1, 512, 4), (2, 128, 1), (4, 512, 4))
            for images in (0, 1)
        ),
        *(
            Bucket("mixed", 2, 2 + tokens, 3, images, prompts=Bucket("prefill", rows, tokens, pages, images))
            for rows, tokens, pages in ((1, 126, 3), (1, 128, 1), (2, 128, 1), (4, 510, 4))
            for images in (0, 1)
        ),
    ]
    found = {}
    for bucket in buckets:
        found.setdefault(kind(bucket), []).append(structure(capture(spec, bucket)))
    # Of vision graphs, those of one tile, of some tiles and of all of them.
    assert len(found) == 15
    for structures in found.values():
        assert all(difference(structures[0], other) == [] for other in structures)
    assert all(difference(one[0], other[0]) for one in found.values() for other in found.values() if one is not other)


def test_graphs_of_a_class_that_differ_say_where(decode):
    other = capture(BASE, DECODE, replace(NPU, swiglu=lambda h_TF: NPU.swiglu(h_TF).tanh()))
    assert [re.sub(r"\d+", "#", line) for line in difference(structure(decode), structure(other))] == [
        "MatMul MatMul_#, at mllama_graph/model/text.py:# in mlp: return ops.all_reduce(ops.linear(h_TF, w.down)) "
        "<- mllama_graph/ops/npu.py:# in linear",
        "Tanh Tanh, at mllama_graph/model/text.py:# in mlp: h_TF = ops.swiglu(ops.linear(h_TD, w.gate_up)) "
        "<- tests/ascend/simulated/test_structure.py:# in <lambda>",
    ]


@pytest.mark.parametrize("bucket", [VISION, DECODE, CHUNK_LEAN], ids=str)
def test_two_ranks_have_one_graph(bucket):
    spec = replace(spec_of("cross_first", 2), shape=shortened(spec_of("cross_first").shape))
    first, second = (capture(replace(spec, rank=rank), bucket) for rank in range(2))
    assert structure(first) == structure(second)
    assert first.inputs == second.inputs


def test_counts_leave_out_constants(decode):
    graph = LoweredGraph(decode)
    assert graph.of_type("Const")
    assert not counts(graph)["Const"]


def test_parts_are_counted_per_layer():
    assert parts(Context(BASE, DECODE))["self layer"] == 2
    assert parts(Context(BASE, LEAN))["cross layer"] == 0
