"""The graphs of the small models break no rule; each rule catches a graph that was broken for it and names the line."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch_npu

from graphs import CHUNK, CHUNK_LEAN, CLASSES, DECODE, LEAN, PREFILL, VISION, broken, spec_of

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.lint import LINTS, Context, Graph, counts, lint, structure, units
from mllama_graph.plan.buckets import Bucket
from mllama_graph.ops.npu import NPU, npu_ops
from mllama_graph.ops.plain import rope as plain_rope
from mllama_graph.tasks.verify import difference, kind

# Three layers, of which the second attends to images.
BASE = replace(spec_of("base"), shape=shortened(spec_of("base").shape, selves=2))
# All classes of one model, and graphs of one whose heads are padded, of two ranks and of images of one tile.
CLEAN = [*(("base", 1, bucket) for bucket in CLASSES), *(("adjacent", 1, bucket) for bucket in (VISION, CHUNK)),
         *(("cross_first", 2, bucket) for bucket in (VISION, DECODE)), ("cross_last", 1, VISION)]
CAUGHT: set[str] = set()


@pytest.fixture(scope="module")
def decode():
    return capture(BASE, DECODE)


def found(name, captured, bucket, spec=BASE):
    """The messages of one lint."""
    CAUGHT.add(name)
    return [finding.message for finding in lint(captured, Context(spec, bucket)) if finding.lint == name]


def caught(name, bucket, spec=BASE, **ops):
    """The messages of one lint about a step with some operations exchanged."""
    own = replace(npu_ops(spec.world_size), **ops) if ops else None
    return found(name, capture(spec, bucket, own), bucket, spec)


def changed(name, captured, change):
    """The messages of one lint about the decode graph with one thing changed."""
    return found(name, broken(captured, change), DECODE)


@pytest.mark.parametrize("name,ranks,bucket", CLEAN, ids=lambda value: str(value).replace(" ", "_"))
def test_the_graphs_of_small_models_break_no_rule(name, ranks, bucket):
    spec = spec_of(name, ranks)
    assert lint(capture(spec, bucket), Context(spec, bucket)) == []


# ---- what leaves and what is written


def through_a_view(k_TKH, v_TKH, pages, slot_T):
    k, v = (page.view(page.shape[0] * 2, page.shape[1] // 2, *page.shape[2:]) for page in pages)
    torch_npu.npu_scatter_pa_kv_cache(k_TKH, v_TKH, k, v, slot_T, cache_mode="Norm")


@pytest.fixture(scope="module")
def viewed():
    """The decode graph of a model that writes to views of its pages."""
    return capture(BASE, LEAN, replace(NPU, write_pages_=through_a_view))


WRITE = r"at mllama_graph/model/text.py:\d+ in attend: ops.write_pages_\(.* <- .*test_lint.py:\d+ in through_a_view"


def test_pages_that_leave_a_decode_graph_are_found(viewed):
    [message] = found("outputs", viewed, LEAN)
    assert re.match(r"ScatterPaKvCache \w+: its output leaves the graph, as only logits may \(and 3 more\), " + WRITE,
                    message)


def test_a_copy_of_the_pages_is_found(viewed):
    [message] = found("moves", viewed, LEAN)
    assert re.match(r"TensorMove \w+: copies pages.0.0 \(and 3 more\), " + WRITE, message)


def test_a_write_to_a_copy_is_found(viewed):
    keys, values = found("writes", viewed, LEAN)
    for message, said in ((keys, "key_cache"), (values, "value_cache")):
        assert re.match(rf"ScatterPaKvCache \w+: {said} is TensorMove \w+, a copy of pages.0.\d \(and 1 more\), "
                        + WRITE, message)


@pytest.mark.parametrize("bucket, pool", [(DECODE, "pages"), (VISION, "image_pages")], ids=str)
def test_pages_that_are_never_written_are_found(bucket, pool):
    [message] = caught("writes", bucket, write_pages_=lambda *given: None)
    layers = len(BASE.shape.text.cross_layers if bucket == VISION else BASE.shape.text.self_layers)
    assert message.startswith(f"NetOutput NetOutput: {pool}.0.0 is never written (and {2 * layers - 1} more)")


def test_a_read_of_pages_beside_their_write_is_found(decode):
    def change(ops):
        pages = ops["ScatterPaKvCache"].input[1]
        reader = next(op for op in ops.values() if op.input and op.input[0] == "ScatterPaKvCache:0")
        reader.input[0] = pages

    [message] = changed("writes", decode, change)
    assert re.match(r"Reshape \w+: reads pages.0.0, which ScatterPaKvCache writes, in no order, "
                    r"at mllama_graph/model/text.py:\d+ in attend: return ops.attend_pages\(", message)


def test_a_graph_without_logits_is_found(decode):
    messages = changed("outputs", decode, lambda ops: ops["NetOutput"].input.__setitem__(0, "AddRmsNorm:0"))
    assert "0 tensors of logits leave a graph of decode" in messages[-1]
    assert "in cross_block" in messages[0] or "in self_block" in messages[0]


# ---- lengths, tables and slots


def with_integers(q_TQH, pages, table_BJ, len_B):
    B, Q, H = q_TQH.shape
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q_TQH.view(B, 1, Q * H), *(page.flatten(2) for page in pages), num_heads=Q,
        num_key_value_heads=pages[0].shape[2], input_layout="BSH", scale=1.0, block_table=table_BJ, block_size=128,
        actual_seq_lengths_kv=[5, 7])
    return out.view(B, Q, H)


def test_a_length_that_is_baked_in_is_found():
    [message] = caught("places", LEAN, attend_pages=with_integers)
    assert re.match(r"FusedInferAttentionScore \w+: actual_seq_lengths_kv is baked into the graph: it comes from a "
                    r"constant, not from an input \(and 1 more\), at mllama_graph/model/text.py:\d+ in attend: "
                    r"return ops.attend_pages\(.* <- .*test_lint.py:\d+ in with_integers", message)


@pytest.mark.parametrize("operation,index,name", [("ScatterPaKvCache", 2, "slot_mapping"),
                                                  ("FusedInferAttentionScore", 14, "block_table")])
def test_a_place_that_is_baked_in_is_found(operation, index, name, decode):
    [message] = changed("places", decode, lambda ops: ops[operation].input.__setitem__(index, "Const:0"))
    assert message.startswith(f"{operation} {operation}: {name} is baked into the graph: it comes from a constant")


# ---- dtypes


def test_float64_is_found(decode):
    [message] = changed("numbers", decode, lambda ops: ops["Cast"].attr["dst_type"].__setattr__("i", 11))
    assert re.match(r"Cast Cast: computes in float64, at mllama_graph/model/text.py:\d+ in trunk: angles = ops.rope_an",
                    message)


def counting(q_TQH, pages, table_BJ, len_B):
    return NPU.attend_pages(q_TQH, pages, table_BJ, len_B.long() + 1 - 1)


def test_arithmetic_in_int64_is_found():
    [message] = caught("numbers", LEAN, attend_pages=counting)
    assert re.match(r"Cast \w+: computes in int64, where int32 would do \(and 2 more\), "
                    r"at .*in attend: return ops.attend_pages\(.* in counting", message)


def test_a_cast_and_its_undoing_are_found(decode):
    def change(ops):
        pairs = [(ops[op.input[0].split(":")[0]], op) for op in ops.values() if op.type == "Cast"]
        inner, outer = next(pair for pair in pairs if pair[0].type == "Cast")
        inner.attr["dst_type"].i, outer.attr["dst_type"].i = 27, 3

    [message] = changed("casts", decode, change)
    assert re.match(r"Cast Cast_\d+: takes back Cast_\d+: torch.int32 to torch.bfloat16 and back, at .*in cross_block",
                    message)


# ---- weights and ranks


def transposing(x, leaf):
    return F.linear(x, leaf.weight, leaf.bias)


def test_a_weight_that_is_transposed_in_every_step_is_found():
    messages = caught("weights", LEAN, linear=transposing)
    assert any(re.match(r"Transpose \w+: rewrites weights.text.layers.0.qkv.weight in every step.*, "
                        r"at mllama_graph/model/text.py:\d+ in self_attention: qkv = ops.linear\(h_TD, w.qkv\)", text)
               for text in messages)


def twice(x):
    return npu_ops(2).all_reduce(npu_ops(2).all_reduce(x))


def test_a_sum_too_many_and_a_sum_too_few_are_found():
    ranks = spec_of("cross_first", 2)
    many = caught("collectives", LEAN, ranks, all_reduce=twice)
    assert any(re.match(r"HcomAllReduce \w+: ranks exchange what comes from weights.text.layers.1.o.weight, and need "
                        r"not.*, at .*in self_attention: return ops.all_reduce\(", text) for text in many)
    few = caught("collectives", LEAN, ranks, all_reduce=lambda x: x)
    assert any(re.match(r"MatMul \w+: ranks do not sum what comes from weights.text.layers.1.down.weight.*, "
                        r"at .*in mlp: return ops.all_reduce\(", text) for text in few)


def test_one_rank_that_sums_is_found():
    ranks = spec_of("cross_first", 2)
    captured = capture(ranks, LEAN)
    assert len(found("collectives", captured, LEAN, replace(ranks, world_size=1))) == 3


# ---- the operations' documents


def test_an_operation_and_an_attribute_that_nobody_checked_are_found(decode):
    def renamed(ops):
        ops["SwiGlu"].type = "Silu"

    def extended(ops):
        ops["SwiGlu"].attr["learnable"].b = True

    for change, said in ((renamed, "Silu SwiGlu: is not in the table of ge_ops.py, at "),
                         (extended, "SwiGlu SwiGlu: attributes ['learnable'] are not known, at ")):
        [message] = changed("known", decode, change)
        assert message.startswith(said + "mllama_graph/model/text.py:") and "in mlp: h_TF = ops.swiglu(" in message


@pytest.mark.parametrize("bucket,changes,said", [
    (LEAN, {"page_size": 24}, "a page of 24 tokens for 1 query rows; a multiple of 16"),
    (DECODE, {"num_image_pages": 15}, "16 pages are used by all sequences, 15 exist"),
    (LEAN, {"num_pages": 2**18}, "elements; it must stay below 2^31"),
    (PREFILL, {"page_size": 64}, "a page of 64 tokens for 32 query rows; a multiple of 128"),
    (LEAN, {"store": torch.float32, "compute": torch.float32}, "dtypes torch.float32")],
    ids=["page", "images", "cache", "rows", "dtype"])
def test_a_size_that_no_kernel_takes_is_found(bucket, changes, said):
    [message] = caught("layouts", bucket, replace(BASE, **changes))
    assert said in message and re.search(r", at mllama_graph/model/text.py:\d+ in ", message)


@pytest.mark.parametrize("attribute,value,said", [
    ("num_heads", 3, "are not heads"), ("sparse_mode", 4, "sparse_mode 4")])
def test_an_attention_that_its_document_forbids_is_found(attribute, value, said, decode):
    [message] = changed("layouts", decode,
                        lambda ops: ops["FusedInferAttentionScore"].attr[attribute].__setattr__("i", value))
    assert message.startswith("FusedInferAttentionScore FusedInferAttentionScore: ") and said in message


def test_pages_of_unequal_widths_are_found(decode):
    def change(ops):
        ops[ops["ScatterPaKvCache"].input[1].split(":")[0]].output_desc[0].shape.dim[3] = 48

    [message] = changed("layouts", decode, change)
    assert re.match(r"ScatterPaKvCache ScatterPaKvCache: .* don't fit pages \(12, 128, 2, 48\), at .*ops.write_pages_",
                    message)


def test_an_operation_that_is_not_fused_is_found():
    messages = caught("histogram", LEAN, rope=plain_rope)
    assert any("0 operations of kind RotaryMul, golden.json has 4" in text for text in messages)
    assert any(re.match(r"Mul \w+: \d+ operations of kind Mul, golden.json has 1, at mllama_graph/model/text.py", text)
               for text in messages)


def test_every_lint_has_caught_something():
    assert CAUGHT == LINTS.keys()


# ---- what graphs have in common


def test_the_buckets_of_a_plan_are_of_few_graphs():
    """Also where sizes happen to be equal: as many tokens as a page has, or as pages have altogether."""
    spec = replace(BASE, shape=shortened(BASE.shape))
    buckets = [VISION,
               *(Bucket("decode", rows, rows, pages, images) for rows, pages in ((1, 1), (4, 3)) for images in (0, 2)),
               *(Bucket("prefill", 1, tokens, past, images)
                 for tokens, past in ((128, 0), (512, 0), (128, 3), (512, 4)) for images in (0, 1))]
    found = {}
    for bucket in buckets:
        found.setdefault(kind(bucket), []).append(structure(capture(spec, bucket)))
    assert len(found) == 7
    for structures in found.values():
        assert all(difference(structures[0], other) == [] for other in structures)
    assert all(difference(one[0], other[0]) for one in found.values() for other in found.values() if one is not other)


def test_graphs_of_a_class_that_part_name_where(decode):
    other = capture(BASE, DECODE, replace(NPU, swiglu=lambda h_TF: NPU.swiglu(h_TF).tanh()))
    assert [re.sub(r"\d+", "#", line) for line in difference(structure(decode), structure(other))] == [
        "MatMul MatMul_#, at mllama_graph/model/text.py:# in mlp: return ops.all_reduce(ops.linear(h_TF, w.down)) "
        "<- mllama_graph/ops/npu.py:# in linear",
        "Tanh Tanh, at mllama_graph/model/text.py:# in mlp: h_TF = ops.swiglu(ops.linear(h_TD, w.gate_up)) "
        "<- tests/ascend/simulated/test_lint.py:# in <lambda>"]


@pytest.mark.parametrize("bucket", [VISION, DECODE, CHUNK_LEAN], ids=str)
def test_two_ranks_have_one_graph(bucket):
    spec = replace(spec_of("cross_first", 2), shape=shortened(spec_of("cross_first").shape))
    first, second = (capture(replace(spec, rank=rank), bucket) for rank in range(2))
    assert structure(first) == structure(second) and first.inputs == second.inputs


def test_counts_leave_out_what_is_constant(decode):
    graph = Graph(decode)
    everything = [op for op in graph.of("Range", "Pack")]
    assert everything and not counts(graph)["Range"] and not counts(graph)["Pack"]
    assert units(Context(BASE, DECODE))["self layer"] == 2 and units(Context(BASE, LEAN))["cross layer"] == 0
