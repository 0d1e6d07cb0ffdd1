"""Capturing lowers a step to the graph that would run, and records the line of the model for every operation."""

import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversation import Compiled, Conversation
from graphs import CHUNK, DECODE, LEAN, VISION, spec_of

from mllama_graph.ascend.capture import CaptureError, capture, shortened
from mllama_graph.ascend.graphdef import BOUNDARY
from mllama_graph.ascend.origin import origin
from mllama_graph.model.shape import shape_of
from mllama_graph.model.table import WHOLE, Shard, elements
from mllama_graph.ops.npu import NPU

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def decode():
    return capture(spec_of("base"), DECODE)


def edges(graph):
    return [(op.type, op.name, list(op.input)) for op in graph.op]


def test_the_captured_graph_is_the_one_that_runs(model):
    compiled, talk = Compiled(model("base"), torch.bfloat16), Conversation(model("base").shape)
    compiled("decode", talk.tokens([21, 9], True))
    [lowered] = compiled.lowered.values()
    spec = spec_of("base", num_pages=5, num_image_pages=5, candidates=0)
    assert edges(capture(spec, replace(DECODE, pages=2, image_pages=2)).graph) == edges(lowered.graphs[0].graph)


def test_every_operation_names_its_line_of_the_model(decode):
    found = set()
    for op in decode.graph.op:
        if op.type not in BOUNDARY:
            line = re.match(r"(mllama_graph/model/\w+\.py):(\d+) in \w+: (.*?)( <- .*)?$", decode.line(op.name))
            path, number, text, _ = line.groups()
            assert text in (ROOT / path).read_text().splitlines()[int(number) - 1]
            found.add(text)
    assert len(found) > 15


def test_an_operation_of_a_layer_also_names_the_line_that_it_called(decode):
    [line] = {decode.line(op.name) for op in decode.graph.op if op.type == "ScatterPaKvCache"}
    assert re.fullmatch(
        r"mllama_graph/model/text.py:\d+ in attend: ops.write_pages_\(k_TKH, v_TKH, cache, given.slot_T"
        r"\) <- mllama_graph/ops/npu_pages.py:\d+ in write_pages_",
        line,
    )


def test_every_input_is_named_and_has_the_shape_of_what_it_names(decode):
    spec = spec_of("base")
    shapes = {op.name: list(op.output_desc[0].shape.dim) for op in decode.graph.op if op.type == "Data"}
    by_role = {decode.inputs[name]: size for name, size in shapes.items()}
    tree = replace(spec, device="cpu").unfilled_weights(WHOLE)
    weights = {f"weights.{path}": list(x.shape) for path, x in tree.named_parameters()}
    assert len(by_role) == len(shapes)
    for role, size in by_role.items():
        if role in weights:
            assert size == weights[role]
    text = [role for role in weights if role.startswith("weights.text")]
    assert by_role.keys() >= {role for role in text if not role.endswith((".kv.weight", ".k_norm"))}
    assert by_role["given.prepared.unseen_B1RL"] == [2, 1, 1, 8 * 128]
    assert by_role["given.slot_T"] == [2]
    assert by_role["pages.2.1"] == [12, 128, 2, 32]
    assert by_role["image_pages.1.0"] == [16, 128, 2, 32]


def test_a_model_of_released_width_is_lowered_in_no_memory():
    spec = replace(spec_of("base", ranks=8), shape=shortened(shape_of({"model_type": "mllama"})))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert capture(spec, LEAN).graph.op
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # One rank's eighth of two layers, the embedding and the head of the 11B model.
    assert elements(spec.shape, Shard(0, 8)) * 2 > 400e6
    assert kilobytes < 200e3


def scaled_dot_product(q_SAH, k_SAH, v_SAH, real, scale):
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SAH, k_SAH, v_SAH))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def number_of_a_tensor(q_TQH, pages, table_BJ, len_B):
    return q_TQH[: int(len_B[0])]


def breaking(q_TQH, pages, table_BJ, len_B):
    torch._dynamo.graph_break()
    return q_TQH


def misshapen(q_TQH, pages, table_BJ, len_B):
    return q_TQH @ pages[0]


ATTEND_PAGES = r"mllama_graph/model/text.py:\d+ in attend: return ops.attend_pages\(.* <- .*test_capture.py:\d+ in "


@pytest.mark.parametrize(
    ("bucket", "name", "function", "what", "line"),
    [
        (
            VISION,
            "attend_tiles",
            scaled_dot_product,
            r"npu.npu_fusion_attention_v3.default: torchair has no converter",
            r"mllama_graph/model/vision.py:\d+ in block: out_WAH = ops.attend_tiles\(.* "
            r"<- .*test_capture.py:\d+ in scaled",
        ),
        (
            LEAN,
            "attend_pages",
            number_of_a_tensor,
            r"aten._local_scalar_dense.default: .* not implemented",
            ATTEND_PAGES,
        ),
        (LEAN, "attend_pages", breaking, r"Call to `torch._dynamo.graph_break\(\)`", ATTEND_PAGES),
        (LEAN, "attend_pages", misshapen, r".*: RuntimeError\('Attempting to broadcast", ATTEND_PAGES),
    ],
)
def test_a_step_that_can_not_be_lowered_is_reported_with_its_line(bucket, name, function, what, line, decode):
    with pytest.raises(CaptureError) as error:
        capture(spec_of("base"), bucket, replace(NPU, **{name: function}))
    message, where = str(error.value).split("\n")
    assert re.match(what, message)
    assert re.match(line, where)


def test_a_capture_that_failed_leaves_nothing_behind(decode):
    with pytest.raises(CaptureError):
        capture(spec_of("base"), LEAN, replace(NPU, attend_pages=misshapen))
    assert edges(capture(spec_of("base"), DECODE).graph) == edges(decode.graph)


def test_a_shortened_model_keeps_its_widths_and_a_layer_of_each_kind():
    shape = shape_of({"model_type": "mllama"})
    short = shortened(shape)
    assert short.text.self_layers == (0,)
    assert short.text.cross_layers == (1,)
    assert short.vision.layers == short.vision.global_layers == 1
    assert short.vision.out_width == shape.vision.out_width
    assert short.text.width == shape.text.width
    assert capture(replace(spec_of("base"), shape=shortened(spec_of("base").shape)), CHUNK).graph.op


def test_without_a_line_of_the_model_the_innermost_line_of_a_trace_is_given():
    assert origin('  File "/elsewhere/tool.py", line 3, in helper\n    x + y\n') == "tool.py:3 in helper"
    assert origin("") == "no line is known"
