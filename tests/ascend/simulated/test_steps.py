"""Whole steps of small models, lowered by torchair and executed by the interpreter, against plain.py run eagerly."""

from functools import cache

import pytest
import torch
from checkpoints import SPECS
from conversation import FIRST, Compiled, Conversation, Eager, play
from torch.testing import assert_close

# Models whose second sequence is text alone and uses graphs without images; in the others it uses those with images.
TEXT_ALONE = ("base", "cross_first")
# fp32 through up to eight layers, logits of order ten, the same sums in another order.
CLOSE = {"atol": 5e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def played(model):
    """played(spec name, dtype) -> the compiled steps, their logits, the eager oracle, its logits."""

    @cache
    def both(name, dtype):
        talk = Conversation(model(name).shape, name in TEXT_ALONE)
        compiled, eager = Compiled(model(name), dtype), Eager(model(name), dtype, torch.float32)
        return compiled, play(compiled, talk), eager, play(eager, talk)

    return both


@pytest.mark.parametrize("name", SPECS)
def test_every_step_equals_plain_in_fp32(name, played):
    compiled, logits, eager, expected = played(name, torch.float32)
    for got, want in zip(logits, expected, strict=True):
        assert_close(got, want, **CLOSE)
    for got, want in zip(compiled.contents(), eager.contents(), strict=True):
        assert want.any()
        assert_close(got, want, **CLOSE)


def test_weights_in_nz_and_padded_heads_change_no_result(model, played):
    """Weights as (in, out), which the simulation does not cast to tiles; heads of the vision tower 64 wide, not 16."""
    shape, compiled = model("base").shape, Compiled(model("base"), torch.float32, nz=True, padded=True)
    talk, expected = Conversation(shape), played("base", torch.float32)[3][0]
    compiled("vision", talk.vision())
    assert_close(compiled("prefill", talk.prompt([(0, 0, FIRST)], True)), expected, **CLOSE)
    for layer in compiled.weights.vision.local_layers:
        assert layer.qkv.weight.shape == (shape.vision.width, 3 * shape.vision.heads * 64)
    # A product with (in, out) has no transpose flag; only those with a bias have kept it.
    for lowered in compiled.lowered.values():
        products = [op for op in lowered.graphs[0].graph.op if op.type == "MatMul"]
        biased = [op for op in products if len([value for value in op.input if value]) == 3]
        assert all(op.attr["transpose_x2"].b == (op in biased) for op in products)


@pytest.mark.parametrize(("name", "dtype"), [("base", torch.bfloat16), ("adjacent", torch.float16)])
def test_in_16_bits_the_steps_are_no_further_from_fp32_than_plain_is(name, dtype, model, played):
    _, logits, _, expected = played(name, dtype)
    sixteen = play(Eager(model(name), dtype, dtype), Conversation(model(name).shape, name in TEXT_ALONE))
    for got, plain, want in zip(logits, sixteen, expected, strict=True):
        error, allowed = ((x - want).pow(2).mean().sqrt() for x in (got, plain))
        # Both round equally often but in other places, so that their errors are of similar size: at most twice here.
        assert error <= 2 * allowed, (error, allowed, want.abs().max())


def test_the_16_bit_graph_is_the_fp32_one_except_for_casts(played):
    graphs = [played("base", dtype)[0].lowered for dtype in (torch.float32, torch.bfloat16)]
    assert graphs[0].keys() == graphs[1].keys()
    for key in graphs[0]:
        wide, narrow = (lowered[key].operations for lowered in graphs)
        for name in ("Cast", "Const", "Identity"):
            wide.pop(name, None)
            narrow.pop(name, None)
        assert wide == narrow


@pytest.mark.parametrize(("name", "dtype"), [("base", torch.bfloat16), ("adjacent", torch.float16)])
def test_steps_are_made_of_fused_operations(name, dtype, played, model):
    text = model(name).shape.text
    layers, cross = len(text.self_layers), len(text.cross_layers)
    compiled = played(name, dtype)[0]
    for (phase, *_, lean), lowered in compiled.lowered.items():
        found = lowered.operations
        assert "TensorMove" not in found
        assert "Mul" in found
        if phase == "vision":
            continue
        used = layers if lean else layers + cross
        assert "Transpose" not in found
        assert "BatchMatMul" not in found
        assert found["FusedInferAttentionScore"] == used * (2 if phase == "mixed" else 1)
        # One norm before each half of a layer and a final one; the first norm is not fused, since it adds nothing.
        assert found["AddRmsNorm"] == 2 * used
        assert found["SwiGlu"] == used
        assert found["RotaryMul"] == 2 * layers
        assert found["ScatterPaKvCache"] == layers


def test_a_decode_graph_returns_logits_alone(played):
    for (phase, *_), lowered in played("base", torch.bfloat16)[0].lowered.items():
        if phase == "decode":
            assert len(lowered.graphs[0].interpreter.outputs) == 1


def test_a_hundred_steps_of_growing_length_compile_once_and_stay_right(model):
    talk = Conversation(model("base").shape)
    compiled, eager = Compiled(model("base"), torch.float32), Eager(model("base"), torch.float32, torch.float32)
    for run in (compiled, eager):
        run("vision", talk.vision())
    # The lengths cross the end of a page at 128 tokens.
    for length in range(60, 160):
        given = talk.tokens([length, length // 2], True)
        assert_close(compiled("decode", given), eager("decode", given), **CLOSE)
    [decode] = [lowered for key, lowered in compiled.lowered.items() if key[0] == "decode"]
    assert len(decode.graphs) == 1
