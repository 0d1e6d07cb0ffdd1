"""PEFT adapters merged while weights are loaded: the oracle is peft's own merge_and_unload."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import SPECS, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration
from trees import grouped, joined, parameter, same_as_state, tree

from mllama_graph.core.errors import UserError
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.table import Shard

# peft multiplies the scale into the product, here it is multiplied into the sum: a few roundings in fp32.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(checkpoint):
    """base() -> transformers' model of the small checkpoint, loaded anew."""
    return lambda: MllamaForConditionalGeneration.from_pretrained(checkpoint("base"), dtype=torch.float32)


@pytest.fixture
def adapter(base, tmp_path):
    """adapter(name, keys of LoraConfig) -> a saved adapter folder with random factors, biases and saved modules."""

    def make(name="adapter", seed=0, **keys):
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(init_lora_weights=False, **keys))
        for value in (value for value in model.parameters() if value.requires_grad):
            value.data += 0.05 * torch.randn_like(value)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merged_by_peft(base, *folders):
    """The state dict after peft merged the adapters, in turn."""
    model = base()
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.state_dict()


KINDS = {
    "text": {"r": 4, "lora_alpha": 16, "target_modules": TEXT},
    "vision and projector": {"r": 3, "target_modules": ["fc1", "fc2", "q_proj", "multi_modal_projector"]},
    "rank-stabilised": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj"]},
    "rank 1": {"r": 1, "target_modules": ["o_proj"]},
    "rank above the width": {"r": 200, "target_modules": ["q_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": TEXT,
        "rank_pattern": {"o_proj": 2, r"layers\.[12]\.self_attn\.v_proj": 7},
        "alpha_pattern": {"gate_proj": 32, "model.language_model.layers.0.self_attn.q_proj": 1},
    },
    "fan_in_fan_out, which peft ignores for linear layers": {"target_modules": ["k_proj"], "fan_in_fan_out": True},
    "all biases": {"target_modules": ["fc1", "multi_modal_projector", "q_proj"], "bias": "all"},
    "biases of adapted modules": {"target_modules": ["fc1", "q_proj"], "bias": "lora_only"},
    "bias of the second factor": {"target_modules": ["fc1", "fc2"], "lora_bias": True},
    "saved modules": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "multi_modal_projector", "layernorm_post", "input_layernorm"],
    },
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "tile_embedding"]},
    "convolution": {"r": 4, "target_modules": ["patch_embedding"]},
    "DoRA": {"r": 4, "target_modules": [*TEXT, "fc1", "fc2"], "use_dora": True},
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_a_merged_adapter_equals_pefts_merge_on_one_rank_and_on_two(base, adapter, checkpoint, keys):
    folder, shape = adapter(**keys), CheckpointFiles(checkpoint("base")).shape
    whole = tree(checkpoint("base"), adapter=str(folder))
    same_as_state(whole, shape, merged_by_peft(base, folder), **CLOSE)
    parts = [tree(checkpoint("base"), shard=Shard(rank, 2), adapter=str(folder)) for rank in range(2)]
    for path, entries in grouped(shape).items():
        together = joined([parameter(part, path) for part in parts], entries, 2)
        torch.testing.assert_close(together, parameter(whole, path), **CLOSE)


def test_an_adapter_changes_what_it_names_and_nothing_else(adapter, checkpoint):
    folder = adapter(r=4, target_modules=["down_proj"])
    plain, merged = tree(checkpoint("base")), tree(checkpoint("base"), adapter=str(folder))
    differing = {path for path, value in plain.named_parameters() if not torch.equal(value, parameter(merged, path))}
    assert differing == {f"text.layers.{layer}.down.weight" for layer in range(5)}


def test_several_adapters_are_summed_with_their_weights(base, adapter, checkpoint):
    first, second = adapter("first", 1, r=4, target_modules=TEXT), adapter("second", 2, r=7, target_modules=["q_proj"])
    model = PeftModel.from_pretrained(base(), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    # "cat" is the sum of the products; "linear" would sum the factors, which needs equal ranks.
    model.add_weighted_adapter(["first", "second"], [0.5, -2.0], "both", combination_type="cat")
    model.set_adapter("both")
    wanted, shape = model.merge_and_unload().state_dict(), CheckpointFiles(checkpoint("base")).shape
    # The products of both are joined into one, of four times the size.
    close = {"rtol": 1e-5, "atol": 1e-5}
    for given in (f"{first}:0.5,{second}:-2", [f"{first}:0.5", f"{second}:-2.0"]):
        same_as_state(tree(checkpoint("base"), adapter=given), shape, wanted, **close)
    one = merged_by_peft(base, first, second)
    same_as_state(tree(checkpoint("base"), adapter=[str(first), str(second)]), shape, one, **CLOSE)


@pytest.mark.parametrize("names", ["language model alone", "transformers 4", "adapter name in keys", ".bin"])
def test_names_and_files_of_other_versions_are_read(base, adapter, checkpoint, names):
    folder = adapter(r=4, target_modules=TEXT if names == "language model alone" else [*TEXT, "fc1"])
    wanted, path = merged_by_peft(base, folder), folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if names == "language model alone":
        tensors = {
            name.replace("model.language_model.", "model."): value
            for name, value in tensors.items()
            if "vision" not in name
        }
        wanted = {name: value for name, value in wanted.items() if "vision" not in name}
        wanted = {name: value for name, value in base().state_dict().items() if "vision" in name} | wanted
    elif names == "transformers 4":
        for new, old in (
            ("base_model.model.model.", "base_model.model."),
            ("language_model.", "language_model.model."),
        ):
            tensors = {name.replace(new, old): value for name, value in tensors.items()}
    elif names == "adapter name in keys":
        tensors = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    if names == ".bin":
        path.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, path)
    shape = CheckpointFiles(checkpoint("base")).shape
    same_as_state(tree(checkpoint("base"), adapter=str(folder)), shape, wanted, **CLOSE)


def test_a_bf16_checkpoint_is_rounded_once_after_the_sum(adapter, checkpoint, base):
    folder = adapter(r=4, target_modules=["gate_proj"])
    exact = merged_by_peft(base, folder)["model.language_model.layers.0.mlp.gate_proj.weight"]
    merged = tree(checkpoint("base"), torch.bfloat16, adapter=str(folder)).text.layers[0].gate_up.weight
    # The checkpoint is fp32, so that the only rounding is that of the sum. Where fp32 sums differ in their last bit,
    # their roundings to bf16 may differ by one.
    different = (merged[: len(exact)] != exact.bfloat16()).float().mean()
    assert different < 1e-3
    torch.testing.assert_close(merged[: len(exact)], exact.bfloat16(), rtol=2**-7, atol=0)


def edit(folder, **keys):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rename_tensors(folder, old, new):
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: edit(f, peft_type="IA3"), "peft_type=IA3; only LORA is read.*merge_and_unload"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json has no peft_type. Give the fo"),
        (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights=pissa changed the base"),
        (lambda f: edit(f, target_parameters=["experts"]), "target_parameters .* is not read"),
        (lambda f: edit(f, use_dora=True), "has no lora_magnitude_vector, which use_dora needs"),
        (lambda f: edit(f, r=5), r"q_proj.lora_A.weight is \[4, 128\], and the model needs \[5, 128\]"),
        (lambda f: edit(f, r="four"), "adapter_config.json: r is 'four'; it must be a finite number"),
        (lambda f: edit(f, rank_pattern=["q_proj"]), "rank_pattern is .'q_proj'.; it must be an object"),
        (lambda f: edit(f, rank_pattern={"(": 4}), "'\\(' is no regular expression"),
        (lambda f: rename_tensors(f, "q_proj", "qkv_proj"), "changes 5 modules .* does not have: .*qkv_proj"),
        (lambda f: rename_tensors(f, "lora_B", "lora_C"), "without the other factor"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff{}"), "adapter_config.json is not valid JSON"),
        (lambda f: (f / "adapter_model.safetensors").write_text(LFS), "git lfs pull"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), "holds no tensor"),
    ],
)
def test_an_adapter_that_cant_be_merged_is_refused_by_name(adapter, checkpoint, change, message):
    folder = adapter(r=4, target_modules=r".*language_model.*\.q_proj")
    change(folder)
    with pytest.raises(UserError, match=message):
        tree(checkpoint("base"), adapter=str(folder))


def test_a_wrong_base_is_refused_by_module_and_shape(adapter, tmp_path):
    write_checkpoint(tmp_path / "other", replace(SPECS["base"], hidden=256))
    folder = adapter(r=4, target_modules=r".*language_model.*\.q_proj")
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.lora_A.* is \[4, 128\], and .* \[4, 256\]. It was"):
        tree(tmp_path / "other", adapter=str(folder))


@pytest.mark.parametrize(
    "given, message",
    [
        ("nowhere", "adapter=nowhere is not a folder.*PATH:WEIGHT"),
        ("{0}:heavy", "heavy is not a folder"),
        ("{0}:nan", "must be a finite number"),
        ("{0}:0.5", "replaces .*lm_head.* Use it with weight 1"),
        ("{0},{0}", "both set .*lm_head"),
    ],
)
def test_values_of_adapter_are_refused_with_their_rule(adapter, checkpoint, given, message):
    folder = adapter(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=message):
        tree(checkpoint("base"), adapter=given.format(folder))
