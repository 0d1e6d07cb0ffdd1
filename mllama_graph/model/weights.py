"""Sources of weights: a checkpoint's memory-mapped files, or random values.

Files are copied block by block into the Parameters, so that no second copy of the weights exists and a rank reads only
its own part.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mllama_graph.model.codes import Codes, pack, quantise
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.formats import Format
from mllama_graph.model.layout import LeafRows
from mllama_graph.model.merge import merged
from mllama_graph.model.meta_files import MetaFiles
from mllama_graph.model.meta_weights import reader
from mllama_graph.model.published_codes import PublishedWeight
from mllama_graph.model.reading import Region, block_rows, read_safetensors
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import WHOLE, Entry, table
from mllama_graph.model.tree import Fill, FillQuantised, Mapped, nothing_mapped

# Random values repeat with this prime period: fast to generate, and no two rows of a matrix are aligned.
RANDOM_PERIOD = 4_194_301
# Elements that are quantised at once: the fp32 values and what is computed from them stay in a few hundred MB.
QUANTISED_BLOCK = 1 << 22


def from_checkpoint(files: CheckpointFiles) -> Fill:
    """A Fill that copies regions of a checkpoint's tensors, converted to the destination's dtype.

    The checkpoint's adapters are merged into them.
    """
    read = reader(files) if isinstance(files, MetaFiles) else _reader(files)

    def fill(entry: Entry, part: Tensor, region: Region) -> None:
        starts = range(region[0].start, region[0].stop, count := block_rows(part))
        for first, block in zip(starts, part.split(count)):
            block.copy_(read(entry, (slice(first, first + len(block)), *region[1:])))

    return merged(fill, files.adapters)


def _reader(files: CheckpointFiles) -> Callable[[Entry, Region], Tensor]:
    """Reads a region of an entry from safetensors."""

    def read(entry: Entry, region: Region) -> Tensor:
        if quantised := files.published.stored.get(entry.name):
            return PublishedWeight(files, quantised, entry).values(region)
        stored, path = files.tensors[entry.name]
        if files.is_mlx_patch(entry.name):
            return read_safetensors(path, stored).permute(0, 3, 1, 2)[region]
        if len(files.stored_shape(entry.name)) == len(entry.shape):
            return read_safetensors(path, stored, region)
        # As many elements in a different number of axes: only tensors that are never split.
        return read_safetensors(path, stored).view(entry.shape)[region]

    return read


def mapped(files: CheckpointFiles) -> Mapped:
    """The Mapped of a checkpoint's tensors that are stored as they are needed: neither quantised nor changed."""
    if isinstance(files, MetaFiles):
        return nothing_mapped
    changed = {name for adapter in files.adapters for name in adapter.changes} | set(files.published.stored)

    def view(entry: Entry, region: Region) -> Tensor | None:
        if entry.name in changed or len(files.stored_shape(entry.name)) != len(entry.shape):
            return None
        stored, path = files.tensors[entry.name]
        return read_safetensors(path, stored, region)

    return view


def quantising(
    fill: Fill, rounded: Callable[[Tensor, Format], Codes] = quantise, mapped: Mapped = nothing_mapped
) -> FillQuantised:
    """A FillQuantised that quantises what `fill` gives, a block of rows at a time. Scales are those of whole rows.

    rounded: `quantise`, or a faster function with the same result, for leaves without a layout. mapped: regions that a
    layout reads from the file, without `fill`.
    """

    def fill_quantised(entry: Entry, held: LeafRows, region: Region) -> None:
        rows, inputs = region[0], entry.shape[1]
        count = QUANTISED_BLOCK // inputs + 1
        for first in range(rows.start, rows.stop, count):
            whole = (slice(first, min(first + count, rows.stop)), slice(0, inputs))
            part = mapped(entry, whole) if held.layout else None
            if part is None:
                part = torch.empty((whole[0].stop - first, inputs))
                fill(entry, part, whole)
            if held.layout:
                held.layout.rounded(held.parts, held.form, held.at + first - rows.start, part, region[1])
            else:
                write_codes(held.after(first - rows.start), rounded(part, held.form), region[1])

    return fill_quantised


def published(files: CheckpointFiles) -> FillQuantised:
    """A FillQuantised that takes a quantised checkpoint's codes as they are, a block of rows at a time."""

    def fill_quantised(entry: Entry, held: LeafRows, region: Region) -> None:
        PublishedWeight(files, files.published.stored[entry.name], entry).write(held, *region)

    return fill_quantised


def write_codes(held: LeafRows, found: Codes, columns: slice) -> None:
    """Write codes of whole rows to a leaf, taking only some of their columns."""
    inputs, form = found.codes.shape[1], held.form
    groups = slice(*(end * form.groups(inputs) // inputs for end in (columns.start, columns.stop)))
    given = {name: value for name in held.parts if (value := getattr(found, name, None)) is not None}
    for name in ("scale", "shift"):
        if name in given and form.group:
            given[name] = given[name][:, groups]
    for name, value in (given | {"weight": pack(found.codes[:, columns], form)}).items():
        held.write(name, value)


def random_fill(shape: ModelShape, seed: int, dtype: torch.dtype) -> Fill:
    """A Fill of random weights with open gates, uneven norms, and nonzero biases and positions.

    An element's value depends on its position in the whole model, so that all ranks hold parts of the same model.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = table(shape)
    longest = max(math.prod(entry.shape[1:]) for entry in entries)
    noise = torch.randn(RANDOM_PERIOD, generator=generator).to(dtype)
    noise = noise.repeat(2 + longest // RANDOM_PERIOD)
    starts, start = {}, 0
    for entry in entries:
        starts[entry.name] = start
        start = (start + math.prod(entry.shape)) % RANDOM_PERIOD
    scale = {"norm": 0.1, "bias": 0.1, "gate": 0.3, "position": 0.3, "embed": 1.0}
    shift = {"norm": 1.0, "gate": 0.8}

    def fill(entry: Entry, part: Tensor, region: tuple[slice, ...]) -> None:
        row = math.prod(entry.shape[1:])
        width = math.prod(part.shape[1:])
        first = region[1].start * (row // entry.shape[1]) if len(region) > 1 else 0
        at = (starts[entry.name] + torch.arange(region[0].start, region[0].stop) * row + first) % RANDOM_PERIOD
        for block, begins in zip(part.split(block_rows(part)), at.split(block_rows(part))):
            block.copy_(noise.unfold(0, width, 1)[begins].view(block.shape))
        std = scale[entry.init] if entry.init in scale else row**-0.5
        part.mul_(std).add_(shift.get(entry.init, 0.0))

    return fill


def write_random(shape: ModelShape, config: dict[str, Any], seed: int, dtype: torch.dtype, folder: Path) -> None:
    """Write the checkpoint that weights=random stands for, as a Hugging Face folder with `config` as config.json."""
    fill, tensors = random_fill(shape, seed, dtype), {}
    for entry in table(shape):
        tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
        fill(entry, tensors[entry.name], entry.region(WHOLE))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(whole_config(shape, config)))


def whole_config(shape: ModelShape, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the keys for which transformers would otherwise assume the released models' values."""
    text = {"pad_token_id": 0} | config["text_config"]
    vision = {"vision_output_dim": shape.vision.out_width} | config["vision_config"]
    return config | {"text_config": text, "vision_config": vision}
