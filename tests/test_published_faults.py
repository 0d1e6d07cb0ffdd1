"""Malformed quantised checkpoints, and those of methods that are not read: one line that names what is at fault."""

import json
import shutil

import pytest
import quantised_checkpoints as write
import torch
from checkpoints import SPECS, write_checkpoint
from commands import run
from engines import resolved, run_of
from safetensors.torch import load_file, save_file

from mllama_graph.core.errors import UserError

MODULE = "language_model.model.layers.2.self_attn.k_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> the folder of a quantised checkpoint."""
    folder = tmp_path_factory.mktemp("faults")
    write_checkpoint(folder / "base", SPECS["base"])
    write.gptq(folder / "gptq", folder / "base", act_order=True)
    write.awq(folder / "awq", folder / "base")
    write.modelslim(folder / "W8A8", folder / "base", "W8A8")
    write.modelslim(folder / "W8A16", folder / "base")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """copy(name) -> a copy of a checkpoint."""

    def make(name):
        shutil.copytree(made / name, tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return make


def tensors(change):
    """A change of the dict of tensors."""

    def edit(folder):
        path = next(folder.glob("*.safetensors"))
        weights = load_file(path)
        change(weights)
        save_file({name: value.contiguous() for name, value in weights.items()}, path)

    return edit


def put(end, make):
    """A change of one tensor of MODULE."""
    name = f"{MODULE}.{end}"
    return tensors(lambda weights: weights.update({name: make(weights[name])}))


def drop(end):
    return tensors(lambda weights: weights.pop(f"{MODULE}.{end}"))


def config(**changes):
    """A change of fields of the quantisation's configuration."""

    def edit(folder):
        path = folder / "config.json"
        given = json.loads(path.read_text())
        given["quantization_config"] = given.get("quantization_config", {}) | changes
        path.write_text(json.dumps(given))

    return edit


def described(kind):
    """A change of MODULE's kind in ModelSlim's description."""

    def edit(folder):
        path = folder / "quant_model_description.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {f"{MODULE}.weight": kind}))

    return edit


CT = {"quant_method": "compressed-tensors"}
NOT_READ = "which is not read. Read are compressed-tensors .*GPTQ and AWQ"
FAULTS = {
    "scales missing": ("gptq", drop("scales"), rf"{MODULE}.scales is missing: .*qweight needs it"),
    "zero points missing": ("gptq", drop("qzeros"), rf"{MODULE}.qzeros is missing: .*qweight needs it"),
    "scales of a wrong shape": (
        "gptq",
        put("scales", lambda v: v[:, 1:]),
        r"k_proj.scales is \[4, 63\], expected \[4, 64\]",
    ),
    "groups of no size": (
        "gptq",
        put("scales", lambda v: v[:3]),
        "k_proj.scales has 3 groups, which 128 inputs don't make",
    ),
    "codes of a wrong shape": (
        "gptq",
        put("qweight", lambda v: v[:, 1:]),
        r"k_proj.qweight is \[16, 63\], expected \[16, 64\]",
    ),
    "codes of 2 bits": (
        "gptq",
        put("qweight", lambda v: v[:8]),
        r"k_proj.qweight is \[8, 64\]: 2 bits for each of 128; 4 and",
    ),
    "codes of a wrong dtype": (
        "gptq",
        put("qweight", lambda v: v.float()),
        "k_proj.qweight is stored as F32, expected I32",
    ),
    "a group that isn't there": (
        "gptq",
        put("g_idx", lambda v: v + 1),
        "k_proj.g_idx names groups 1 to 4; there are 4",
    ),
    "3 bits": (
        "gptq",
        config(bits=3),
        rf"is quantised \(GPTQ, 3 bits; quantization_config in config.json\), {NOT_READ}",
    ),
    "marlin": ("gptq", config(checkpoint_format="marlin"), rf"\(GPTQ, 'marlin'; .*{NOT_READ}"),
    "an unknown method": ("gptq", config(quant_method="quark"), rf"is quantised \(quark; .*{NOT_READ}"),
    "no method": ("gptq", config(quant_method=None), rf"is quantised \(an unnamed method; .*{NOT_READ}"),
    "AWQ of another version": ("awq", config(version="gemv"), rf"AWQ, 'gemv'; .*{NOT_READ}"),
    "AWQ with 8 bits": ("awq", config(bits=8), rf"AWQ, 8 bits; .*{NOT_READ}"),
    "AWQ's zero points of a wrong shape": (
        "awq",
        put("qzeros", lambda v: v[:, 1:]),
        r"qzeros is \[4, 7\], expected \[4, 8\]",
    ),
    "2:4 sparse": (
        "W8A16",
        config(**CT, sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse-24-bitmask.*not read",
    ),
    "NVFP4": (
        "W8A16",
        config(**CT, format="nvfp4-pack-quantized"),
        "compressed-tensors, 'nvfp4-pack-quantized'.*not read",
    ),
    "5 bits": (
        "W8A16",
        config(**CT, config_groups={"a": {"weights": {"num_bits": 5}}}),
        "compressed-tensors, 5 bits.*not read",
    ),
    "int8 without a scale": ("W8A16", drop("weight_scale"), f"{MODULE}.weight_scale is missing: .*k_proj.weight is I8"),
    "a scale of a wrong shape": (
        "W8A16",
        put("weight_scale", lambda v: v[1:]),
        r"weight_scale is \[63, 1\], expected \[64, 1\] or",
    ),
    "an integer scale": (
        "W8A16",
        put("weight_scale", lambda v: v.int()),
        "weight_scale is stored as I32, expected F32 or F16",
    ),
    "an offset of a wrong shape": (
        "W8A16",
        put("weight_offset", lambda v: v.T),
        r"weight_offset is \[1, 64\], expected \[64, 1\]",
    ),
    "an unknown kind": (
        "W8A16",
        described("W4A8_DYNAMIC"),
        rf"ModelSlim, W4A8_DYNAMIC; {MODULE}.weight in quant_model_desc.*",
    ),
    "no scale of inputs": ("W8A8", drop("input_scale"), "k_proj.input_scale is missing: static activations need it"),
    "a scale of zero": ("W8A8", put("input_scale", torch.zeros_like), "k_proj.input_scale is 0 with a zero of -7"),
    "deq_scale of a wrong shape": (
        "W8A8",
        put("deq_scale", lambda v: v[1:]),
        r"deq_scale is \[63\], expected \[64\] or",
    ),
    "a norm with a bias": (
        "W8A8",
        tensors(lambda w: w.update({"language_model.model.layers.0.input_layernorm.bias": torch.ones(128)})),
        "layers.0.input_layernorm.bias is not zero: anti_outlier added it.*Quantise again without anti_outlier",
    ),
    "a tensor that belongs to nothing": (
        "W8A16",
        tensors(lambda w: w.update({"language_model.model.norm.weight_scale": torch.ones(1)})),
        "1 tensors unexpected: language_model.model.norm.weight_scale",
    ),
}


@pytest.mark.parametrize("name, change, message", FAULTS.values(), ids=FAULTS)
def test_what_is_malformed_or_not_read_is_named_before_any_rank(copy, name, change, message):
    folder = copy(name)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        resolved(run_of(folder))
    assert "\n" not in str(error.value)


def test_the_command_line_ends_with_exit_code_2(copy, tmp_path):
    folder = copy("gptq")
    drop("scales")(folder)
    done = run(tmp_path / "out", f"weights={folder}", "prompt=Hi", "backend=eager")
    assert done.code == 2 and f"{MODULE}.scales is missing" in done.one_line_error()


def test_quant_beside_a_quantised_checkpoint_is_refused(made):
    with pytest.raises(UserError, match="quant=w8a16: .* is quantised already .GPTQ: 35 of 73 .*Leave quant= out"):
        resolved(run_of(made / "gptq", quant="w8a16"))


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.0.input_layernorm.bias", "language_model.model.norm.bias"]
)
def test_a_bias_of_zeros_in_a_norm_is_ignored(copy, name):
    folder = copy("W8A8")
    tensors(lambda weights: weights.update({name: torch.zeros(128)}))(folder)
    resolved(run_of(folder))


def test_a_bias_hidden_in_a_static_layer_is_refused_while_loading(copy):
    from test_published import weights_of

    folder = copy("W8A8")
    put("quant_bias", lambda value: value + 5)(folder)
    with pytest.raises(UserError, match=r"k_proj.quant_bias holds a bias of its own in 64 rows \(row 0\)"):
        weights_of(folder)


def test_settings_without_quantised_tensors_change_nothing(copy):
    # transformers would quantise such a checkpoint when it loads it.
    folder = copy("base")
    config(quant_method="bitsandbytes", load_in_4bit=True)(folder)
    run = resolved(run_of(folder))
    assert not run.storage.formats and not run.format_notes
