"""int8 pages on an NPU: steps equal plain.py's, graphs break no rule, and each limit of the kernels finds its fault."""

import re
from dataclasses import replace

import pytest
import torch
from conversation import Compiled, Conversation, Eager, play
from findings import BASE, found, found_with
from graphs import CHUNK, DECODE, LEAN, PACKED, PREFILL, VISION, broken, spec_of
from lowered import lower, to_npu
from torch.testing import assert_close

from mllama_graph.ascend.capture import capture
from mllama_graph.ascend.graph import Context
from mllama_graph.ascend.graphdef import count_operations
from mllama_graph.ascend.lint import lint
from mllama_graph.ops import npu_attention
from mllama_graph.ops.npu import NPU
from mllama_graph.ops.npu_inputs import causal_mask
from mllama_graph.ops.plain import PLAIN


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def codes(*size):
    size = (size[0], 128, *size[1:])
    return [torch.randint(-127, 128, size).to(torch.int8) for _ in "kv"]


def scales(pages, heads):
    return [torch.rand(pages, heads, 128) / 50 for _ in "kv"]


INT8 = replace(BASE, kv=torch.int8)
ATTENTION = "FusedInferAttentionScore"


@pytest.fixture(scope="module")
def decode():
    return capture(INT8, DECODE)


def test_every_step_equals_plain_in_fp32(model):
    """A chunk after pages, packed prompts, and decode steps with images; heads 24 wide, in pages of 32."""
    talk = Conversation(model("adjacent").shape, text_alone=False)
    compiled = Compiled(model("adjacent"), torch.float32, kv=torch.int8)
    eager = Eager(model("adjacent"), torch.float32, torch.float32, kv=torch.int8)
    for got, want in zip(play(compiled, talk), play(eager, talk), strict=True):
        # Sums in another order put some values on the other side of a rounding boundary: a step of 1/127 of a row.
        assert_close(got, want, atol=5e-3, rtol=1e-3)
    for got, want in zip(compiled.contents(), eager.contents(), strict=True):
        assert want.any()
        assert ((got - want).abs() > 5e-4).float().mean() < 1e-3


@pytest.mark.parametrize("new", [1, 2])
def test_decode_rows_read_int8_pages_as_plain_does(new):
    """One row per sequence reads codes in their pages; several rows, as drafts are, read pages that are widened."""
    table, lengths = int32([[3, 1], [4, 2]]), int32([130, 7])
    pages, q = (*codes(5, 2, 32), *scales(5, 2)), torch.randn(2 * new, 4, 32)
    lowered = lower(lambda q, pages, t, n, mask: NPU.attend_pages(q, pages, t, n, mask), wide=True)
    mask = causal_mask(torch.device("cpu")) if new > 1 else None
    got = lowered(*to_npu((q, pages, table, lengths.long(), mask)))
    assert_close(got, PLAIN.attend_pages(q, pages, table, lengths), atol=1e-5, rtol=1e-5)
    assert lowered.operations.get("GatherV2", 0) == (4 if new > 1 else 0)


@pytest.mark.parametrize("bucket", [VISION, DECODE, PREFILL, CHUNK, PACKED], ids=str)
def test_the_graphs_break_no_rule(bucket, decode):
    captured = decode if bucket == DECODE else capture(INT8, bucket)
    assert lint(captured, Context(INT8, bucket)) == []


def test_the_graphs_of_ranks_break_no_rule():
    spec = spec_of("cross_first", 2, kv=torch.int8)
    assert lint(capture(spec, CHUNK), Context(spec, CHUNK)) == []


def test_a_decode_step_reads_codes_and_scales_where_they_are(decode):
    operations = count_operations(decode.graph)
    # Of the embedding alone.
    assert operations["GatherV2"] == 1
    assert operations["DynamicQuant"] == operations["ScatterNdUpdate"] == 2 * operations["ScatterPaKvCache"]


def input_of(op, name):
    """The index of a named input."""
    return list(op.attr["_input_name_key"].list.s).index(name.encode())


def without_scales(ops):
    ops[ATTENTION].input[input_of(ops[ATTENTION], "key_antiquant_scale")] = ""


def of_integers(ops):
    ops["ScatterNdUpdate"].input[2] = ops["ScatterNdUpdate"].input[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_scales, "scales None, not fp32 (12, 2, 128)"),
        (lambda ops: ops[ATTENTION].attr["key_antiquant_mode"].__setattr__("i", 4), "modes (4, 5) of int8 pages"),
        (of_integers, "updates in torch.int32 of torch.float32"),
    ],
    ids=["scales", "mode", "dtype"],
)
def test_a_limit_of_int8_pages_is_found(change, text, decode):
    messages = found("layouts", broken(decode, change), DECODE, INT8)
    assert any(text in message for message in messages), messages


def test_pages_and_heads_that_are_no_multiples_of_32_are_found(monkeypatch):
    [message] = found_with("layouts", LEAN, replace(INT8, page_size=16))
    assert "a page of 16 tokens in int8; a multiple of 32 is needed" in message
    monkeypatch.setattr("mllama_graph.graphs.spec.padded_head", lambda width, bytes_each: width)
    [message] = found_with("layouts", LEAN, spec_of("cross_first", kv=torch.int8))
    assert "a head width of 16 in int8 is not a multiple of 32" in message


def in_place(pages, table_BJ, rows, dtype):
    return npu_attention_read(pages, table_BJ, 1, dtype)


npu_attention_read = npu_attention.read


def test_several_rows_that_read_int8_pages_are_found(monkeypatch):
    monkeypatch.setattr(npu_attention, "read", in_place)
    [message] = found_with("layouts", CHUNK, INT8)
    assert "int8 keys with 32 query rows; pages of codes serve one, at mllama_graph/model/text.py" in message


def gathering(q_TQH, pages, table_BJ, len_B):
    # Two rows per sequence, so that pages are gathered.
    return NPU.attend_pages(torch.cat((q_TQH, q_TQH)), pages, table_BJ, len_B)[: len(q_TQH)]


def test_a_decode_step_of_one_row_that_gathers_int8_pages_is_found():
    messages = found_with("paged", LEAN, INT8, attend_pages=gathering)
    assert re.match(r"GatherV2 \w+: reads pages.0.\d, which only attention may", messages[0])


def test_scales_that_are_never_written_are_found(monkeypatch):
    def codes_alone(k_TKH, v_TKH, pages, slot_T, scale_at_TK3):
        NPU.write_pages_(k_TKH.to(torch.int8), v_TKH.to(torch.int8), pages[:2], slot_T)

    [message] = found_with("writes", LEAN, INT8, write_pages_=codes_alone)
    assert re.search(r"pages.0.2 is never written \(and \d more\)", message)


def test_pages_in_fp32_have_no_kernel():
    wide = replace(BASE, kv=torch.float32)
    assert any("has no kernel for torch.float32" in text for text in found_with("layouts", VISION, wide))


def test_places_of_scales_that_a_graph_computes_are_found():
    def moved(k_TKH, v_TKH, pages, slot_T, scale_at_TK3):
        NPU.write_pages_(k_TKH, v_TKH, pages, slot_T, scale_at_TK3 + 1 - 1)

    messages = found_with("straight", LEAN, INT8, write_pages_=moved)
    assert any("ScatterNdUpdate" in text and "indices comes from" in text for text in messages)
