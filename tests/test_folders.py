"""Checkpoint folders as training, conversion and downloads leave them: read as transformers reads them, or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import SPECS, random_weights, rename, write_checkpoint, write_weights
from engines import run_of, start, tokens_of
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration
from trees import same_as_state, stacked, tree

from mllama_graph.core.errors import UserError
from mllama_graph.model.files import EMBEDDING, HEAD, CheckpointFiles
from mllama_graph.plan.checkpoint import checkpoint_folder, model_of

BASE = SPECS["base"]
EXACT = {"rtol": 0, "atol": 0}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
KEY = "language_model.model.layers.0.mlp.gate_proj.weight"
NORM = "language_model.model.norm.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the small checkpoint in one file."""
    shutil.copytree(checkpoint("base"), tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_part(folder, part, **keys):
    config = json.loads((folder / "config.json").read_text())
    config[part] |= keys
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change, metadata=None):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata=metadata or {"format": "pt"})


def holds(folder, spec=BASE):
    """Check that a folder's tree has the spec's values."""
    root = tree(folder)
    for path, value in stacked(spec).items():
        assert torch.equal(root.get_parameter(path), value.float()), path


def index_of(folder, files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(("a", "b"), files)}))


def beside(folder, name):
    save_file({"text_model.norm.weight": torch.ones(2)}, folder / name)


READ = {
    "an out-of-date index beside a whole file": lambda f: index_of(f, "model-00001-of-00002.safetensors"),
    "old shards beside a whole file": lambda f: beside(f, "model-00001-of-00002.safetensors"),
    "a byte order mark": lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
    "Meta's files beside": lambda f: (f / "consolidated.00.pth").write_bytes(b"?"),
    "an adapter's file beside": lambda f: beside(f, "adapter_model.safetensors"),
    "another name for the file": lambda f: (f / "model.safetensors").rename(f / "pytorch.safetensors"),
    "torch_dtype that differs from the file": lambda f: edit(f / "config.json", torch_dtype="float16", dtype=None),
    "names of torch.compile": lambda f: change_weights(
        f, lambda w: [w.update({f"_orig_mod.{name}": w.pop(name)}) for name in list(w)]
    ),
}


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_a_folder_is_read_in_spite_of_what_lies_in_it(folder, change):
    change(folder)
    holds(folder)


def test_shards_without_an_index_are_read_beside_other_files(tmp_path):
    spec = replace(BASE, shards=3)
    write_checkpoint(tmp_path, spec)
    (tmp_path / "model.safetensors.index.json").unlink()
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "._model-00001-of-00003.safetensors"):
        beside(tmp_path, name)
    holds(tmp_path, spec)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards, the first of them model-00002-of-00003.safetensors"):
        tree(tmp_path)


@pytest.mark.parametrize("names", ["transformers 4", "transformers 5", "saved by transformers"])
def test_names_of_every_transformers_are_read(checkpoint, tmp_path, names):
    write_checkpoint(tmp_path, BASE)
    if names == "saved by transformers":
        MllamaForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path)
    else:
        style = "legacy" if names.endswith("4") else "new"
        write_weights(tmp_path, {rename(name, style): value for name, value in random_weights(BASE).items()}, 1)
    holds(tmp_path)


def test_mlx_names_and_channels_last_patches_are_read(folder):
    def to_mlx(weights):
        for name in list(weights):
            value = weights.pop(name)
            value = value.permute(0, 2, 3, 1).contiguous() if "patch_embedding" in name else value
            weights[name.replace("vision_model", "vision_tower")] = value

    change_weights(folder, to_mlx, {"format": "mlx"})
    holds(folder)


# ---- heads and embeddings


def test_a_tied_head_that_is_not_stored_is_the_embedding(folder):
    change_weights(folder, lambda weights: weights.pop(HEAD))
    with pytest.raises(UserError, match=f"1 tensors missing: {HEAD}"):
        tree(folder)
    edit_part(folder, "text_config", tie_word_embeddings=True)
    root = tree(folder)
    assert torch.equal(root.text.head.weight, root.text.embed.weight[: BASE.vocab])


@pytest.mark.parametrize("rows, multiple", [(BASE.vocab + 3, None), (BASE.vocab + 8, 64)])
def test_a_resized_model_gives_transformers_tokens(folder, rows, multiple):
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    model.save_pretrained(folder)
    count = model.get_input_embeddings().weight.shape[0]
    shape = CheckpointFiles(folder).shape
    assert shape.embeddings == shape.text.vocab == count
    same_as_state(tree(folder), shape, model.state_dict(), **EXACT)
    ids = [5, 17, count - 1, 40]
    lines = [{"id": 0, "input_ids": ids, "ignore_eos": True, "max_new_tokens": 6}]
    found = tokens_of(start(folder), lines)[0]
    # transformers can't load what it has saved here, since it adds 8 rows to the new size; its model in memory can run.
    for token in found:
        with torch.inference_mode():
            assert int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
        ids = [*ids, token]


@pytest.mark.parametrize(
    "name, rows, message",
    [
        # Without a row for <|image|>, and with a head that config.json does not describe.
        (EMBEDDING, BASE.vocab, rf"embed_tokens.weight is \[{BASE.vocab}, 128\], expected \[{BASE.vocab + 8}, 128\]"),
        (HEAD, BASE.vocab + 8, rf"lm_head.weight is \[{BASE.vocab + 8}, 128\], expected \[{BASE.vocab}, 128\]"),
    ],
)
def test_rows_that_config_json_does_not_explain_are_refused(folder, name, rows, message):
    change_weights(folder, lambda weights: weights.update({name: torch.ones(rows, 128)}))
    with pytest.raises(UserError, match=message):
        tree(folder)


# ---- derived models


@pytest.mark.parametrize("keep_weights", [True, False])
def test_a_trimmed_model_runs_from_its_config(folder, keep_weights):
    # The indices of cut layers stay in config.json, and often their weights in the files: transformers ignores both.
    edit_part(folder, "text_config", num_hidden_layers=3)
    if not keep_weights:
        cut = ("language_model.model.layers.3.", "language_model.model.layers.4.")
        change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(cut)])
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    shape = CheckpointFiles(folder).shape
    assert shape.text.layers == 3 and shape.text.cross_layers == (1,)
    same_as_state(tree(folder), shape, model.state_dict(), **EXACT)


def test_a_deepened_model_runs_from_its_config(tmp_path):
    spec = replace(BASE, layers=9, cross_layers=[1, 3, 6], vision_layers=6, global_layers=3, intermediate=[1, 5])
    write_checkpoint(tmp_path, spec)
    holds(tmp_path, spec)


# ---- refusals


def only(folder, name, content=b"?"):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)


def becomes_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "meta/11B"}')


def moves_inside(folder, inside):
    (folder / inside).mkdir(parents=True)
    (folder / "config.json").rename(folder / inside / "config.json")


def quantise(weights):
    weights[KEY] = torch.zeros(weights[KEY].numel() // 2, 1, dtype=torch.uint8)


QUANTISED = r"is quantised \(%s\), which is not read. Read are compressed-tensors .*or the unquantised checkpoint"
REFUSED = {
    "Git LFS, weights": (lambda f: (f / "model.safetensors").write_text(LFS), "Git LFS pointer.*run git lfs pull"),
    "Git LFS, config": (lambda f: (f / "config.json").write_text(LFS), "Git LFS pointer.*run git lfs pull"),
    ".bin": (lambda f: only(f, "pytorch_model.bin"), "only pytorch_model.bin. Convert it: python -c .*save_pretrained"),
    ".pt": (lambda f: only(f, "model.pt"), "only model.pt. Convert it: python -c"),
    "GGUF": (lambda f: only(f, "model.gguf"), "GGUF files are not read"),
    "an adapter": (becomes_adapter, "is an adapter .*Use weights= with a checkpoint of meta/11B, and adapter="),
    "a folder inside": (lambda f: moves_inside(f, "snapshots/1"), "Did you mean weights=.*/snapshots/1?"),
    "HQQ": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "hqq"}),
        QUANTISED % "hqq; quantization_config in config.json",
    ),
    "MLX": (
        lambda f: edit(f / "config.json", quantization={"group_size": 64, "bits": 4}),
        QUANTISED % "MLX; quantization in config.json",
    ),
    "AQLM without a config": (
        lambda f: change_weights(f, lambda w: w.update({KEY.replace("weight", "codebooks"): torch.ones(4)})),
        QUANTISED % f"AQLM; it holds {KEY.replace('weight', 'codebooks')}",
    ),
    "absmax of an unquantised weight": (
        lambda f: change_weights(f, lambda w: w.update({f"{KEY}.absmax": torch.ones(4)})),
        f"1 tensors unexpected: {KEY}.absmax",
    ),
    "bytes alone": (
        lambda f: change_weights(f, quantise),
        "gate_proj.weight is U8, and .*quant_state.bitsandbytes__nf4 or fp4 is missing",
    ),
    "fp8 alone": (
        lambda f: change_weights(f, lambda w: w.update({KEY: w[KEY].to(torch.float8_e4m3fn)})),
        "gate_proj.weight_scale is missing: .*gate_proj.weight is F8_E4M3 and needs it",
    ),
    "a norm in fp8": (
        lambda f: change_weights(f, lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})),
        "norm.weight is stored as F8_E4M3, and belongs to no quantised weight",
    ),
    "an index of another type": (
        lambda f: (only(f, "x"), index_of(f, 5)),
        "index.json: weight_map: a is 5; it must be a file name",
    ),
    "Latin-1": (lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xe9"}'), "byte 16 is not UTF-8"),
    "deep nesting": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not valid JSON"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_cant_be_read_is_named_with_what_to_do(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        tree(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [None, "x", "7", True, 1.5, -1, 0, [1], {"a": 1}, 10**400, float("inf"), float("nan")]
)
@pytest.mark.parametrize(
    "part, name",
    [
        ("text_config", "hidden_size"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "rope_scaling"),
        ("text_config", "cross_attention_layers"),
        ("text_config", "tie_word_embeddings"),
        ("vision_config", "image_size"),
        ("vision_config", "supported_aspect_ratios"),
        ("vision_config", "intermediate_layers_indices"),
        (None, "text_config"),
        (None, "image_token_index"),
        (None, "quantization_config"),
    ],
)
def test_any_value_of_a_field_is_read_or_refused_by_name(folder, part, name, value):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        CheckpointFiles(folder).verify()
    except UserError as error:
        text = str(error)
        # A value of the right type may give a model that the weights don't fit.
        assert name in text or "tensors" in text or "heads" in text or "must be whole numbers" in text, text
        assert "\n" not in text and len(text) < 700


@pytest.mark.parametrize(
    "weights, message",
    [
        ("nowhere", "nowhere is not a folder. Give .*random weights.$"),
        ("meta-llama/Llama-3.2", "To download it: hf download meta-llama/Llama-3.2 --local-dir Llama-3.2"),
        (__file__, "is a file. Give the folder"),
    ],
)
def test_a_value_of_weights_that_is_no_folder_is_explained(weights, message):
    with pytest.raises(UserError, match=message):
        checkpoint_folder(weights)


def test_an_adapter_needs_a_checkpoint(checkpoint):
    run = replace(run_of(checkpoint("base")), weights="random", adapter="a")
    run.model.config = {}
    with pytest.raises(UserError, match="takes its shapes from a checkpoint|adapter=a needs the weights"):
        model_of(run)
