"""The graphs of the small models break no rule; each rule finds its fault in a modified graph and names the line."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from findings import BASE, DEVICE, FAILED, found, found_after, found_with
from graphs import CHUNK, CLASSES, DECODE, LEAN, PREFILL, VISION, spec_of

from mllama_graph.ascend.capture import capture
from mllama_graph.ascend.graph import Context
from mllama_graph.ascend.lint import lint
from mllama_graph.ascend.rules import RULES
from mllama_graph.ops.npu import NPU, npu_ops
from mllama_graph.ops.plain import rope as plain_rope

# All classes of one model, and graphs of models with padded heads, two ranks, and images of one tile.
CLEAN = [
    *(("base", 1, bucket) for bucket in CLASSES),
    *(("adjacent", 1, bucket) for bucket in (VISION, CHUNK)),
    *(("cross_first", 2, bucket) for bucket in (VISION, DECODE)),
    ("cross_last", 1, VISION),
]


@pytest.fixture(scope="module")
def decode():
    return capture(BASE, DECODE)


@pytest.mark.parametrize(("name", "ranks", "bucket"), CLEAN, ids=lambda value: str(value).replace(" ", "_"))
def test_the_graphs_of_small_models_break_no_rule(name, ranks, bucket):
    spec = spec_of(name, ranks)
    assert lint(capture(spec, bucket), Context(spec, bucket)) == []


# ---- what a graph returns and what it writes


def through_a_view(k_TKH, v_TKH, pages, slot_T):
    k, v = (page.view(page.shape[0] * 2, page.shape[1] // 2, *page.shape[2:]) for page in pages)
    torch_npu.npu_scatter_pa_kv_cache(k_TKH, v_TKH, k, v, slot_T, cache_mode="Norm")


@pytest.fixture(scope="module")
def viewed():
    """The decode graph of a model that writes to views of its pages."""
    return capture(BASE, LEAN, replace(NPU, write_pages_=through_a_view))


WRITE = r"at mllama_graph/model/text.py:\d+ in attend: ops.write_pages_\(.* <- .*test_rules.py:\d+ in through_a_view"


def test_pages_that_a_decode_graph_returns_are_found(viewed):
    [message] = found("outputs", viewed, LEAN)
    assert re.match(
        r"ScatterPaKvCache \w+: its output is returned, but only logits may be \(and 3 more\), " + WRITE, message
    )


def test_a_copy_of_the_pages_is_found(viewed):
    [message] = found("moves", viewed, LEAN)
    assert re.match(r"TensorMove \w+: copies pages.0.0 \(and 3 more\), " + WRITE, message)


def test_a_write_to_a_copy_is_found(viewed):
    keys, values = found("writes", viewed, LEAN)
    for message, name in ((keys, "key_cache"), (values, "value_cache")):
        assert re.match(
            rf"ScatterPaKvCache \w+: {name} is TensorMove \w+, a copy of pages.0.\d \(and 1 more\), " + WRITE, message
        )


@pytest.mark.parametrize(("bucket", "pool"), [(DECODE, "pages"), (VISION, "image_pages")], ids=str)
def test_pages_that_are_never_written_are_found(bucket, pool):
    [message] = found_with("writes", bucket, write_pages_=lambda *given: None)
    layers = len(BASE.shape.text.cross_layers if bucket == VISION else BASE.shape.text.self_layers)
    assert message.startswith(f"NetOutput NetOutput: {pool}.0.0 is never written (and {2 * layers - 1} more)")


def test_a_read_of_pages_unordered_with_their_write_is_found(decode):
    def change(ops):
        pages = ops["ScatterPaKvCache"].input[1]
        reader = next(op for op in ops.values() if op.input and op.input[0] == "ScatterPaKvCache:0")
        reader.input[0] = pages

    [message] = found_after("writes", decode, change)
    assert re.match(
        r"Reshape \w+: reads pages.0.0 in no defined order with its write by ScatterPaKvCache, "
        r"at mllama_graph/model/text.py:\d+ in attend: return ops.attend_pages\(",
        message,
    )


def test_a_graph_without_logits_is_found(decode):
    messages = found_after("outputs", decode, lambda ops: ops["NetOutput"].input.__setitem__(0, "AddRmsNorm:0"))
    assert "a decode graph returns 0 tensors of logits" in messages[-1]
    assert "in cross_block" in messages[0] or "in self_block" in messages[0]


# ---- dtypes


def test_float64_is_found(decode):
    [message] = found_after("numbers", decode, lambda ops: ops["Cast"].attr["dst_type"].__setattr__("i", 11))
    assert re.match(
        r"Cast Cast: computes in float64, at mllama_graph/model/text.py:\d+ in trunk: angles = ops.rope_an", message
    )


def counting(q_TQH, pages, table_BJ, len_B):
    return NPU.attend_pages(q_TQH, pages, table_BJ, len_B + 1 - 1)


def test_arithmetic_in_int64_is_found():
    _, message = found_with("numbers", LEAN, attend_pages=counting)
    assert re.match(
        r"Add \w+: computes in int64, where int32 would do \(and \d more\), "
        r"at .*in attend: return ops.attend_pages\(.* in counting",
        message,
    )


def test_a_cast_that_undoes_another_is_found(decode):
    def change(ops):
        inner, *_, outer = (op for op in ops.values() if op.type == "Cast")
        outer.input[0], outer.attr["dst_type"].i = f"{inner.name}:0", 3

    [message] = found_after("casts", decode, change)
    assert re.match(r"Cast Cast_\d+: undoes Cast: torch.int32 to torch.float32 and back, at .*in best", message)


# ---- weights and ranks


def transposing(x, leaf):
    return F.linear(x, leaf.weight, leaf.bias)


def test_a_weight_that_is_transposed_in_every_step_is_found():
    messages = found_with("weights", LEAN, linear=transposing)
    assert any(
        re.match(
            r"Transpose \w+: rewrites weights.text.layers.0.qkv.weight in every step.*, "
            r"at mllama_graph/model/text.py:\d+ in self_attention: qkv = ops.linear\(h_TD, w.qkv\)",
            text,
        )
        for text in messages
    )


def twice(x):
    return npu_ops(2).all_reduce(npu_ops(2).all_reduce(x))


def test_an_all_reduce_too_many_and_a_missing_one_are_found():
    ranks = spec_of("cross_first", 2)
    many = found_with("collectives", LEAN, ranks, all_reduce=twice)
    assert any(
        re.match(
            r"HcomAllReduce \w+: ranks exchange the result of weights.text.layers.1.o.weight without "
            r"need.*, at .*in self_attention: return ops.all_reduce\(",
            text,
        )
        for text in many
    )
    few = found_with("collectives", LEAN, ranks, all_reduce=lambda x: x)
    assert any(
        re.match(
            r"MatMul \w+: ranks do not exchange the result of weights.text.layers.1.down.weight.*, "
            r"at .*in mlp: return ops.all_reduce\(",
            text,
        )
        for text in few
    )


def test_an_all_reduce_on_a_single_rank_is_found():
    ranks = spec_of("cross_first", 2)
    captured = capture(ranks, LEAN)
    # Of the embedding, attention and MLP, and of the candidates.
    assert len(found("collectives", captured, LEAN, replace(ranks, world_size=1))) == 4


# ---- the operations' documentation


def test_an_operation_and_an_attribute_that_ge_ops_does_not_have_are_found(decode):
    def renamed(ops):
        ops["SwiGlu"].type = "Silu"

    def extended(ops):
        ops["SwiGlu"].attr["learnable"].b = True

    for change, text in (
        (renamed, "Silu SwiGlu: is not in the table of ascend/ge_ops, at "),
        (extended, "SwiGlu SwiGlu: attributes ['learnable'] are not known, at "),
    ):
        [message] = found_after("known", decode, change)
        assert message.startswith(text + "mllama_graph/model/text.py:")
        assert "in mlp: h_TF = ops.swiglu(" in message


@pytest.mark.parametrize(
    ("bucket", "changes", "text"),
    [
        (LEAN, {"page_size": 24}, "a page of 24 tokens for 1 query rows; a multiple of 16"),
        (DECODE, {"num_image_pages": 15}, "16 pages are used by all sequences, 15 exist"),
        (LEAN, {"num_pages": 2**18}, "elements; it must stay below 2^31"),
        (PREFILL, {"page_size": 64}, "a page of 64 tokens for 32 query rows; a multiple of 128"),
        (LEAN, {"store": torch.float32, "compute": torch.float32}, "dtypes torch.float32"),
    ],
    ids=["page", "images", "cache", "rows", "dtype"],
)
def test_a_size_that_no_kernel_takes_is_found(bucket, changes, text):
    [message] = found_with("layouts", bucket, replace(BASE, **changes))
    assert text in message
    assert re.search(r", at mllama_graph/model/text.py:\d+ in ", message)


@pytest.mark.parametrize(
    ("attribute", "value", "text"), [("num_heads", 3, "are not heads"), ("sparse_mode", 4, "sparse_mode 4")]
)
def test_an_attention_outside_of_its_documented_limits_is_found(attribute, value, text, decode):
    [message] = found_after(
        "layouts", decode, lambda ops: ops["FusedInferAttentionScore"].attr[attribute].__setattr__("i", value)
    )
    assert message.startswith("FusedInferAttentionScore FusedInferAttentionScore: ")
    assert text in message


def test_pages_of_unequal_widths_are_found(decode):
    def change(ops):
        ops[ops["ScatterPaKvCache"].input[1].split(":")[0]].output_desc[0].shape.dim[3] = 48

    [message] = found_after("layouts", decode, change)
    assert re.match(
        r"ScatterPaKvCache ScatterPaKvCache: .* don't fit pages \(12, 128, 2, 48\), at .*ops.write_pages_", message
    )


def test_an_operation_that_is_not_fused_is_found():
    messages = found_with("histogram", LEAN, rope=plain_rope)
    assert any("0 operations of type RotaryMul, golden.json has 4" in text for text in messages)
    assert any(
        re.match(r"Mul \w+: \d+ operations of type Mul, golden.json has 1, at mllama_graph/model/text.py", text)
        for text in messages
    )


def test_every_other_rule_has_a_test_here():
    assert RULES.keys() - FAILED <= DEVICE
