"""Writes a checkpoint with quantised linear layers in the layout of compressed-tensors, which many engines read.

Sources: compressed_tensors/compressors (pack_quantized, naive_quantized) for tensors, and its quantization_config; the
safetensors format for files. Names are those of released checkpoints, which all generations of transformers read.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllama_graph.model.formats import DYNAMIC, PARTS, Format, Formats, is_linear, leaf_of
from mllama_graph.model.layout import LeafRows
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import WHOLE, Entry, table
from mllama_graph.model.tree import Fill, FillQuantised

# The most bytes of tensors in a file, as transformers splits checkpoints.
SHARD_BYTES = 5_000_000_000
# dtype= -> (safetensors, torch)
DTYPES = {"fp32": ("F32", "float32"), "fp16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1, "I32": 4, "I64": 8}
TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Parts that are not quantised -> the modules of config.json's `ignore`. A search of the whole name, since engines and
# generations of transformers call the same module by different prefixes.
IGNORED = {
    "text": "re:.*language_model.*layers.*",
    "head": "re:.*lm_head",
    "vision": "re:.*vision_model.*",
    "projector": "re:.*multi_modal_projector.*",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. kind: its dtype as in safetensors headers."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return WIDTHS[self.kind] * prod(self.shape)


@dataclass(frozen=True)
class Weight:
    """An entry of the table as it is stored: its format, or None, and its tensors."""

    entry: Entry
    form: Format | None
    tensors: tuple[Stored, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.bytes for tensor in self.tensors)


def layout(form: Format) -> str:
    """The name of a format's layout in compressed-tensors."""
    if form.code == "fp8":
        return "float-quantized"
    return "int-quantized" if form.bits == 8 and form.activations == DYNAMIC else "pack-quantized"


def stored(entry: Entry, form: Format | None, dtype: str) -> Weight:
    """How an entry is stored; scales and unquantised tensors in `dtype`, a key of DTYPES."""
    floating = DTYPES[dtype][0]
    if form is None:
        return Weight(entry, None, (Stored(entry.name, floating, entry.shape),))
    rows, inputs = entry.shape
    scale = Stored(f"{entry.name}_scale", floating, (rows, form.groups(inputs)))
    if layout(form) != "pack-quantized":
        kind = "F8_E4M3" if form.code == "fp8" else "I8"
        return Weight(entry, form, (Stored(entry.name, kind, entry.shape), scale))
    packed = Stored(f"{entry.name}_packed", "I32", (rows, inputs * form.bits // 32))
    return Weight(entry, form, (packed, scale, Stored(f"{entry.name}_shape", "I64", (2,))))


def planned(shape: ModelShape, formats: Formats, dtype: str, most: int = SHARD_BYTES) -> list[list[Weight]]:
    """The weights of each file, at most `most` bytes where a single weight is not larger."""
    of_leaf, files, size = dict(formats), list[list[Weight]](), 0
    for entry in table(shape):
        weight = stored(entry, of_leaf.get(leaf_of(entry)) if is_linear(entry) else None, dtype)
        if not files or size + weight.bytes > most:
            files.append([])
            size = 0
        files[-1].append(weight)
        size += weight.bytes
    return files


def quantization_config(formats: Formats) -> dict[str, Any]:
    """config.json's quantization_config for leaves that all have the same format."""
    (form,) = {form for _, form in formats}
    kind = "float" if form.code == "fp8" else "int"
    scheme = {
        "num_bits": form.bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": scheme,
        "input_activations": activations if form.activations == DYNAMIC or form.code == "fp8" else None,
        "output_activations": None,
    }
    left = [part for part in IGNORED if not any(path.startswith(PARTS[part]) for path, _ in formats)]
    return {
        "quant_method": "compressed-tensors",
        "format": layout(form),
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [IGNORED[part] for part in left],
        "kv_cache_scheme": None,
    }


def write_weights(
    folder: Path, files: list[list[Weight]], fill: Fill, fill_quantised: FillQuantised, progress: Any
) -> None:
    """Write the files, and the index where there are several. `progress` is called with the bytes of each weight."""
    index: dict[str, str] = {}
    for number, weights in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        index |= {tensor.name: name for weight in weights for tensor in weight.tensors}
        tensors = _created(folder / name, [tensor for weight in weights for tensor in weight.tensors])
        for weight in weights:
            _write(weight, tensors, fill, fill_quantised)
            progress(weight.bytes)
    if len(files) > 1:
        total = sum(weight.bytes for weights in files for weight in weights)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf8")


def _created(path: Path, wanted: list[Stored]) -> dict[str, Tensor]:
    """Create a safetensors file, and return its tensors, which are mapped from it: what is written there is stored."""
    # The widest first, so that each is aligned.
    ordered = sorted(wanted, key=lambda tensor: -WIDTHS[tensor.kind])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends, at = {}, 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": tensor.shape,
            "data_offsets": (at, end := at + tensor.bytes),
        }
        ends[tensor.name] = (at, at := end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # torch extends a shorter file by writing a zero to its first byte.
        file.truncate(first + at)
    whole = torch.from_file(str(path), shared=True, size=first + at, dtype=torch.uint8)[first:]
    return {
        tensor.name: whole[slice(*ends[tensor.name])].view(TORCH[tensor.kind]).view(tensor.shape) for tensor in ordered
    }


def _write(weight: Weight, tensors: dict[str, Tensor], fill: Fill, fill_quantised: FillQuantised) -> None:
    """Write one weight's tensors."""
    entry, form, region = weight.entry, weight.form, weight.entry.region(WHOLE)
    if form is None:
        fill(entry, tensors[entry.name], region)
        return
    scale = tensors[f"{entry.name}_scale"]
    parts = {"scale": torch.empty(scale.shape)}
    if layout(form) == "pack-quantized":
        packed = tensors[f"{entry.name}_packed"]
        # 32-bit words hold the first code in their lowest bits: on a little-endian machine, bytes in order.
        parts["weight"] = packed.view(torch.uint8 if form.bits == 4 else torch.int8)
        fill_quantised(entry, LeafRows(parts, form), region)
        if form.bits == 8:
            # Packed codes are code + 128.
            packed.view(torch.uint8).bitwise_xor_(0x80)
        tensors[f"{entry.name}_shape"].copy_(torch.tensor(entry.shape))
    else:
        parts["weight"] = tensors[entry.name]
        fill_quantised(entry, LeafRows(parts, form), region)
    # Exact: scales were rounded to this dtype before codes were chosen.
    scale.copy_(parts["scale"])
