"""Each form of a decode step's attention, lowered by torchair and executed by the interpreter, equals ops/plain.py; and
the rule of forms finds its faults in modified graphs."""

from dataclasses import replace

import pytest
import torch
from conversation import Compiled, Conversation, Eager
from findings import BASE, FAILED, FORMS
from findings import found as findings_of
from graphs import DECODE, LEAN, broken
from lowered import to_npu
from test_npu_ops import DTYPES, P, close, int32, normal, padded, pages_of, run, wider
from test_steps import CLOSE
from torch.testing import assert_close
from torchair._ge_concrete_graph import ge_ir_pb2

from mllama_graph.ascend.capture import capture
from mllama_graph.ascend.graph import Context
from mllama_graph.ascend.graphdef import inputs_of
from mllama_graph.ascend.lint import lint
from mllama_graph.model.inputs import ImageInput, TokenInput
from mllama_graph.ops.npu import NPU, npu_ops, with_prepared
from mllama_graph.ops.npu_inputs import causal_mask, prepare, prepare_captured
from mllama_graph.ops.plain import PLAIN
from mllama_graph.plan.cores import SPLIT, TND, Form, Forms

# Of one token, to the end of a page, one beyond, and several pages.
LENGTHS = [1, 128, 129, 600]
TABLE = [[3, 0, 0, 0, 0], [7, 0, 0, 0, 0], [2, 11, 0, 0, 0], [9, 5, 6, 1, 4]]


def step(parts=(1, 1), packed=False, image=None, lengths=LENGTHS, table=TABLE):
    """A decode step of one row per sequence as the host prepares it."""
    zeros = int32([0] * len(lengths))
    given = TokenInput(zeros, zeros, zeros, zeros[:1], int32(table), int32(lengths), image)
    return prepare(given, P, causal_mask(torch.device("cpu")), None, packed, parts)


def attend(q, pages, given):
    return with_prepared(NPU, given).attend_pages(q, pages, given.table_BJ, given.len_B)


def attend_image(q, pages, given):
    return with_prepared(NPU, given).attend_image(q, pages, given.image.table_BJ, None, None)


@DTYPES
@pytest.mark.parametrize(("parts", "heads", "width"), [(2, (8, 2), 32), (5, (3, 1), 24)])
def test_parts_of_text_merged(dtype, parts, heads, width):
    pages, q = pages_of(20, heads[1], width, dtype), normal(4, heads[0], width, dtype=dtype)
    got, operations = run(attend, q, padded(pages), step((parts, 1)), dtype=dtype)
    wanted = PLAIN.attend_pages(q.float(), tuple(map(wider, pages)), int32(TABLE), int32(LENGTHS))
    # Each part's result is rounded, and so is the sum.
    close(got, wanted, dtype, roundings=2)
    merging = {"BroadcastTo": 1, "Add": 1, "SoftmaxV2": 1, "Mul": 1, "ReduceSum": 1}
    assert operations["FusedInferAttentionScore"] == 1
    assert {name: operations[name] for name in merging} == merging
    # To fp32 and back, and one of fp32 to fp32 that torchair adds before every sum, and GE drops.
    assert operations["Cast"] == (1 if dtype == torch.float32 else 3)


@DTYPES
def test_packed_rows(dtype):
    pages, q = pages_of(20, 2, 128, dtype), normal(4, 8, 128, dtype=dtype)
    got, operations = run(attend, q, pages, step(packed=True), dtype=dtype)
    close(got, PLAIN.attend_pages(q.float(), tuple(map(wider, pages)), int32(TABLE), int32(LENGTHS)), dtype)
    assert operations == {"FusedInferAttentionScore": 1} | {
        name: count for name, count in operations.items() if name in ("Reshape", "Identity")
    }


@DTYPES
def test_parts_of_images_merged(dtype):
    heads, width, parts = (4, 2), 24, 3
    pages, q = pages_of(20, heads[1], width, dtype), normal(5, heads[0], width, dtype=dtype)
    table = int32([[4, 2, 1, 5], [6, 6, 6, 6], [7, 3, 7, 7], [0, 0, 0, 0], [8, 2, 5, 8]])
    fill = int32([[128, 100, 128, 3], [77, 0, 0, 0], [128, 9, 0, 0], [0, 0, 0, 0], [128, 1, 128, 0]])
    # All of it; one entry; the second of two; no image; the last two of three.
    see = int32([[0, 4], [0, 1], [1, 2], [0, 0], [1, 3]])
    lengths = [1] * 5
    given = step((1, parts), image=ImageInput(table, fill, see), lengths=lengths, table=[[0]] * 5)
    got, operations = run(attend_image, q, padded(pages), given, dtype=dtype)
    wanted = PLAIN.attend_image(q.float(), tuple(map(wider, pages)), table, fill, see)
    sees = see[:, 1] > see[:, 0]
    close(got[sees], wanted[sees], dtype, roundings=2)
    assert torch.isfinite(got).all()
    assert operations["FusedInferAttentionScore"] == 1 and not {"LogicalAnd", "LogicalOr", "Less"} & operations.keys()


@pytest.mark.parametrize("parts", [(1, 1), (2, 3)])
def test_captured_kernels_take_masks_from_the_host(parts):
    """Lowered by GE's converter, as far as simulation can go: lengths are constants there."""
    dtype, ops = torch.bfloat16, npu_ops(1, "npugraph_ex")
    table, fill = int32([[4, 2, 1, 5], [6, 6, 6, 6]]), int32([[128, 100, 128, 3], [77, 0, 0, 0]])
    see, lengths, text = int32([[0, 4], [0, 1]]), [600, 129], [TABLE[3], TABLE[2]]
    zeros = int32([0] * 2)
    given = TokenInput(zeros, zeros, zeros, zeros[:1], int32(text), int32(lengths), ImageInput(table, fill, see))
    given = prepare_captured(given, P, None, parts)
    pages, q = pages_of(20, 2, 32, dtype), normal(2, 4, 32, dtype=dtype)

    def both(q, pages, given):
        own = ops.without_padding(ops, given)
        image = own.attend_image(q, pages, given.image.table_BJ, None, None)
        return own.attend_pages(q, pages, given.table_BJ, None), image

    (got, image), operations = run(both, q, pages, given, dtype=dtype)
    wide = tuple(map(wider, pages))
    close(got, PLAIN.attend_pages(q.float(), wide, int32(text), int32(lengths)), dtype, roundings=2)
    close(image, PLAIN.attend_image(q.float(), wide, table, fill, see), dtype, roundings=2)
    assert not {"Range", "Less", "Greater", "GreaterEqual", "LogicalOr", "LogicalAnd"} & operations.keys()


def test_a_decode_step_equals_plain_with_keys_in_parts(model):
    talk, fp32 = Conversation(model("base").shape), torch.float32
    compiled, eager = Compiled(model("base"), fp32, parts=(2, 2)), Eager(model("base"), fp32, fp32)
    pools = [[x for layer in pool for x in layer] for pool in (eager.pages, eager.image_pages)]
    for seed, x in enumerate(sum(pools, [])):
        x.copy_(normal(*x.shape, seed=seed))
    compiled.pages, compiled.image_pages = to_npu((eager.pages, eager.image_pages))
    # Two pages and one: the second part of the second sequence is empty.
    given = talk.tokens([200, 40], True)
    assert_close(compiled("decode", given), eager("decode", given), **CLOSE)
    [decode] = compiled.lowered.values()
    assert decode.operations["SoftmaxV2"] == len(talk.shape.text.self_layers) + len(talk.shape.text.cross_layers)


# ---- the rule

# Three text pages of two sequences in two parts, eight image pages in four.
IN_PARTS = replace(BASE, forms=((DECODE, Forms(Form(SPLIT, 2), Form(SPLIT, 4))),))
# A kernel of packed rows takes heads 128 wide.
WIDE = replace(BASE.shape, text=replace(BASE.shape.text, head_width=128))
PACKED = replace(BASE, shape=WIDE, forms=((LEAN, Forms(Form(TND))),))


@pytest.fixture(scope="module")
def in_parts():
    return capture(IN_PARTS, DECODE)


@pytest.fixture(scope="module")
def packed():
    return capture(PACKED, LEAN)


def found(captured, change, spec=IN_PARTS, bucket=DECODE, rule="forms"):
    return findings_of(rule, broken(captured, change), bucket, spec)


def attentions(ops):
    return [op for op in ops.values() if op.type == "FusedInferAttentionScore"]


def reader(ops, value, kind):
    """The operation of a type that takes a value, behind reshapes."""
    for op in ops.values():
        if value in op.input:
            return op if op.type == kind else reader(ops, f"{op.name}:0", kind)
    raise AssertionError(value)


def test_graphs_of_each_form_are_clean(in_parts, packed):
    assert lint(in_parts, Context(IN_PARTS, DECODE)) == []
    names = {finding.rule for finding in lint(packed, Context(PACKED, LEAN))}
    assert names <= {"histogram"}  # golden.json counts models whose width is that of their heads


def test_another_form_than_the_chosen_one_is_found(in_parts):
    messages = findings_of("forms", in_parts, DECODE, BASE)
    assert "attends in SPLIT with 2 parts, but BSH with 1 was chosen (and 1 more), at" in messages[0]
    assert "attends in SPLIT with 4 parts, but BSH with 1 was chosen, at" in messages[1]
    assert "in attend_image: return ops.attend_image(" in messages[1]


def test_parts_without_a_log_sum_exp_are_found(in_parts):
    def change(ops):
        attentions(ops)[0].attr["softmax_lse_flag"].b = False

    [message] = found(in_parts, change)
    assert "has 4 entries for 2 sequences, but no log-sum-exp to merge them by, at" in message


def test_a_log_sum_exp_in_sixteen_bits_is_found(in_parts):
    def change(ops):
        softmax = reader(ops, f"{attentions(ops)[0].name}:1", "SoftmaxV2")
        cast = ops[softmax.input[0].split(":")[0]]
        cast.type = "Cast"
        del cast.input[1:]
        cast.attr["_input_name_key"].list.s[:] = [b"x"]
        cast.attr["dst_type"].i = 27

    [message] = found(in_parts, change)
    assert "takes the log-sum-exp of FusedInferAttentionScore, or what is computed from it, out of fp32, at" in message


def test_a_log_sum_exp_that_weighs_nothing_is_found(in_parts):
    def change(ops):
        product = reader(ops, f"{attentions(ops)[0].name}:1", "Mul")
        product.input[1] = product.input[0]

    [message] = found(in_parts, change)
    assert "gives a log-sum-exp by which its results are not weighed, at" in message


def test_lengths_of_packed_rows_that_are_not_the_cumulative_ones_are_found(packed):
    def change(ops):
        for op in attentions(ops):
            lengths = dict(inputs_of(op))["actual_seq_lengths_kv"]
            at = list(op.input).index(dict(inputs_of(op))["actual_seq_lengths"])
            op.input[at] = lengths

    [message] = found(packed, change, PACKED, LEAN)
    assert "takes given.len_B as the cumulative lengths of its packed rows, not given.prepared.ends_B (and" in message


@pytest.mark.parametrize(
    ("change", "rule", "said"),
    [
        ("int64", "layouts", "a block table of torch.int64"),
        ("constant", "straight", "block_table comes from a constant, not straight from an input"),
    ],
)
def test_tables_of_parts_are_int32_straight_from_the_host(change, rule, said, in_parts):
    def changed(ops):
        op = attentions(ops)[0]
        table = dict(inputs_of(op))["block_table"]
        if change == "constant":
            op.input[list(op.input).index(table)] = "Const:0"
            return
        description = ops[table.split(":")[0]].output_desc[0]
        description.dtype = ge_ir_pb2.DataType.Value("DT_INT64")
        if "_meta" in description.attr:
            del description.attr["_meta"]

    assert said in found(in_parts, changed, rule=rule)[0]


@pytest.mark.parametrize(("size", "said"), [(256, "pages of 256 tokens, not 128"), (128, None)])
def test_pages_of_packed_rows_have_the_size_of_their_kernel(size, said):
    spec = replace(PACKED, page_size=size)
    messages = findings_of("layouts", capture(spec, LEAN), LEAN, spec)
    assert (said in messages[0]) if said else messages == []


def test_the_rule_has_a_test():
    assert FORMS <= FAILED
