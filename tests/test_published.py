"""Published quantised checkpoints: codes arrive as they are, and the engine equals one on the dequantised weights.

compressed-tensors and bitsandbytes write and dequantise their own formats; quantised_checkpoints.py the others.
"""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import quantised_checkpoints as write
import torch
from checkpoints import SPECS, write_checkpoint
from commands import LIMITS, run
from engines import CPU, resolved, run_of, serve, start
from safetensors.torch import load_file
from test_ranks import written
from trees import PIXELS, ignore, parameter, tree

from mllama_graph import native
from mllama_graph.model.adapter import Adapter
from mllama_graph.model.codes import Codes, unpack, values
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.formats import DYNAMIC, FLOAT, STATIC, Format
from mllama_graph.model.layout import LeafRows
from mllama_graph.model.table import WHOLE, Shard
from mllama_graph.model.tree import build, linears
from mllama_graph.model.weights import from_checkpoint, mapped, published
from mllama_graph.ops import cpu
from mllama_graph.ops.plain import quantised_linear

GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float"}
TOKEN = {"strategy": "token", "dynamic": True}
EVERY = r".*(_proj|fc1|fc2|lm_head|projector)\.weight"
AUTO_ROUND = {"quant_method": "intel/auto-round", "packing_format": "auto_round:auto_gptq"}


def ct(form, weights, **more):
    return lambda folder, base: write.compressed_tensors(folder, base, form, weights=weights, **more)


def by(function, *given, **more):
    return lambda folder, base: function(folder, base, *given, **more)


# name: (writer, the format of most leaves)
FORMATS = {
    "fp8 per channel": (
        ct("float-quantized", FP8 | {"strategy": "channel"}, inputs=FP8 | TOKEN), Format("fp8")),
    "fp8 per tensor": (
        ct("float-quantized", FP8 | {"strategy": "tensor"}, inputs=FP8 | {"strategy": "tensor"}), Format("fp8")),
    "w8a8": (ct("int-quantized", CHANNEL, inputs=CHANNEL | TOKEN), Format("int8", activations=DYNAMIC)),
    "w8a8 static": (
        ct("int-quantized", CHANNEL, inputs=CHANNEL | {"strategy": "tensor"}), Format("int8", activations=STATIC)),
    "int8": (ct("naive-quantized", CHANNEL), Format("int8")),
    "packed 4": (ct("pack-quantized", GROUPS), Format("int4", 32)),
    "packed 4, asymmetric": (ct("pack-quantized", GROUPS | {"symmetric": False}), Format("int4", 32, True)),
    "packed 4, int8 activations": (
        ct("pack-quantized", GROUPS, inputs=CHANNEL | TOKEN), Format("int4", 32, activations=DYNAMIC)),
    "packed 4 per channel": (ct("pack-quantized", CHANNEL | {"num_bits": 4}), Format("int4")),
    "packed 8, asymmetric": (ct("pack-quantized", CHANNEL | {"symmetric": False}), Format("int8", 0, True)),
    "nf4": (by(write.bitsandbytes_4), Format("codebook", 64)),
    # Vision rows of 48 inputs: blocks of 64 cross them.
    "nf4 of all layers": (by(write.bitsandbytes_4, modules=EVERY), Format("codebook", 64)),
    "fp4, not nested": (by(write.bitsandbytes_4, "fp4", nested=False), Format("codebook", 64)),
    "LLM.int8": (by(write.bitsandbytes_8), Format("int8")),
    "gptq": (by(write.gptq), Format("int4", 32)),
    "gptq of version 2, asymmetric": (by(write.gptq, version=2, symmetric=False), Format("int4", 32, True)),
    "gptq, act-order": (by(write.gptq, act_order=True, symmetric=False), Format("int4", 32, True, True)),
    "gptq of 8 bits per channel": (by(write.gptq, bits=8, group=-1, symmetric=False), Format("int8", 0, True)),
    "gptq of 8 bits, act-order": (by(write.gptq, bits=8, act_order=True), Format("int8", 32, False, True)),
    "auto-round": (by(write.gptq, method=AUTO_ROUND), Format("int4", 32)),
    "awq": (by(write.awq), Format("int4", 32, True)),
    "ModelSlim w8a16": (by(write.modelslim), Format("int8")),
    "ModelSlim w8a16 with offsets": (by(write.modelslim, version=0, offsets=True), Format("int8", 0, True)),
    "ModelSlim w8a8": (by(write.modelslim, "W8A8"), Format("int8", activations=STATIC)),
    "ModelSlim w8a8 of an fp16 model": (
        by(write.modelslim, "W8A8", version=0, fp16=True), Format("int8", activations=STATIC)),
    "ModelSlim w8a8 dynamic": (by(write.modelslim, "W8A8_DYNAMIC"), Format("int8", activations=DYNAMIC)),
}  # fmt: skip


# The base checkpoint of conftest.py with fewer layers.
SMALL = replace(
    SPECS["base"], layers=3, cross_layers=[1], vision_heads=2, vision_layers=2, global_layers=1, intermediate=[1]
)


@pytest.fixture(scope="module", autouse=True)
def kernels(cache_home):
    native.load("kernels", cache_home)
    native.load("quantised", cache_home)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of an unquantised checkpoint."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_checkpoint(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def quantised(base, tmp_path_factory):
    """quantised(name in FORMATS) -> folder, the folder of its twin in floating point."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp("quantised") / "checkpoint"
        return folder, FORMATS[name][0](folder, base)

    return make


def weights_of(folder, shard=WHOLE, adapters=(), layout=None):
    """The tree of a rank as the engine builds it, and the notes on its formats."""
    files = CheckpointFiles(folder, adapters)
    files.verify()
    formats, notes = files.formats(shard.world)
    sources = from_checkpoint(files), ignore, shard, formats, published(files), layout, mapped(files)
    return build(files.shape, PIXELS, torch.float32, CPU, *sources), notes


def in_panels(leaf):
    """The parts of a leaf that are held in rows, as the kernels of a CPU read them."""
    parts = {name: value.clone() for name, value in leaf.named_parameters()}
    for name, part in parts.items():
        if part.dim() == 2:
            if leaf.format:
                LeafRows(parts, leaf.format, 0, cpu.PANELS).write(name, getattr(leaf, name))
            else:
                cpu.PANELS.rows(part, 0, getattr(leaf, name))
    return parts


def held(leaf):
    """The values of a leaf's weight, in the order of its inputs."""
    if not leaf.format:
        return leaf.weight
    codes = Codes(unpack(leaf.weight, leaf.format), leaf.scale, leaf.shift, codebook=leaf.codebook)
    found = values(codes, leaf.format)
    return found if leaf.order is None else torch.empty_like(found).index_copy_(1, leaf.order.long(), found)


def same_values(folder, twin, shard=WHOLE):
    """Check each weight of a rank against the twin's."""
    got, _ = weights_of(folder, shard)
    wanted = tree(twin, shard=shard)
    for path in (path for path, _ in wanted.named_parameters() if path.endswith(".weight")):
        leaf = parameter(got, path.removesuffix(".weight"))
        found = held(leaf) if hasattr(leaf, "format") else leaf.weight
        # One rounding in fp32, of LLM.int8's division by 127.
        torch.testing.assert_close(found, parameter(wanted, path), rtol=3e-7, atol=1e-7, msg=f"{path}: {{}}".format)


@pytest.mark.parametrize("name", FORMATS)
def test_every_rank_holds_the_values_that_the_codes_stand_for(name, quantised):
    folder, twin = quantised(name)
    formats, _ = CheckpointFiles(folder).formats(1)
    kinds = [form for _, form in formats]
    # What is 8 or 4 bits in the file is so in memory.
    assert max(kinds, key=kinds.count) == FORMATS[name][1]
    for shard in (WHOLE, Shard(1, 2)):
        same_values(folder, twin, shard)
        in_rows, direct = (weights_of(folder, shard, layout=layout)[0] for layout in (None, cpu.PANELS))
        for one, other in zip(linears(in_rows), linears(direct), strict=True):
            for part, value in in_panels(one).items():
                assert torch.equal(getattr(other, part).view(torch.uint8), value.view(torch.uint8)), part


SERVED = ("bos_image", "text_15", "image_first_17")


def lines_of(requests):
    return [line | {"logprobs": 3, "max_new_tokens": 12} for line in requests("base") if line["id"] in SERVED]


def agree(ours, theirs):
    """Whether tokens are equal, and log-probabilities within 2e-3: sums in fp32, and bf16 scales as they are."""
    assert ours["token_ids"] == theirs.token_ids
    for one, other in zip(ours["logprobs"], theirs.logprobs, strict=True):
        assert abs(one["logprob"] - other["logprob"]) < 2e-3


@pytest.mark.parametrize("name", ["fp8 per channel", "packed 4, asymmetric", "nf4", "gptq, act-order", "awq"])
def test_the_engine_gives_the_tokens_of_the_dequantised_weights(name, quantised, requests):
    folder, twin = quantised(name)
    ours, theirs = (serve(start(path, batch=4, page_size=16), lines_of(requests)) for path in (folder, twin))
    for id in SERVED:
        agree(ours[id].line(), theirs[id])


def test_two_ranks_give_the_tokens_of_the_dequantised_weights(quantised, requests, tmp_path):
    # o and down, whose inputs two ranks split, are sorted by act-order: they are dequantised.
    folder, twin = quantised("gptq, act-order")
    file = written(tmp_path / "requests.jsonl", lines_of(requests))
    theirs = serve(start(twin, batch=4, page_size=16), lines_of(requests))
    done = run(tmp_path / "out", *LIMITS, f"weights={folder}", f"requests={file}", "backend=eager", "batch=4", "tp=2")
    assert done.code == 0, done.err
    assert "6 quantised layers, text.layers.0.o the first, are dequantised while loading" in done.err
    for line in done.lines():
        agree(line, theirs[line["id"]])


def test_a_static_layer_computes_modelslims_formula(quantised):
    folder, _ = quantised("ModelSlim w8a8")
    got, _ = weights_of(folder)
    stored = load_file(next(folder.glob("quant_model_weights*")))
    name = "language_model.model.layers.0.self_attn.o_proj"
    part = {
        end: stored[f"{name}.{end}"] for end in ("weight", "quant_bias", "deq_scale", "input_scale", "input_offset")
    }
    x = 3 * torch.randn(5, part["weight"].shape[1], generator=torch.Generator().manual_seed(0))
    codes = ((x / part["input_scale"]).round() + part["input_offset"]).clamp(-128, 127)
    wanted = (codes.double() @ part["weight"].double().T + part["quant_bias"]) * part["deq_scale"]
    # Two roundings in fp32 of scales.
    torch.testing.assert_close(quantised_linear(x, got.text.layers[0].o), wanted.float(), rtol=1e-6, atol=1e-6)


# ---- leaves that stack different weights


def only(pattern):
    """A pattern of modules for GPTQ."""
    return rf".*language_model\..*({pattern})\.weight"


def test_a_leaf_with_unquantised_weights_is_dequantised(base, tmp_path):
    twin = write.gptq(tmp_path / "a", base, modules=only("q_proj|up_proj|o_proj"))
    got, notes = weights_of(tmp_path / "a")
    assert got.text.layers[0].qkv.format is None and got.text.layers[0].gate_up.format is None
    assert got.text.layers[0].o.format == Format("int4", 32) and got.text.layers[1].q.format == Format("int4", 32)
    assert len(notes) == 1 and "5 quantised layers, text.layers.0.qkv the first, are dequantised" in notes[0]
    same_values(tmp_path / "a", twin)


def test_a_leaf_with_different_permutations_is_dequantised(base, tmp_path):
    twin = write.gptq(tmp_path / "a", base, act_order=True, seed=lambda module: hash(module[-6:]) % 1000)
    got, notes = weights_of(tmp_path / "a")
    assert got.text.layers[0].qkv.format is None and got.text.layers[0].o.format
    assert any("different permutations" in note for note in notes)
    same_values(tmp_path / "a", twin)


def test_different_static_scales_leave_activations_unrounded(base, tmp_path):
    folder = tmp_path / "a"
    twin = write.modelslim(folder, base, "W8A8", input_scale=lambda module: 0.25 if "k_proj" in module else 0.0625)
    got, notes = weights_of(folder)
    assert got.text.layers[0].qkv.format == Format("int8", activations=FLOAT)
    assert got.text.layers[0].o.format.activations == STATIC
    assert any("multiplied with unrounded activations" in note for note in notes)
    same_values(folder, twin)


def test_layers_that_an_adapter_changes_are_dequantised(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import MllamaForConditionalGeneration

    twin = write.gptq(tmp_path / "a", base)
    model = MllamaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["down_proj"])).save_pretrained(
        tmp_path / "b"
    )
    got, notes = weights_of(tmp_path / "a", adapters=[Adapter(tmp_path / "b")])
    wanted = tree(twin, adapter=str(tmp_path / "b"))
    assert got.text.layers[0].down.format is None and got.text.layers[0].qkv.format
    torch.testing.assert_close(got.text.layers[0].down.weight, wanted.text.layers[0].down.weight, rtol=1e-6, atol=1e-6)
    assert "an adapter changes them" in notes[0]


def test_groups_that_a_shard_cuts_become_smaller(base, tmp_path):
    # 128 inputs in groups of 64: each of four ranks holds half a group, with the scale of the whole.
    twin = write.gptq(tmp_path / "a", base, group=64, symmetric=False)
    assert dict(CheckpointFiles(tmp_path / "a").formats(4)[0])["text.layers.0.o"] == Format("int4", 32, True)
    same_values(tmp_path / "a", twin, Shard(1, 4))


def test_the_memory_plan_counts_codes(quantised):
    whole = resolved(run_of(quantised("gptq")[1])).memory.weights
    run = resolved(run_of(quantised("gptq")[0]))
    tree_bytes = sum(value.numel() * value.element_size() for value in weights_of(quantised("gptq")[0])[0].parameters())
    assert run.memory.weights == tree_bytes < whole
    assert run.format_notes == ("quantised checkpoint: GPTQ: 21 of 41 linear weights in int4",)


def test_a_trimmed_model_keeps_the_codes_of_cut_layers_in_its_files(quantised, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(quantised("gptq")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    weights_of(folder)
