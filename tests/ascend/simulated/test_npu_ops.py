"""Every operation of ops/npu.py, lowered by torchair and executed by the interpreter, against ops/plain.py in fp32.

In 16 bits, the graph is one that a device accepts, and the oracle gets the same rounded inputs. In fp32 ("wide"), the
graph differs only in its dtypes and must equal the oracle up to the order of fp32 sums.
"""

from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
from lowered import lower, to_host, to_npu
from torch.testing import assert_close

from mllama_graph.model.inputs import ImageInput, PromptInput, TokenInput
from mllama_graph.model.ops import Ops, padded_head
from mllama_graph.ops.npu import NPU
from mllama_graph.ops.npu_inputs import causal_mask, prepare
from mllama_graph.ops.plain import PLAIN
from mllama_graph.plan.blocks import slots

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
P = 128


CAUSAL = causal_mask(torch.device("cpu"))


def prompt(T, rows=(1,), past=(0,), table=None, image=None):
    """The inputs of prompts of `rows` new tokens as the host prepares them."""
    zeros = int32([0] * T)
    count = int32([sum(rows)]), int32([len(rows)]), int32([0])
    given = PromptInput(zeros, zeros, zeros, zeros[: len(rows)], *count, int32(rows), int32(past), table, image)
    return prepare(given, P, CAUSAL, None)


def tokens(image):
    """A decode step's inputs as the host prepares them."""
    zeros = int32([0] * len(image.see_T2))
    return prepare(
        TokenInput(zeros, zeros, zeros, zeros, zeros, int32([1] * len(image.table_BJ)), image), P, CAUSAL, None
    )


class Leaf(NamedTuple):
    """A linear or norm layer's parameters as a pytree, which a function under test can build from its inputs."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    format: None = None


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def leaf(out, into, bias, dtype):
    return Leaf(weight=normal(out, into, dtype=dtype) / into**0.5, bias=normal(out, dtype=dtype) if bias else None)


def wider(x):
    """The same values in fp32, as the oracle gets them."""
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def close(got, wanted, dtype, roundings=1):
    """Equal up to `roundings` roundings of the largest value to `dtype`, and up to fp32 sums in another order."""
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    largest = wanted.abs().max().item()
    unit = torch.finfo(dtype).eps / 2
    assert_close(got.float(), wanted.float(), atol=roundings * unit * largest + 4e-6 * max(1, largest), rtol=0)


def run(function, *given, dtype):
    """The result of a function through torchair, and the number of operations of each type in its graph."""
    lowered = lower(function, wide=dtype == torch.float32)
    result = lowered(*to_npu(given))
    return result, lowered.operations


def test_every_operation_of_the_contract_is_there():
    assert all(callable(getattr(NPU, field.name)) for field in fields(Ops))


# ---- rows


@DTYPES
def test_rms_norm(dtype):
    x, weight = 3 * normal(5, 64, dtype=dtype), normal(64, dtype=dtype)
    got, operations = run(lambda x, w: NPU.rms_norm(x, w, 1e-3), x, weight, dtype=dtype)
    close(got, PLAIN.rms_norm(x.float(), weight.float(), 1e-3), dtype)
    assert operations == {"RmsNorm": 1}


@DTYPES
def test_add_rms_norm_gives_the_norm_and_the_sum(dtype):
    x, y, weight = normal(5, 64, dtype=dtype), normal(5, 64, seed=1, dtype=dtype), normal(64, dtype=dtype)
    (normed, summed), operations = run(lambda *a: NPU.add_rms_norm(*a, 1e-5), x, y, weight, dtype=dtype)
    wanted = PLAIN.add_rms_norm(x.float(), y.float(), weight.float(), 1e-5)
    close(summed, wanted[1], dtype)
    # The norm is taken of the rounded sum.
    close(normed, wanted[0], dtype, roundings=2)
    assert operations == {"AddRmsNorm": 1}


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_linear_takes_the_weight_as_it_is(dtype, bias):
    x, w = normal(5, 64, dtype=dtype), leaf(48, 64, bias, dtype)
    if bias and dtype == torch.bfloat16:  # as npu_layout.py leaves it
        w = w._replace(bias=w.bias.float())
    given = (x, w.weight, w.bias) if bias else (x, w.weight)
    got, operations = run(lambda x, w, b=None: NPU.linear(x, Leaf(weight=w, bias=b)), *given, dtype=dtype)
    wide = Leaf(weight=w.weight.float(), bias=wider(w.bias))
    close(got, PLAIN.linear(x.float(), wide), dtype)
    assert operations["MatMul"] == 1
    assert "Transpose" not in operations


@DTYPES
def test_layer_norm(dtype):
    x, weight, bias = 5 + normal(3, 64, dtype=dtype), normal(64, dtype=dtype), normal(64, seed=1, dtype=dtype)
    got, _ = run(lambda x, w, b: NPU.layer_norm(x, Leaf(weight=w, bias=b), 1e-3), x, weight, bias, dtype=dtype)
    close(got, PLAIN.layer_norm(x.float(), Leaf(weight=weight.float(), bias=bias.float()), 1e-3), dtype)


@DTYPES
def test_rope_through_its_angles(dtype):
    position, frequency = int32([0, 3, 131071, 77]), 1.0 / 10000 ** (torch.arange(0, 32, 2) / 32)
    x = normal(4, 6, 32, dtype=dtype)
    got, operations = run(lambda x, p, f: NPU.rope(x, NPU.rope_angles(p, f)), x, position, frequency, dtype=dtype)
    # Cosine, sine and the sum are rounded.
    close(got, PLAIN.rope(x.float(), PLAIN.rope_angles(position, frequency)), dtype, roundings=3)
    assert operations["RotaryMul"] == 1


@DTYPES
def test_swiglu_and_the_exact_gelu(dtype):
    x = 3 * normal(4, 64, dtype=dtype)
    got, operations = run(lambda x: NPU.swiglu(x), x, dtype=dtype)
    close(got, PLAIN.swiglu(x.float()), dtype)
    assert operations == {"SwiGlu": 1}
    got, operations = run(lambda x: NPU.gelu(x), x, dtype=dtype)
    close(got, PLAIN.gelu(x.float()), dtype)
    # Gelu without V2 would be the tanh approximation.
    assert operations == {"GeluV2": 1}


@DTYPES
def test_embed_takes_rows(dtype):
    weight, ids = normal(9, 32, dtype=dtype), int32([8, 0, 3])
    got, operations = run(lambda i, w: NPU.embed(i, Leaf(weight=w)), ids, weight, dtype=dtype)
    assert torch.equal(got, weight[ids.long()])
    assert operations == {"GatherV2": 1}


@DTYPES
def test_patch_embed(dtype):
    x, weight = normal(2, 3, 16, 16, dtype=dtype), normal(48, 3, 8, 8, dtype=dtype) / 14
    got, operations = run(lambda x, w: NPU.patch_embed(x, w), x, weight, dtype=dtype)
    close(got, PLAIN.patch_embed(x.float(), weight.float()), dtype)
    assert operations["Conv2D"] == 1


# ---- pages


def pages_of(count, heads, width, dtype, seed=0):
    """Pages as wide as the model's heads, with random values in every slot, so that reading a wrong slot shows."""
    return tuple(normal(count, P, heads, width, seed=seed + n, dtype=dtype) for n in range(2))


def padded(pages):
    """The same pages with heads padded to the width that an NPU stores."""
    return tuple(torch.nn.functional.pad(x, (0, padded_head(x.shape[-1]) - x.shape[-1])) for x in pages)


@DTYPES
@pytest.mark.parametrize("width", [32, 24])
def test_write_pages_touches_its_slots_in_place_and_nothing_else(dtype, width):
    pages = pages_of(4, 2, width, dtype)
    k, v = normal(5, 2, width, seed=7, dtype=dtype), normal(5, 2, width, seed=8, dtype=dtype)
    slot = int32([511, 0, 128, 130, 64])
    on_device = to_npu(padded(pages))
    lowered = lower(lambda k, v, pages, slot: NPU.write_pages_(k, v, pages, slot), wide=dtype == torch.float32)
    lowered(*to_npu((k, v)), on_device, slot.to("npu"))
    wanted = tuple(x.clone() for x in pages)
    PLAIN.write_pages_(k, v, wanted, slot)
    for got, want in zip(to_host(on_device), padded(wanted), strict=True):
        assert torch.equal(got, want)
    assert lowered.operations["ScatterPaKvCache"] == 1
    assert "TensorMove" not in lowered.operations


@DTYPES
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 32), ((4, 4), 16), ((3, 1), 24)])
@pytest.mark.parametrize("new", [1, 3])
def test_attend_pages(dtype, heads, width, new):
    lengths = int32([new, 129, 128, 300])
    table = int32([[3, 0, 0], [1, 7, 0], [2, 0, 0], [9, 5, 6]])
    pages = pages_of(10, heads[1], width, dtype)
    q = normal(new * 4, heads[0], width, dtype=dtype)
    mask = CAUSAL if new > 1 else None
    got, operations = run(
        lambda q, pages, t, n, mask: NPU.attend_pages(q, pages, t, n, mask),
        q,
        padded(pages),
        table,
        lengths.long(),
        mask,
        dtype=dtype,
    )
    wanted = PLAIN.attend_pages(q.float(), tuple(map(wider, pages)), table, lengths)
    close(got, wanted, dtype)
    assert operations["FusedInferAttentionScore"] == 1
    assert "TensorMove" not in operations


@DTYPES
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 32), ((3, 1), 24)])
def test_attend_prompt_is_causal_over_the_new_rows(dtype, heads, width):
    q, k, v = (normal(40, n, width, seed=n, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    got, operations = run(
        lambda q, k, v, pages, made: NPU.attend_prompt(q, k, v, pages, None, None, None, made=made),
        q,
        k,
        v,
        padded(pages_of(1, heads[1], width, dtype)),
        prompt(40).prepared,
        dtype=dtype,
    )
    pages = pages_of(1, heads[1], width, torch.float32)
    close(got, PLAIN.attend_prompt(q.float(), k.float(), v.float(), pages, None, int32([40]), int32([0])), dtype)
    assert operations["FusedInferAttentionScore"] == 1


@DTYPES
@pytest.mark.parametrize(
    ("rows", "past"), [((33,), (0,)), ((33,), (200,)), ((20, 1, 12), (1, 255, 128)), ((9, 0, 24, 0), (200, 0, 0, 0))]
)
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 32), ((3, 1), 24)])
def test_prompts_see_exactly_their_earlier_tokens_and_their_own_through_their_pages(dtype, heads, width, rows, past):
    T, real = 40, sum(rows)
    q, k, v = (normal(T, n, width, seed=n, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    pages, table = (
        pages_of(10, heads[1], width, dtype),
        int32([[4, 2, 5], [6, 7, 8], [1, 3, 9], [0, 0, 0]][: len(rows)]),
    )
    new = [slots(one, start, count, P) for one, start, count in zip(table.tolist(), past, rows)]
    slot = int32([one for each in new for one in each] + [*range(T - real)])

    def step(q, k, v, pages, slot, table, made):
        NPU.write_pages_(k, v, pages, slot)
        return NPU.attend_prompt(q, k, v, pages, table, None, None, made=made)

    made = prompt(T, rows, past, table).prepared
    got, operations = run(step, q, k, v, padded(pages), slot, table, made, dtype=dtype)
    oracle = tuple(map(wider, pages))
    PLAIN.write_pages_(k.float(), v.float(), oracle, slot)
    wanted = PLAIN.attend_prompt(q.float(), k.float(), v.float(), oracle, table, int32(rows), int32(past))
    close(got[:real], wanted[:real], dtype)
    # Rows beyond a sequence's own are not computed; one that is padding has one row.
    assert got[real + (rows[-1] == 0) :].isnan().all()
    assert operations["FusedInferAttentionScore"] == 1 and operations.get("GatherV2", 0) == 2 * (len(rows) > 1)
    assert not {"ConcatV2", "TensorMove"} & operations.keys()


@DTYPES
@pytest.mark.parametrize("rows", [1, 3])
def test_attend_image_sees_the_filled_part_of_the_entries_in_its_range(dtype, rows):
    heads, width = (4, 2), 24
    pages, q = pages_of(8, heads[1], width, dtype), normal(2 * rows, heads[0], width, dtype=dtype)
    table, fill = int32([[4, 2, 1], [6, 0, 0]]), int32([[128, 100, 3], [77, 0, 0]])
    see = int32([[0, 2], [2, 3], [0, 0], [0, 1], [1, 1], [0, 1]][: 2 * rows] if rows > 1 else [[1, 3], [0, 0]])
    wanted = PLAIN.attend_image(q.float(), tuple(map(wider, pages)), table, fill, see)
    sees = see[:, 1] > see[:, 0]
    given = tokens(ImageInput(table, fill, see))
    got, operations = run(attend_image, q, padded(pages), table, given.prepared, dtype=dtype)
    close(got[sees], wanted[sees], dtype)
    assert torch.isfinite(got).all()
    # The mask comes from the host.
    assert operations.keys() <= {"FusedInferAttentionScore", "PadV3", "Reshape", "StridedSliceV2", "Identity"}
    # A prompt of the first sequence, whose mask is made in its graph.
    given = prompt(rows, (rows,), image=ImageInput(table[:1], fill[:1], see[:rows]))
    got, _ = run(attend_image, q[:rows], padded(pages), table[:1], given.prepared, dtype=dtype)
    close(got[sees[:rows]], wanted[:rows][sees[:rows]], dtype)
    assert torch.isfinite(got).all()
    if rows > 1:
        # Prompts of both, of different lengths, and of a sequence that is padding.
        table, fill = (torch.cat((one, one[:1] * 0)) for one in (table, fill))
        made = prompt(6, (2, 4, 0), (0, 0, 0), table, ImageInput(table, fill, see)).prepared
        got, _ = run(attend_image, q, padded(pages), table, made, dtype=dtype)
        wanted = PLAIN.attend_image(q.float(), tuple(map(wider, pages)), table, fill, see, int32([2, 4, 0]))
        close(got[sees], wanted[sees], dtype)


def attend_image(q, pages, table, made):
    return NPU.attend_image(q, pages, table, None, None, made=made)


@DTYPES
def test_gates_as_they_are_laid_out(dtype):
    y, gate, sees = normal(3, 32, dtype=dtype), normal(1, seed=4), torch.tensor([[True], [False], [True]])
    laid = gate.to(dtype).tanh()
    got, _ = run(lambda *a: NPU.gated(*a), y, laid, sees, dtype=dtype)
    assert torch.equal(got, PLAIN.gated(y, gate, sees))
    x, bias = normal(3, 32, seed=2, dtype=dtype), normal(32, dtype=dtype)
    got, _ = run(lambda *a: NPU.add_gated(*a), x, y, bias, laid, dtype=dtype)
    assert torch.equal(got, PLAIN.add_gated(x, y, bias, gate))


@DTYPES
@pytest.mark.parametrize("width", [16, 20])
def test_attend_tiles_hides_padding_from_padding(dtype, width):
    q, k, v = (normal(48, 3, width, seed=n, dtype=dtype) for n in range(3))
    for real in (34, 48):
        got, operations = run(lambda q, k, v: NPU.attend_tiles(q, k, v, real, 0.3), q, k, v, dtype=dtype)  # noqa: B023
        close(got, PLAIN.attend_tiles(q.float(), k.float(), v.float(), torch.arange(48) >= real, 0.3), dtype)
        assert operations["FusedInferAttentionScore"] == (1 if real == 48 else 2)
