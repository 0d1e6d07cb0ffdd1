"""task=quantize: the checkpoint it writes, read by compressed-tensors' own decompression."""

import json

import pytest
import torch
from checkpoints import SPECS, write_checkpoint
from commands import QUICK, run
from engines import resolved, run_of, serve, start
from safetensors.torch import load_file

from mllama_graph.core.errors import UserError
from mllama_graph.model import compressed
from mllama_graph.model.codes import quantise, values
from mllama_graph.model.formats import is_linear, leaf_of
from mllama_graph.model.table import WHOLE, table
from mllama_graph.model.weights import from_checkpoint
from mllama_graph.tasks import quantize
from mllama_graph.tasks.quantize_options import QuantizeOptions

QUANTS = ("w8a16", "w8a8", "w4a16", "w4a8", "fp8")


def written(folder, weights, quant, rounding="mse", calibration=None, **changes):
    """The resolved run of task=quantize that wrote OUT in `folder`, and the tensors of all files."""
    out = folder / "out"
    options = QuantizeOptions(folder=str(out), rounding=rounding, calibration=calibration)
    changes = {"quant_group": 32} | changes
    done = resolved(run_of(weights, quant=quant, task=options, output_dir=str(folder), **changes))
    quantize.main(done)
    tensors = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    return done, out, {name: value for part in tensors for name, value in part.items()}


def expected(done, entry, dtype):
    """The fp32 weight that the codes of an entry stand for."""
    source = torch.empty(entry.shape)
    from_checkpoint(done.checkpoint)(entry, source, entry.region(WHOLE))
    form = dict(done.storage.formats)[leaf_of(entry)]
    return values(quantise(source, form, dtype), form)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", QUANTS)
def test_compressed_tensors_gives_the_values_of_our_codes(quant, dtype, checkpoint, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    done, out, tensors = written(tmp_path, checkpoint("base"), quant, dtype=dtype)
    given = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(given)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    torch_dtype = getattr(torch, compressed.DTYPES[dtype][1])
    formats, seen = dict(done.storage.formats), 0
    for entry in table(done.shape):
        if not (is_linear(entry) and leaf_of(entry) in formats):
            assert tensors[entry.name].shape == entry.shape and tensors[entry.name].dtype == torch_dtype
            continue
        local = {
            name.removeprefix(entry.name.removesuffix("weight")): value
            for name, value in tensors.items()
            if name.startswith(entry.name)
        }
        found = compressor.decompress(local, scheme)["weight"]
        # In fp32, exactly; a product in the checkpoint's dtype is rounded to it.
        assert found.dtype == torch_dtype
        torch.testing.assert_close(found, expected(done, entry, torch_dtype).to(torch_dtype), rtol=0, atol=0)
        seen += 1
    assert seen > 20


def test_codes_suit_scales_of_16_bits(checkpoint, tmp_path):
    """Scales rounded after codes were chosen would add up to 0.4 % to every value."""
    done, _, tensors = written(tmp_path, checkpoint("base"), "w8a16", dtype="bf16")
    for entry in [entry for entry in table(done.shape) if f"{entry.name}_scale" in tensors]:
        source = torch.empty(entry.shape)
        from_checkpoint(done.checkpoint)(entry, source, entry.region(WHOLE))
        # Half a step, or the part of the largest value that was cut off.
        step = tensors[f"{entry.name}_scale"].float()
        assert (expected(done, entry, torch.bfloat16) - source).abs().le(0.51 * step + 2**-8 * 127 * step * 0.02).all()


def test_shards_have_at_most_their_size_and_an_index(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed.planned, "__defaults__", (100_000,))
    done, out, tensors = written(tmp_path, checkpoint("base"), "w4a16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {name: load_file(out / name) for name in sorted(set(index["weight_map"].values()))}
    assert len(files) > 3 and set(index["weight_map"]) == set(tensors)
    for name, held in files.items():
        sizes = [value.numel() * value.element_size() for value in held.values()]
        # A weight that is larger has a file of its own.
        assert sum(sizes) <= 100_000 or len(held) <= 3, name
        assert all(index["weight_map"][tensor] == name for tensor in held)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_other_parts_are_chosen_by_quant_parts(checkpoint, tmp_path):
    done, out, tensors = written(tmp_path, checkpoint("base"), "fp8", quant_parts=["head", "projector"])
    assert {name for name in tensors if name.endswith("_scale")} == {
        "language_model.lm_head.weight_scale",
        "multi_modal_projector.weight_scale",
    }
    given = json.loads((out / "config.json").read_text())["quantization_config"]
    assert given["ignore"] == ["re:.*language_model.*layers.*", "re:.*vision_model.*"]


def test_files_beside_the_weights_are_copied(checkpoint, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, SPECS["base"])
    (source / "LICENSE.txt").write_text("licence")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    _, out, _ = written(tmp_path, source, "fp8")
    left = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    files = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
    assert {name for name in files if (out / name).is_file()} | left == set(files) | left
    assert not (out / "model.safetensors.index.json").exists()
    for name in files.keys() - left:
        assert (out / name).read_bytes() == files[name].read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["format"] == "float-quantized"
    kept = json.loads((source / "config.json").read_text())
    assert {key: config[key] for key in kept if "dtype" not in key} == {
        key: value for key, value in kept.items() if "dtype" not in key
    }


def test_what_cannot_be_written_is_refused_in_one_line(checkpoint, tmp_path, monkeypatch):
    full, base = tmp_path / "full", checkpoint("base")
    full.mkdir()
    (full / "x").write_text("x")
    for changes, fault in (
        ({"quant": "none"}, "quant= one of w8a16"),
        ({"folder": None}, "task.folder=OUT"),
        ({"folder": str(full)}, "not an empty folder"),
        ({"folder": str(full / "x")}, "not an empty folder"),
        ({"weights": "meta"}, "has no values"),
    ):
        options = QuantizeOptions(folder=changes.pop("folder", str(tmp_path / "new")))
        with pytest.raises(UserError, match=fault):
            resolved(run_of(changes.pop("weights", base), task=options, **{"quant": "fp8"} | changes))
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="disk has 0.0 GB free"):
        written(tmp_path, base, "fp8")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "copy_others", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, checkpoint("base"), "fp8")
    assert not any((tmp_path / "out").iterdir())


def test_the_command_writes_a_checkpoint_that_is_not_quantised_twice(tmp_path):
    out = tmp_path / "first"
    done = run(tmp_path / "run", *QUICK, "task=quantize", "model=tiny", "quant=w8a16", f"task.folder={out}")
    assert done.code == 0, done.err
    assert "pack-quantized, 8 bits" in done.out and done.result()["metrics"]["format"] == "pack-quantized"
    with pytest.raises(UserError, match="is quantised already"):
        written(tmp_path / "again", out, "w8a16")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("quant", QUANTS)
def test_the_engine_reads_what_it_writes_as_what_it_quantises_itself(quant, checkpoint, requests, tmp_path):
    _, out, _ = written(tmp_path, checkpoint("base"), quant, dtype="fp32")
    lines = [line | {"logprobs": 5} for line in requests("base")[:4]]
    found = serve(start(out), lines)
    expected = serve(start(checkpoint("base"), quant=quant, quant_group=32), lines)
    for id, result in expected.items():
        assert found[id].token_ids == result.token_ids and found[id].logprobs == result.logprobs
