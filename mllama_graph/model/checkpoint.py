"""Weights: what fills the tree that table.py describes, a rank's slices of it at a time.

A checkpoint is a Hugging Face folder: config.json and safetensors, in one file or in shards with an index, under the
names of either transformers generation. Files are memory-mapped and copied block by block into place, so that no
second copy of the weights ever exists and a rank reads what it holds and nothing else.
"""

import ctypes
import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mllama_graph.core.config import Run, UserError
from mllama_graph.model.tree import Leaf, Node
from mllama_graph.plan.resolve import MADE_UP, STORED, checkpoint_folder, shape_of_run, weights_of
from mllama_graph.model.shape import ModelShape, RopeShape, read_json, shape_of
from mllama_graph.model.table import WHOLE, Entry, Shard, table

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# New names (transformers >= 4.52) and the legacy ones, which released checkpoints carry and the table uses.
RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# Buffers that early conversions wrote out; they are computed from config.json.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

HUGE_PAGE = 1 << 21
# Random values repeat with this prime period: fast to make, and no two rows of a matrix line up.
RANDOM_PERIOD = 4_194_301
# Bytes of a file that are mapped into memory at once, about: what a load takes beside the weights themselves.
BLOCK_BYTES = 64 << 20


class Checkpoint:
    """A checkpoint folder: its shape, and its tensors by legacy name.

    Raises UserError for a folder that is no mllama checkpoint, naming the file or tensor at fault.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shape = shape_of(read_json(folder / "config.json"))

    @cached_property
    def files(self) -> dict[str, tuple[str, Path]]:
        """Legacy tensor name -> (name in the file, file)."""
        index = read_json(self.folder / "model.safetensors.index.json", needed=False)
        if index is not None:
            if not isinstance(index.get("weight_map"), dict):
                raise UserError(f"{self.folder / 'model.safetensors.index.json'} has no weight_map object.")
            paths = sorted({self.folder / file for file in index["weight_map"].values()})
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{self.folder} holds no .safetensors file. Convert the checkpoint to safetensors.")
        found: dict[str, tuple[str, Path]] = {}
        for path in paths:
            for name in self._open(path).keys():
                legacy = _legacy(name)
                if legacy in found:
                    raise UserError(f"{name} is in {found[legacy][1].name} and again in {path.name}.")
                if not legacy.endswith(IGNORED_SUFFIX):
                    found[legacy] = (name, path)
        return found

    def _open(self, path: Path):
        if path not in self.__dict__.setdefault("_opened", {}):
            if not path.is_file():
                raise UserError(f"{path} is named in the index but missing.")
            try:
                self._opened[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} can't be read as safetensors: {error}.") from error
        return self._opened[path]

    def slice(self, name: str):
        """The lazily read tensor of a legacy name."""
        stored, path = self.files[name]
        return self._open(path).get_slice(stored)

    def read(self, entry: Entry, part: Tensor, region: tuple[slice, ...]) -> None:
        """Copy a region of a tensor into `part`. The file is mapped anew for each block: what was read is let go."""
        stored, path = self.files[entry.name]
        rows = range(region[0].start, region[0].stop, count := _rows(part))
        for first, block in zip(rows, part.split(count)):
            with safe_open(path, framework="pt") as file:
                lazy = file.get_slice(stored)
                if tuple(lazy.get_shape()) == entry.shape:
                    block.copy_(lazy[slice(first, first + len(block)), *region[1:]])
                else:
                    # The same elements under another shape: only of tensors that are never split.
                    block.copy_(lazy[...].view(entry.shape)[first:first + len(block)])

    @cached_property
    def stored(self) -> str:
        """What the language model's weights are stored in: fp32, fp16 or bf16."""
        name = next(iter(self.files))
        kind = self.slice(name).get_dtype()
        if kind not in STORED:
            raise UserError(f"{name} is stored as {kind}; supported are {', '.join(STORED)}.")
        return STORED[kind]

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch's."""
        return DTYPES[self.stored]

    def verify(self) -> None:
        """Every tensor of the table is there with its shape, and nothing else.

        Raises UserError naming the tensors at fault.
        """
        expected = {entry.name: entry for entry in table(self.shape)}
        missing = [name for name in expected if name not in self.files]
        extra = [name for name in self.files if name not in expected]
        shapes = [(name, tuple(self.slice(name).get_shape())) for name in expected if name in self.files]
        wrong = [f"{name} is {list(found)}, expected {list(expected[name].shape)}" for name, found in shapes
                 if math.prod(found) != math.prod(expected[name].shape) or (
                     found != expected[name].shape and len(found) == len(expected[name].shape))]
        for fault, names in (("missing", missing), ("unexpected", extra), ("of the wrong shape", wrong)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise UserError(f"{self.folder}: {len(names)} tensors {fault}: {'; '.join(names[:5])}{more}.")


def _legacy(name: str) -> str:
    for new, legacy in RENAMES:
        if name.startswith(new):
            return legacy + name[len(new):]
    return name


def model_of(run: Run) -> tuple[ModelShape, Optional[Checkpoint]]:
    """The model's shape, and its checkpoint unless the weights are random.

    Raises UserError where weights= and model= don't fit each other.
    """
    shape, weights = shape_of_run(run), weights_of(run)
    return shape, None if weights in MADE_UP else Checkpoint(checkpoint_folder(weights))


def inverse_frequencies(rope: RopeShape, head_width: int) -> Tensor:
    """Rotation speed of each pair of a head's dimensions, fp32, (H / 2,).

    Source: the Llama 3.1 scaling of long wavelengths (transformers modeling_rope_utils, `llama3`).
    """
    frequency = 1.0 / rope.theta ** (torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width)
    if rope.type == "default":
        return frequency
    if rope.type == "linear":
        return frequency / rope.factor
    wavelength = 2 * math.pi / frequency
    turns = rope.original_positions / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth.clamp(0, 1)) * frequency / rope.factor + smooth.clamp(0, 1) * frequency
    long, short = turns < rope.low_freq_factor, turns > rope.high_freq_factor
    return torch.where(long, frequency / rope.factor, torch.where(short, frequency, blended))


@dataclass(frozen=True)
class Pixels:
    """How uint8 pixels become the model's: (x * scale - mean) / std a channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Fills one entry's part of a Parameter: (entry, destination, the region of the whole tensor that it takes).
Fill = Callable[[Entry, Tensor, tuple[slice, ...]], None]


def build(shape: ModelShape, pixels: Pixels, dtype: torch.dtype, device: torch.device, fill: Fill,
          progress: Callable[[int], None], shard: Shard = WHOLE) -> Node:
    """A rank's weight tree: Parameters at the table's paths, each filled by `fill`, padding by zeros.

    `progress` gets the bytes done since its last call.
    """
    root = Node()
    # An NPU gets whole tensors: its values are made on the host, which needs none of its kernels.
    made_on = torch.device("cpu") if device.type == "npu" else device
    groups: dict[str, list[Entry]] = {}
    for entry in table(shape):
        groups.setdefault(entry.path, []).append(entry)
    for path, entries in groups.items():
        parts = [entry.local(shard) for entry in entries]
        whole = allocate((sum(part[0] for part in parts), *parts[0][1:]), dtype, made_on)
        for entry, part in zip(entries, whole.split([part[0] for part in parts]), strict=True):
            _fill_padded(entry, part, entry.region(shard), fill)
        _place(root, path, nn.Parameter(whole.to(device), requires_grad=False))
        progress(whole.numel() * whole.element_size())
    for layer in root.vision.local_layers:
        layer.register_parameter("attention_gate", None)
        layer.register_parameter("mlp_gate", None)
    root.text.register_buffer("inv_freq", inverse_frequencies(shape.text.rope, shape.text.head_width).to(device))
    # A buffer and no number in the graph, so that ranks share their graphs.
    first = torch.tensor(shard.bounds(shape.embeddings)[0], dtype=torch.int32).to(device)
    root.text.embed.register_buffer("first", first)
    for name in ("scale", "mean", "std"):
        value = torch.tensor(getattr(pixels, name)).to(device)
        root.vision.register_buffer(f"pixel_{name}", value if name == "scale" else value[:, None, None])
    return root


def allocate(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what steps read from begin to end; on a host in huge pages where the system grants them: reads are 3 to 5 %
    faster than from pages of 4 KiB."""
    whole = torch.empty(size, dtype=dtype, device=device)
    # A traced one has no memory.
    if device.type == "cpu" and type(whole) is Tensor and hasattr(mmap, "MADV_HUGEPAGE"):
        # The pages that lie wholly in it. What the system refuses costs nothing.
        start = -(-whole.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = whole.data_ptr() + whole.numel() * whole.element_size() - start
        if length >= HUGE_PAGE:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return whole


def _fill_padded(entry: Entry, part: Tensor, region: tuple[slice, ...], fill: Fill) -> None:
    """Fill what the region covers, zero the rest."""
    for axis, taken in enumerate(region):
        size = taken.stop - taken.start
        part.narrow(axis, size, part.shape[axis] - size).zero_()
        part = part.narrow(axis, 0, size)
    if part.numel():
        fill(entry, part, region)


def _place(root: Node, path: str, parameter: nn.Parameter) -> None:
    """Set a Parameter at a dotted path, making the branches on the way; numbers index layer lists."""
    *branches, leaf = path.split(".")
    node: nn.Module = root
    for branch, following in zip(branches, [*branches[1:], leaf]):
        if branch.isdigit():
            if int(branch) == len(node):
                node.append(Node())
            node = node[int(branch)]
            continue
        if branch not in node._modules:
            kind = nn.ModuleList if following.isdigit() else Node
            node.add_module(branch, Leaf() if following == leaf == "weight" else kind())
        node = node._modules[branch]
    node.register_parameter(leaf, parameter)


def from_checkpoint(checkpoint: Checkpoint) -> Fill:
    """Copies a region of a tensor from the memory-mapped files, converted on the way."""
    return lambda entry, part, region: checkpoint.read(entry, part, region)


def random_fill(shape: ModelShape, seed: int, dtype: torch.dtype) -> Fill:
    """Random weights that leave nothing out: gates open, norms uneven, biases and positions not zero.

    Every element's value is its place in the whole model's, so that ranks hold parts of the same model.
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
        for block, begins in zip(part.split(_rows(part)), at.split(_rows(part))):
            block.copy_(noise.unfold(0, width, 1)[begins].view(block.shape))
        std = scale.get(entry.init, row ** -0.5 if entry.init == "linear" else None)
        part.mul_(std).add_(shift.get(entry.init, 0.0))

    return fill


def write_random(shape: ModelShape, config: dict[str, Any], seed: int, dtype: torch.dtype, folder: Path) -> None:
    """The checkpoint that weights=random stands for, as a Hugging Face folder; `config` is its config.json."""
    fill, tensors = random_fill(shape, seed, dtype), {}
    for entry in table(shape):
        tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
        fill(entry, tensors[entry.name], entry.region(WHOLE))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # What transformers would else take from the released models.
    text = {"pad_token_id": 0} | config["text_config"]
    vision = {"vision_output_dim": shape.vision.out_width} | config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text, "vision_config": vision}))


def _rows(part: Tensor) -> int:
    """Rows of a tensor that make a block."""
    return max(1, BLOCK_BYTES // (math.prod(part.shape[1:]) * part.element_size()))
