"""Each form of a decode step's attention, lowered by torchair and executed by the interpreter, equals ops/plain.py."""

import pytest
import torch
from test_npu_ops import DTYPES, P, close, int32, normal, padded, pages_of, run, wider

from mllama_graph.model.inputs import ImageInput, TokenInput
from mllama_graph.ops.npu import NPU, with_prepared
from mllama_graph.ops.npu_inputs import causal_mask, prepare
from mllama_graph.ops.plain import PLAIN

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
