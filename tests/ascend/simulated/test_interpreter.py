"""The interpreter refuses graphs with unknown operations and graphs that break a documented limit."""

import re
from pathlib import Path

import pytest
import torch
import torch_npu
import torchair
from lowered import lower, to_npu
from torchair._ge_concrete_graph import ge_ir_pb2

from mllama_graph.ascend.ge_ops import OPERATIONS, GraphError
from mllama_graph.ascend.graphdef import described_dtype
from mllama_graph.ascend.interpreter import Interpreter
from mllama_graph.ascend.simulation import SimulatedGraph
from mllama_graph.model.inputs import Prepared
from mllama_graph.ops.npu import NPU
from mllama_graph.ops.npu_attention import attention

BF16 = torch.bfloat16
TORCHAIR = Path(torchair.__file__).parent
FILES = ("_ge_concrete_graph/auto_generated_ge_raw_ops.py", "_ge_concrete_graph/ge_apis.py", "ge/_ge_graph.py")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def bf16(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def pages():
    return bf16(2, 128, 2, 32), bf16(2, 128, 2, 32)


def refusal(function, *given):
    """The message with which a function's graph is refused, when it is read or when it runs."""
    lowered, inputs = lower(function), to_npu(given)
    with pytest.raises(GraphError) as error:
        lowered(*inputs)
    return str(error.value)


@pytest.fixture(scope="module")
def decode():
    """The graph of a page write and a paged attention, as lowered by torchair."""

    def step(q, k, v, pages, slot, table, length):
        NPU.write_pages_(k, v, pages, slot)
        return NPU.attend_pages(q, pages, table, length)

    lowered = lower(step)
    lowered(
        *to_npu((bf16(1, 4, 32), bf16(1, 2, 32), bf16(1, 2, 32), pages(), int32([3]), int32([[0]]), torch.tensor([4])))
    )
    return lowered.graphs[0].graph


def broken(graph, change):
    """A copy of a graph, modified by `change`, which gets {type: first operation of that type}."""
    copy = ge_ir_pb2.ModelDef.FromString(graph.SerializeToString()).graph[0]
    change({op.type: op for op in reversed(copy.op)})
    return copy


# ---- unknown operations, inputs, attributes and shapes


def test_the_graph_itself_is_read(decode):
    assert Interpreter(decode).histogram["FusedInferAttentionScore"] == 1


def test_an_unknown_operation_is_named(decode):
    graph = broken(decode, lambda ops: setattr(ops["FusedInferAttentionScore"], "type", "FlashAttentionScore"))
    with pytest.raises(GraphError, match="the table has no FlashAttentionScore"):
        Interpreter(graph)


def test_an_unknown_attribute_is_named(decode):
    def change(ops):
        ops["FusedInferAttentionScore"].attr["learnable"].b = True

    graph = broken(decode, change)
    with pytest.raises(GraphError, match=r"FusedInferAttentionScore .*attributes \['learnable'\] are not known"):
        Interpreter(graph)


def test_an_unknown_input_is_named(decode):
    def change(ops):
        attention = ops["FusedInferAttentionScore"]
        names = list(attention.attr["_input_name_key"].list.s)
        attention.input[names.index(b"pse_shift")] = attention.input[0]

    graph = broken(decode, change)
    with pytest.raises(GraphError, match="input 'pse_shift' is not known"):
        Interpreter(graph)


@pytest.mark.parametrize(("name", "value"), [("sparse_mode", 4), ("pre_tokens", 3)])
def test_a_mode_that_is_not_implemented_is_refused(decode, name, value):
    field = "b" if value is True else "i"
    message = run(broken(decode, lambda ops: setattr(ops["FusedInferAttentionScore"].attr[name], field, value)))
    assert "not known" in message
    assert "FusedInferAttentionScore" in message


def run(graph):
    """The message with which a changed graph of the `decode` fixture is refused when it runs."""
    by_size = {2: int32([[0]]), 1: int32([4])}
    inputs = []
    for op in graph.op:
        if op.type == "Data":
            shape = tuple(op.output_desc[0].shape.dim)
            values = bf16(*shape) if op.output_desc[0].dtype == 27 else by_size[len(shape)]
            values = values.to(described_dtype(op.output_desc[0]))
            inputs.append((op.attr["index"].i, values))
    interpreter, given = Interpreter(graph), [x for _, x in sorted(inputs, key=lambda pair: pair[0])]
    with pytest.raises(GraphError) as error:
        interpreter.run(given)
    return str(error.value)


@pytest.mark.parametrize(("old", "new"), [("bfloat16", "float16"), ("[1, 4, 32]", "[1, 4, 16]")])
def test_an_output_that_is_not_what_the_graph_says_is_refused(decode, old, new):
    def change(ops):
        meta = ops["FusedInferAttentionScore"].output_desc[0].attr["_meta"]
        assert old.encode() in meta.s
        meta.s = meta.s.replace(old.encode(), new.encode())

    assert "the graph says" in run(broken(decode, change))


def test_a_symbolic_shape_is_refused(decode):
    def change(ops):
        meta = ops["FusedInferAttentionScore"].output_desc[0].attr["_meta"]
        meta.s = b"Tensor(dtype=torch.bfloat16, shape=torch.Size([s0, 4])"

    graph = broken(decode, change)
    with pytest.raises(GraphError, match="a symbolic shape"):
        Interpreter(graph)


# ---- pages are written in place


def write_through_a_view(k, v, pages, slot):
    NPU.write_pages_(k, v, tuple(data.view(4, 64, 2, 32) for data in pages), slot)


def test_a_write_through_a_view_of_the_pages_is_refused():
    message = refusal(write_through_a_view, bf16(1, 2, 32), bf16(1, 2, 32), pages(), int32([3]))
    assert "TensorMove" in message or "a copy" in message


def test_reading_pages_from_before_the_write_is_refused(decode):
    def change(ops):
        scatter, attention = ops["ScatterPaKvCache"], ops["FusedInferAttentionScore"]
        attention.input[1] = scatter.input[1]

    graph = broken(decode, change)
    with pytest.raises(GraphError, match="must read what was"):
        Interpreter(graph)


@pytest.mark.parametrize(
    ("slots", "message"), [([3, 3], "slots are not unique"), ([3, 256], "a slot is outside of the pages")]
)
def test_slots_are_checked(slots, message):
    given = bf16(2, 2, 32), bf16(2, 2, 32), pages(), int32(slots)
    assert message in refusal(lambda *a: NPU.write_pages_(*a), *given)


# ---- attention's documented limits


def paged(rows=1, page=128, width=32, dtype=BF16, table=((0,),), length=(4,), count=2):
    return (
        torch.randn(rows, 4, width).to(dtype),
        (torch.randn(count, page, 2, width).to(dtype),) * 2,
        int32(table),
        torch.tensor(length),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (paged(page=24), "a page of 24 tokens for 1 query rows"),
        (paged(rows=3, page=64), "a page of 64 tokens for 3 query rows"),
        (paged(page=1024), "a page of 1024 tokens"),
        (paged(width=24), "a head width of 24 is not a multiple of 16"),
        (paged(dtype=torch.float32), "dtypes torch.float32"),
        (paged(table=((7,),)), "names a page that is not there"),
        (paged(length=(129,)), r"lengths [129] in a table of 1 pages"),
        (paged(length=(300,), table=((0, 1, 0),)), "3 pages are used by all sequences, 2 exist"),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)
def test_paged_attention_is_held_to_its_documentation(given, message):
    assert message in refusal(lambda *a: NPU.attend_pages(*a), *given)


def test_lengths_must_be_int64():
    def attend(q, pages, table, length):
        return torchair.ops.npu_fused_infer_attention_score(
            q.flatten(1)[:, None],
            *(x.flatten(2) for x in pages),
            num_heads=4,
            num_key_value_heads=2,
            block_table=table,
            block_size=128,
            actual_seq_lengths_kv=length,
        )[0]

    assert "actual_seq_lengths_kv in int64" in refusal(attend, *paged()[:3], int32([4]))


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (1, {"sparse_mode": 3, "mask": True}, "sparse_mode 3 for one query row, which resets it to 0"),
        (1, {"actual_seq_lengths": [1]}, "lengths of queries that have one row are not read"),
        (3, {"actual_seq_lengths": [4]}, "[4] query rows of 3"),
        (3, {"actual_seq_lengths": [2, 1]}, "2 lengths of queries"),
    ],
)
def test_rows_and_lengths_that_the_tiling_code_would_drop_are_refused(rows, given, message):
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1) if given.pop("mask", False) else None
    lengths = torch.tensor(given.pop("actual_seq_lengths")) if "actual_seq_lengths" in given else None

    def attend(q, k, v, table, length, mask, lengths):
        return attention(
            q[None],
            k,
            v,
            32,
            kv_heads=2,
            mask=mask,
            block_table=table,
            block_size=128,
            actual_seq_lengths=lengths,
            actual_seq_lengths_kv=length,
            **given,
        )

    q, (k, v), table, length = paged(rows)
    assert message in refusal(attend, q, k, v, table, length, mask, lengths)


def test_a_bias_in_bf16_is_refused():
    assert "no kernel adds a bias in torch.bfloat16" in refusal(
        lambda x, w, b: torch_npu.npu_linear(x, w, b), bf16(2, 32), bf16(16, 32), bf16(16)
    )


def test_a_row_that_sees_no_key_is_refused():
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    message = refusal(lambda q, mask: attention(q, q, q, 16, kv_heads=2, mask=mask), bf16(1, 32, 2, 16), mask)
    assert "a row is wholly masked" in message


def test_a_wrong_causal_mask_is_refused():
    made = Prepared(causal_MM=torch.zeros(2048, 2048, dtype=torch.bool))
    message = refusal(
        lambda q, k, v, pages, made: NPU.attend_prompt(q, k, v, pages, None, None, None, made=made),
        *(bf16(8, 2, 16) for _ in "qkv"),
        (bf16(1, 128, 2, 16), bf16(1, 128, 2, 16)),
        made,
    )
    assert "hides what lies above the diagonal" in message


# ---- other limits


def test_mixed_integer_dtypes_are_refused():
    # torchair's converter of lt does not cast its operands.
    assert "are mixed" in refusal(lambda x: torch.arange(4, device=x.device) < x, int32([2]))


def test_a_weight_of_another_dtype_than_x_is_refused():
    assert "they must be equal" in refusal(lambda x, w: torch_npu.npu_rms_norm(x, w)[0], bf16(2, 32), torch.ones(32))


def test_more_heads_than_rotation_takes_are_refused():
    def rotate(x, angle):
        return torch_npu.npu_rotary_mul(x, angle, angle)

    assert "B, N < 1000" in refusal(rotate, bf16(1, 2, 1000, 16), torch.zeros(1, 2, 1, 16, dtype=BF16))


def test_cosines_above_one_are_refused():
    angles = torch.full((1, 2, 1, 16), 1.5, dtype=BF16)
    assert "lie in [-1, 1]" in refusal(lambda x, a: torch_npu.npu_rotary_mul(x, a, a), bf16(1, 2, 2, 16), angles)


def test_an_index_outside_of_a_table_is_refused():
    assert "an index is outside" in refusal(lambda x, i: x.index_select(0, i), bf16(4, 8), int32([4]))


# ---- the table's sources


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_entry_names_a_definition_that_exists(name):
    source = OPERATIONS[name].source
    operators = "".join((TORCHAIR / file).read_text() for file in FILES)
    docs = (Path(torch_npu.__file__).parent / "_op_plugin_docs.py").read_text()
    named = re.findall(r"\bIR (\w+)|\bdocs (\w+)", source)
    assert named
    for operator, documented in named:
        assert f"REG_OP({operator})" in operators if operator else f'"{documented}"' in docs


def test_a_graph_is_loaded_once_for_all_its_calls():
    before = len(SimulatedGraph.loaded)
    lowered = lower(lambda x: NPU.swiglu(x))
    for _ in range(3):
        lowered(bf16(2, 8).to("npu"))
    assert len(SimulatedGraph.loaded) == before + 1
