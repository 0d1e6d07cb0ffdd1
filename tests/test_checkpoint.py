"""Weights from safetensors: names, shards, dtypes, and the errors for damaged files."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import DTYPES, LLAMA3_SCALING, SPECS, model_config, write_checkpoint
from engines import CPU
from safetensors.torch import load_file, save_file
from transformers.models.mllama import modeling_mllama as hf
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from trees import PIXELS, grouped, ignore, joined, parameter, stacked, tree

from mllama_graph.core.errors import UserError
from mllama_graph.engine.device import TORCH_DTYPES
from mllama_graph.model.fields import Fields
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.shape import _rope, shape_of
from mllama_graph.model.table import Shard, elements, replicated
from mllama_graph.model.tree import build, inverse_frequencies
from mllama_graph.model.weights import from_checkpoint, random_fill
from mllama_graph.plan.checkpoint import checkpoint_folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    """broken(change, spec name) -> a copy of a checkpoint whose tensors `change` has edited in place."""

    def copy(change, name="base"):
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint(name), folder)
        path = sorted(folder.glob("*.safetensors"))[0]
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        return folder

    return copy


@pytest.mark.parametrize("names", ["new", "legacy"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_arrives_bit_for_bit(names, shards, dtype, tmp_path):
    spec = replace(SPECS["base"], names=names, shards=shards, dtype=dtype)
    write_checkpoint(tmp_path, spec)
    assert TORCH_DTYPES[CheckpointFiles(tmp_path).stored] == DTYPES[dtype]
    for target in (DTYPES[dtype], torch.float32):
        root = tree(tmp_path, target)
        for path, value in stacked(spec).items():
            assert torch.equal(parameter(root, path), value.to(target)), path


@pytest.mark.parametrize("name", SPECS)
def test_every_tensor_of_every_architecture_has_its_place(name, checkpoint):
    root, wanted = tree(checkpoint(name)), stacked(SPECS[name])
    assert {path for path, _ in root.named_parameters()} == set(wanted)
    for path, value in wanted.items():
        assert torch.equal(parameter(root, path), value.float()), path


def test_the_old_inv_freq_buffer_is_ignored(broken):
    folder = broken(lambda w: w.update({"language_model.model.rotary_emb.inv_freq": torch.zeros(16)}))
    tree(folder)


NAME = "language_model.model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(NAME), f"1 tensors missing: {NAME}"),
        (
            lambda w: w.update({"language_model.model.layers.9.extra": torch.zeros(1)}),
            "1 tensors unexpected: language_model.model.layers.9.extra",
        ),
        (lambda w: w.update({NAME: w[NAME].T.contiguous()}), rf"{NAME} is \[128, 64\], expected \[64, 128\]"),
        (lambda w: w.update({NAME: w[NAME][:-1].contiguous()}), rf"{NAME} is \[63, 128\], expected \[64, 128\]"),
        (
            lambda w: w.update({"vision_model.class_embedding": torch.zeros(47)}),
            r"class_embedding is \[47\], expected \[48\]",
        ),
        (
            lambda w: w.update({"model.language_model.norm.weight": torch.ones(128)}),
            "norm.weight is in model.safetensors and again",
        ),
        (lambda w: [w.pop(name) for name in list(w) if "vision_model" in name], "vision_model.* and [0-9]+ more"),
    ],
)
def test_a_faulty_tensor_is_named(broken, change, message):
    with pytest.raises(UserError, match=message):
        tree(broken(change))


def test_a_tensor_in_two_shards_is_named(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("wide"), folder)
    first, second = sorted(folder.glob("*.safetensors"))
    weights, name = load_file(second), next(iter(load_file(first)))
    save_file(weights | {name: load_file(first)[name]}, second)
    with pytest.raises(UserError, match=f"{name} is in .*00001.* and again in .*00002"):
        tree(folder)


def test_a_dtype_that_cant_be_computed_is_refused(broken):
    folder = broken(lambda w: w.update({name: value.to(torch.int16) for name, value in w.items()}))
    with pytest.raises(UserError, match="is stored as I16; read are F32, F16, BF16"):
        _ = CheckpointFiles(folder).stored


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "is named in the index but missing"),
        (
            lambda f: [path.rename(f / "blob") and path.symlink_to("gone") for path in f.glob("*-00001-*.safetensors")],
            "safetensors is a link to gone, which does not exist. Download",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{]"), "index.json is not valid JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'), "index.json|no .safetensors"),
        (lambda f: truncate(sorted(f.glob("*.safetensors"))[1]), "00002.* can't be read as safetensors"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b""), "00001.* can't be read as safetensors"),
        (
            lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"not safetensors at all"),
            "can't be read as safetensors",
        ),
        (
            lambda f: [path.unlink() for path in [*f.glob("*.safetensors"), *f.glob("*.index.json")]],
            "holds no .safetensors",
        ),
    ],
)
def test_a_damaged_folder_is_named(checkpoint, tmp_path, damage, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("wide"), folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        tree(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_an_index_that_names_a_tensor_absent_from_its_file_makes_it_missing(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("wide"), folder)
    path = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path)
    assert name in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with pytest.raises(UserError, match=f"missing: {name}"):
        tree(folder)


def test_a_missing_folder_suggests_random_weights(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder.*weights=random"):
        checkpoint_folder(str(tmp_path / "nowhere"))


# ---- rope and random weights


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3_SCALING,
        LLAMA3_SCALING | {"factor": 32.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.5},
    ],
)
@pytest.mark.parametrize("head_width", [16, 24, 32, 64, 128])
def test_inverse_frequencies_are_hugging_faces(scaling, head_width):
    given = {"rope_theta": 500000.0} | scaling
    config = MllamaTextConfig(
        hidden_size=4 * head_width, num_attention_heads=4, num_key_value_heads=4, rope_parameters=dict(given)
    )
    theirs = hf.MllamaRotaryEmbedding(config).inv_freq
    ours = inverse_frequencies(_rope(Fields({"rope_parameters": given}, "config.json")), head_width)
    # One or two roundings in fp32.
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
    assert ours.dtype == torch.float32 and ours.shape == (head_width // 2,)


def test_random_weights_fill_every_tensor_and_depend_only_on_the_seed():
    shape = shape_of(model_config(SPECS["base"]))
    trees = [
        build(shape, PIXELS, torch.float32, CPU, random_fill(shape, seed, torch.float32), ignore) for seed in (1, 1, 2)
    ]
    for path, value in trees[0].named_parameters():
        assert torch.equal(value, parameter(trees[1], path)), path
        assert not torch.equal(value, parameter(trees[2], path)), path
        assert value.isfinite().all() and (value != 0).any(), path
        if value.numel() > 1:
            assert value.std() > 0, path
        if path.endswith("gate"):
            assert value.tanh().abs().min() > 0.05, f"{path} is closed"


def test_progress_adds_up_to_the_bytes_of_the_tree(checkpoint):
    done = []
    found = CheckpointFiles(checkpoint("base"))
    root = build(found.shape, PIXELS, torch.float32, CPU, from_checkpoint(found), done.append)
    # Each call reports the bytes of one Parameter.
    assert sum(done) == sum(value.numel() * 4 for value in root.parameters())


# ---- shards


@pytest.mark.parametrize("source", ["checkpoint", "random"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", ["base", "wide"])
def test_the_shards_of_all_ranks_join_to_the_whole_model(name, world, source, checkpoint):
    # Three ranks divide neither vocabulary nor heads nor MLP, so that all of them are padded.
    shape = shape_of(model_config(SPECS[name]))
    make = (
        (lambda shard: tree(checkpoint(name), shard=shard))
        if source == "checkpoint"
        else (
            lambda shard: build(shape, PIXELS, torch.float32, CPU, random_fill(shape, 3, torch.float32), ignore, shard)
        )
    )
    whole, parts = make(Shard()), [make(Shard(rank, world)) for rank in range(world)]
    for path, entries in grouped(shape).items():
        assert torch.equal(joined([parameter(part, path) for part in parts], entries, world), parameter(whole, path)), (
            path
        )
    for part in parts:
        assert sum(value.numel() for value in part.parameters()) == elements(shape, Shard(0, world))
    firsts = [part.text.embed.first.item() for part in parts]
    rows = parts[0].text.embed.weight.shape[0]
    assert firsts == [min(rank * rows, shape.embeddings) for rank in range(world)]


@pytest.mark.parametrize("name, world", [("base", 2), ("cross_first", 2), ("wide", 4)])
def test_ranks_hold_each_weight_once_except_replicated_ones(name, world):
    shape = shape_of(model_config(SPECS[name]))
    extra = sum(replicated(shape).values())
    padding = sum(elements(shape, Shard(rank, world)) for rank in range(world)) - elements(shape) - (world - 1) * extra
    # Only the vocabulary may be padded: by less than one row per rank in the embedding and in the head.
    assert 0 <= padding < 2 * world * shape.text.width


def test_leaves_have_weight_scale_and_bias(model):
    root = model("base").weights
    for leaf in (root.text.head, root.text.layers[0].qkv, root.vision.local_layers[0].fc1, root.projector):
        assert leaf.weight.dim() == 2 and leaf.scale is None
    assert root.text.head.bias is None and root.projector.bias is not None
    assert not any(value.requires_grad for value in root.parameters())
