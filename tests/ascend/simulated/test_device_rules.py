"""The rules of CANN's own sources find their faults in modified graphs, and name the line."""

import re
from dataclasses import replace

import pytest
import torch
import torch_npu
from findings import BASE, DEVICE, FAILED, found, found_after, found_with
from graphs import CHUNK_LEAN, DECODE, LEAN, MIXED_LEAN, PACKED_LEAN, PREFILL_LEAN, VISION, broken, spec_of
from torchair._ge_concrete_graph import ge_ir_pb2

from mllama_graph.ascend.capture import capture
from mllama_graph.ops.npu import NPU
from mllama_graph.ops.npu_attention import attention
from mllama_graph.ops.plain import PLAIN


@pytest.fixture(scope="module")
def decode():
    return capture(BASE, DECODE)


# ---- lengths, tables and slots


def with_integers(q_TQH, pages, table_BJ, len_B):
    B, Q, H = q_TQH.shape
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q_TQH.view(B, 1, Q * H),
        *(page.flatten(2) for page in pages),
        num_heads=Q,
        num_key_value_heads=pages[0].shape[2],
        input_layout="BSH",
        scale=1.0,
        block_table=table_BJ,
        block_size=128,
        actual_seq_lengths_kv=[5, 7],
    )
    return out.view(B, Q, H)


def test_a_length_that_is_baked_in_is_found():
    [message] = found_with("straight", LEAN, attend_pages=with_integers)
    assert re.match(
        r"FusedInferAttentionScore \w+: actual_seq_lengths_kv comes from a constant, not straight from an input "
        r"\(and 1 more\), at mllama_graph/model/text.py:\d+ in attend: "
        r"return ops.attend_pages\(.* <- .*test_device_rules.py:\d+ in with_integers",
        message,
    )


@pytest.mark.parametrize(
    ("operation", "index", "name"),
    [("ScatterPaKvCache", 2, "slot_mapping"), ("FusedInferAttentionScore", 14, "block_table")],
)
def test_slots_or_a_block_table_that_are_baked_in_are_found(operation, index, name, decode):
    [message] = found_after("straight", decode, lambda ops: ops[operation].input.__setitem__(index, "Const:0"))
    assert message.startswith(f"{operation} {operation}: {name} comes from a constant, not straight from an input")


def one_more(q_TQH, pages, table_BJ, len_B):
    return NPU.attend_pages(q_TQH, pages, table_BJ, len_B + 1)


def test_arithmetic_before_lengths_is_found():
    [message] = found_with("straight", LEAN, attend_pages=one_more)
    assert re.match(
        r"FusedInferAttentionScore \w+: actual_seq_lengths_kv comes from Add \w+, not straight from an input "
        r"\(and 1 more\), at mllama_graph/model/text.py:\d+ in attend: return ops.attend_pages",
        message,
    )


def test_arithmetic_before_the_lengths_of_a_mixed_step_is_found():
    [message] = found_with("straight", MIXED_LEAN, attend_pages=one_more)
    assert re.match(r"FusedInferAttentionScore \w+: actual_seq_lengths_kv comes from Add \w+", message)


def mask_in_the_graph(*given, made):
    unseen_B1RL = made.unseen_B1RL & made.sees_T1[:, None, None]
    return NPU.attend_image(*given, made=made._replace(unseen_B1RL=unseen_B1RL))


def test_a_mask_that_a_decode_graph_computes_is_found():
    [message] = found_with("straight", DECODE, attend_image=mask_in_the_graph)
    assert "atten_mask comes from LogicalAnd" in message
    assert "in attend_image: return ops.attend_image(" in message


def test_an_index_that_a_decode_graph_computes_is_found():
    [message] = found_with("straight", LEAN, embed=lambda ids_T, leaf: NPU.embed(ids_T + 1 - 1, leaf))
    assert re.match(
        r"GatherV2 \w+: indices comes from (Sub|Add) \w+, not straight from an input, at .*in trunk", message
    )


# ---- kernels of the device


def test_a_split_of_integers_is_found(decode):
    def change(ops):
        ops["SplitV"].input[0] = next(name for name, role in decode.inputs.items() if role == "given.ids_T") + ":0"

    [message] = found_after("kernels", decode, change)
    assert re.match(
        r"SplitV SplitV: has no kernel for torch.int32 on a 910B's cores \(conversion/split_v/op_api/split_v.cpp\): it "
        r"would run on AICPU, at mllama_graph/model/text.py:\d+ in self_attention: q, k, v = qkv.split",
        message,
    )


def from_one(y_TD, gate_1, sees_T1):
    return torch.where(sees_T1, y_TD * (1 - gate_1), 0)


def test_an_operation_without_a_public_kernel_is_found():
    messages = found_with("kernels", DECODE, gated=from_one)
    assert len(messages) == 2  # attention's gate and the MLP's
    assert re.match(r"Sxpy \w+: has no public kernel on a 910B, at .*in cross_block", messages[0])


def test_a_bias_without_a_kernel_is_found():
    captured = capture(BASE, VISION)

    def change(ops):
        biased = next(op for op in ops.values() if op.type == "MatMul" and len([x for x in op.input if x]) == 3)
        bias = ops[biased.input[2].split(":")[0]].output_desc[0]
        bias.dtype = ge_ir_pb2.DataType.Value("DT_BF16")
        if "_meta" in bias.attr:
            del bias.attr["_meta"]

    [message] = found("kernels", broken(captured, change), VISION)
    assert re.match(
        r"MatMul \w+: adds a bias in torch.bfloat16 to torch.bfloat16, for which no kernel is known "
        r"\(matmul/mat_mul_v3/op_host/mat_mul_v3_def.cpp\), at .*in block",
        message,
    )


# ---- masks and pages


def making_the_mask(*given, made):
    row = torch.arange(2048, dtype=torch.int32, device=given[0].device)
    causal_MM = row[None, :] > row[:, None]
    return NPU.attend_prompt(*given, made=made._replace(causal_MM=causal_MM))


def test_a_mask_that_never_changes_but_is_computed_is_found():
    [message] = found_with("masks", PREFILL_LEAN, attend_prompt=making_the_mask)
    assert re.match(
        r"FusedInferAttentionScore \w+: its mask never changes, but is computed in the graph \(and 1 more\), at",
        message,
    )


def masking_rows(q_WAH, k_WAH, v_WAH, real, scale):
    unseen_11WW = (torch.arange(len(q_WAH), device=q_WAH.device) >= real).expand(1, 1, len(q_WAH), -1)
    q, k, v = (x[None] for x in (q_WAH, k_WAH, v_WAH))
    return attention(q, k, v, q_WAH.shape[-1], kv_heads=q_WAH.shape[1], mask=unseen_11WW & (q.sum() > 0))


def test_a_mask_among_the_rows_of_an_image_is_found():
    [message] = found_with("masks", VISION, attend_tiles=masking_rows)
    assert re.match(
        r"FusedInferAttentionScore \w+: a mask hides rows of an image, which the order of rows and a length can do "
        r"\(and \d+ more\), at mllama_graph/model/vision.py:\d+ in block",
        message,
    )


def test_the_mode_of_the_fixed_mask_without_it_is_found(decode):
    def change(ops):
        ops["FusedInferAttentionScore"].attr["sparse_mode"].i = 3

    [message] = found_after("masks", decode, change)
    assert message.startswith("FusedInferAttentionScore FusedInferAttentionScore: sparse_mode 3 without its fixed mask")
    assert "for one query row, which resets it to 0" in found_after("layouts", decode, change)[0]


def gathering(q_TQH, k_TKH, v_TKH, pages, table_BJ, rows_B, past_B, *, made):
    k_1LKH, v_1LKH = (data.index_select(0, table_BJ[0]).flatten(0, 1)[None] for data in pages)
    return attention(q_TQH[None], k_1LKH, v_1LKH, q_TQH.shape[-1], kv_heads=k_TKH.shape[1], mask=None)


def test_pages_that_a_prompt_gathers_are_found():
    messages = found_with("paged", CHUNK_LEAN, attend_prompt=gathering)
    assert re.match(
        r"GatherV2 \w+: reads pages.\d.\d, which only attention may \(and 3 more\), "
        r"at mllama_graph/model/text.py:\d+ in attend: return ops.attend_prompt\(",
        messages[0],
    )


@pytest.mark.parametrize("bucket", [CHUNK_LEAN, PACKED_LEAN], ids=str)
def test_prompts_in_pages_without_lengths_or_the_causal_mode_are_found(bucket):
    captured = capture(BASE, bucket)

    def change(ops):
        ops["FusedInferAttentionScore"].attr["sparse_mode"].i = 0

    [message] = found("paged", broken(captured, change), bucket)
    assert "reads a prompt's pages with sparse_mode 0, at" in message

    def unmeasured(ops):
        attention = ops["FusedInferAttentionScore"]
        names = list(attention.attr["_input_name_key"].list.s)
        at = names.index(b"actual_seq_lengths")
        attention.input[at] = ""

    [message] = found("paged", broken(captured, unmeasured), bucket)
    assert "reads a prompt's pages with sparse_mode 3, without actual_seq_lengths, at" in message


# ---- candidates


def test_a_graph_that_leaves_the_search_to_the_host_is_found():
    captured = capture(replace(BASE, candidates=0), LEAN)
    [message] = found("candidates", captured, LEAN)
    assert message.startswith("NetOutput NetOutput: gives no candidates, so that all logits go to the host")
    assert not found("candidates", captured, LEAN, replace(BASE, candidates=0))


def test_a_search_as_torchair_lowers_it_is_found():
    messages = found_with("candidates", LEAN, top_k=PLAIN.top_k)
    assert re.match(
        r"TopKV2 \w+: k is not the constant 64 in int32, at mllama_graph/model/sample.py:\d+ in", messages[0]
    )
    assert "has a sort_policy, which CANN 8.5 does not know" in messages[1]
    assert "computes in int64" in found_with("numbers", LEAN, top_k=PLAIN.top_k)[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [("Cast:0", "searches given.position_T, not the logits"), ("head", "searches in torch.bfloat16: sums of exp")],
)
def test_a_search_in_other_values_than_the_logits_in_fp32_is_found(source, message, decode):
    [head] = [name for name, role in decode.inputs.items() if role == "weights.text.head.weight"]

    def change(ops):
        product = next(op.name for op in ops.values() if f"{head}:0" in op.input)
        ops["TopKV2"].input[0] = f"{product}:0" if source == "head" else source

    assert any(f"TopKV2 TopKV2: {message}" in text for text in found_after("candidates", decode, change))


def test_a_search_for_another_number_of_candidates_is_found():
    [message] = found("candidates", capture(replace(BASE, candidates=1), LEAN), LEAN)
    assert message.startswith("ArgMaxWithValue ArgMaxWithValue: finds 1 candidate, not 64, at")


def test_candidates_that_ranks_do_not_exchange_are_found():
    ranks = spec_of("cross_first", 2)
    messages = found_with("collectives", LEAN, ranks, all_gather=lambda x: x[None])
    assert any("ranks do not exchange the candidates" in message for message in messages)


def test_a_cast_without_a_kernel_is_found(decode):
    [message] = found_after("kernels", decode, lambda ops: ops["Cast"].attr["dst_type"].__setattr__("i", 11))
    assert message.startswith("Cast Cast: has no kernel from torch.int32 to torch.float64 on a 910B's cores (math/cast")


def test_every_rule_of_the_device_has_a_test():
    assert DEVICE <= FAILED
