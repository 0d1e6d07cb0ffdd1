"""Which quantised layers an NPU's kernels take, decided while a run is resolved."""

import re

import pytest

from mllama_graph.core.config import TorchairChoice
from mllama_graph.core.devices import DEVICES
from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import CHOICES, DYNAMIC, STATIC, Format, chosen
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.quantised import compiler_choice, on_device

RELEASED, NPU, NPU_SIM = shape_of({"model_type": "mllama"}), DEVICES["npu"], DEVICES["npu-sim"]
LEAF = "text.layers.0.qkv"


def test_the_head_stays_in_floating_point_where_it_has_too_many_outputs():
    for tp, held in ((1, False), (2, True)):
        formats = chosen("w8a16", 128, ["text", "head"], RELEASED, tp)
        found = dict(on_device(formats, "w8a16", RELEASED, tp, NPU, "bf16"))
        assert ("text.head" in found) == held
        assert len(found) == len(formats) - (not held)


def test_a_cpu_takes_every_format():
    formats = chosen("fp8", 128, ["text", "head"], RELEASED, 1)
    assert on_device(formats, "fp8", RELEASED, 1, DEVICES["cpu"], "fp32") == formats


@pytest.mark.parametrize(
    ("path", "form", "quant", "message"),
    [
        (LEAF, Format("fp8"), "fp8", "quant=fp8: text.layers.0.qkv is in fp8, for which device=npu has no kernel. Use"),
        (
            LEAF,
            Format("codebook", group=64),
            "none",
            "weights=: text.layers.0.qkv is in codebook, for which device=npu",
        ),
        (LEAF, Format("int8", group=48), "none", "groups of 48 inputs; device=npu takes multiples of 32"),
        (
            "text.head",
            Format("int8"),
            "none",
            "has 128256 outputs or inputs a rank; device=npu takes up to 65535. Raise tp",
        ),
        (LEAF, Format("int8", activations=STATIC), "none", "a stored scale of int8 activations, with which device=npu"),
    ],
)
def test_what_has_no_kernel_is_refused_with_the_remedy(path, form, quant, message):
    with pytest.raises(UserError, match=re.escape(message)):
        on_device(((path, form),), quant, RELEASED, 1, NPU, "fp16")


@pytest.mark.parametrize("device", ["npu", "npu-sim", "cuda"])
def test_four_bits_by_int8_activations_are_a_cpus(device):
    formats = chosen("w4a8", 128, ["text"], RELEASED, 1)
    assert on_device(formats, "w4a8", RELEASED, 1, DEVICES["cpu"], "fp32") == formats
    message = f"quant=w4a8: device={device} has no kernel that multiplies 4-bit weights with int8 activations. Use"
    with pytest.raises(UserError, match=re.escape(message)):
        on_device(formats, "w4a8", RELEASED, 1, DEVICES[device], "bf16")
    # A checkpoint's codes stay, and its activations are not rounded.
    unrounded = chosen("w4a16", 128, ["text"], RELEASED, 1)
    assert on_device(formats, "none", RELEASED, 1, DEVICES[device], "bf16") == unrounded


def test_weights_in_tiles_need_graphs_for_float_activations():
    captured = TorchairChoice(mode="npugraph_ex", weight_format="nz")
    with pytest.raises(UserError, match="weight_format=nz"):
        compiler_choice(((LEAF, CHOICES["w8a16"]),), captured, NPU)
    compiler_choice(((LEAF, Format("int8", activations=DYNAMIC)),), captured, NPU)
    compiler_choice(((LEAF, CHOICES["w8a16"]),), TorchairChoice(weight_format="nz"), NPU)


@pytest.mark.parametrize(
    ("device", "mode", "form", "layout"),
    [
        (NPU, "max-autotune", None, "nz"),
        (NPU, "max-autotune", "w8a16", "nz"),
        (NPU, "npugraph_ex", None, "nz"),
        # No kernel multiplies int8 weights in NZ by float activations outside of GE's graphs.
        (NPU, "npugraph_ex", "w8a16", "nd"),
        (NPU_SIM, "max-autotune", None, "nd"),
    ],
)
def test_weights_are_in_nz_on_a_device_unless_one_has_no_kernel(device, mode, form, layout):
    formats = ((LEAF, CHOICES[form]),) if form else ()
    assert compiler_choice(formats, TorchairChoice(mode=mode), device).weight_format == layout
    assert compiler_choice(formats, TorchairChoice(mode=mode, weight_format="nd"), device).weight_format == "nd"


def test_heads_of_quantised_vision_layers_are_not_padded():
    formats = (("vision.local_layers.0.qkv", CHOICES["w8a16"]),)
    with pytest.raises(UserError, match="pad_vision_heads=true: vision.local_layers.0.qkv is quantised"):
        compiler_choice(formats, TorchairChoice(pad_vision_heads=True), NPU)
