"""Weights: one table that gives every tensor's name, place, shape, shard axis and random init, and what reads it.

A checkpoint is a Hugging Face folder: config.json and safetensors, in one file or in shards with an index, under the
names of either transformers generation. Files are memory-mapped and copied slice by slice into place, so that no
second copy of the weights ever exists.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mllama_graph.config import UserError
from mllama_graph.model.tree import Leaf, Node
from mllama_graph.shape import ModelShape, RopeShape, VisionShape, read_json, shape_of

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# New names (transformers >= 4.52) and the legacy ones, which released checkpoints carry and the table uses.
RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# Buffers that early conversions wrote out; they are computed from config.json.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

# Random values repeat with this prime period: fast to make, and no two rows of a matrix line up.
RANDOM_PERIOD = 4_194_301


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    name: legacy Hugging Face name. path: its Parameter in the weight tree; entries that share a path are stacked along
    axis 0 in table order. shape: whole shape. shard: the axis that tensor parallelism splits, or None.
    init: how random weights draw it.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    shard: int | None
    init: str


def table(shape: ModelShape) -> list[Entry]:
    """Every tensor of a model, in the order of the tree."""
    return [*_text_entries(shape), *_vision_entries(shape.vision),
            *_linear("multi_modal_projector", "projector", shape.text.width, shape.vision.out_width, None, bias=True)]


def _linear(name: str, path: str, out: int, into: int, shard: int | None, bias: bool = False) -> list[Entry]:
    entries = [Entry(f"{name}.weight", f"{path}.weight", (out, into), shard, "linear")]
    if bias:
        entries.append(Entry(f"{name}.bias", f"{path}.bias", (out,), 0 if shard == 0 else None, "bias"))
    return entries


def _norm(name: str, path: str, width: int) -> Entry:
    return Entry(f"{name}.weight", path, (width,), None, "norm")


def _layer_norm(name: str, path: str, width: int) -> list[Entry]:
    return [_norm(name, f"{path}.weight", width), Entry(f"{name}.bias", f"{path}.bias", (width,), None, "bias")]


def _text_entries(shape: ModelShape) -> Iterator[Entry]:
    text = shape.text
    q, kv, model = text.heads * text.head_width, text.kv_heads * text.head_width, "language_model.model"
    yield Entry(f"{model}.embed_tokens.weight", "text.embed", (shape.embeddings, text.width), None, "embed")
    for i in range(text.layers):
        name, path = f"{model}.layers.{i}", f"text.layers.{i}"
        yield _norm(f"{name}.input_layernorm", f"{path}.attention_norm", text.width)
        if i in text.cross_layers:
            attention = f"{name}.cross_attn"
            yield from _linear(f"{attention}.q_proj", f"{path}.q", q, text.width, 0)
            yield from _linear(f"{attention}.k_proj", f"{path}.kv", kv, text.width, 0)
            yield from _linear(f"{attention}.v_proj", f"{path}.kv", kv, text.width, 0)
            yield _norm(f"{attention}.q_norm", f"{path}.q_norm", text.head_width)
            yield _norm(f"{attention}.k_norm", f"{path}.k_norm", text.head_width)
            yield Entry(f"{name}.cross_attn_attn_gate", f"{path}.attention_gate", (1,), None, "gate")
            yield Entry(f"{name}.cross_attn_mlp_gate", f"{path}.mlp_gate", (1,), None, "gate")
        else:
            attention = f"{name}.self_attn"
            yield from _linear(f"{attention}.q_proj", f"{path}.qkv", q, text.width, 0)
            yield from _linear(f"{attention}.k_proj", f"{path}.qkv", kv, text.width, 0)
            yield from _linear(f"{attention}.v_proj", f"{path}.qkv", kv, text.width, 0)
        yield from _linear(f"{attention}.o_proj", f"{path}.o", text.width, q, 1)
        yield _norm(f"{name}.post_attention_layernorm", f"{path}.mlp_norm", text.width)
        yield from _linear(f"{name}.mlp.gate_proj", f"{path}.gate_up", text.mlp, text.width, 0)
        yield from _linear(f"{name}.mlp.up_proj", f"{path}.gate_up", text.mlp, text.width, 0)
        yield from _linear(f"{name}.mlp.down_proj", f"{path}.down", text.width, text.mlp, 1)
    yield _norm(f"{model}.norm", "text.norm", text.width)
    yield from _linear("language_model.lm_head", "text.head", text.vocab, text.width, None)


def _vision_entries(vision: VisionShape) -> Iterator[Entry]:
    E, ratios, tiles = vision.width, len(vision.aspect_ratios) + 1, vision.max_tiles
    model = "vision_model"
    yield Entry(f"{model}.patch_embedding.weight", "vision.patch", (E, vision.channels, vision.patch, vision.patch),
                None, "linear")
    yield Entry(f"{model}.class_embedding", "vision.class_token", (E,), None, "position")
    position = f"{model}.gated_positional_embedding"
    yield Entry(f"{position}.gate", "vision.position_gate", (1,), None, "gate")
    yield Entry(f"{position}.embedding", "vision.position", (vision.tokens, E), None, "position")
    yield Entry(f"{position}.tile_embedding.weight", "vision.tile_position", (ratios, tiles * vision.tokens * E), None,
                "position")
    for side in ("pre_tile", "post_tile"):
        embedding = f"{model}.{side}_positional_embedding"
        yield Entry(f"{embedding}.gate", f"vision.{side}_gate", (1,), None, "gate")
        yield Entry(f"{embedding}.embedding.weight", f"vision.{side}", (ratios, tiles * E), None, "position")
    yield from _layer_norm(f"{model}.layernorm_pre", "vision.norm_before", E)
    yield from _layer_norm(f"{model}.layernorm_post", "vision.norm_after", E)
    for stack, layers, path in (("transformer", vision.layers, "local_layers"),
                                ("global_transformer", vision.global_layers, "global_layers")):
        for i in range(layers):
            yield from _vision_block(f"{model}.{stack}.layers.{i}", f"vision.{path}.{i}", vision)


def _vision_block(name: str, path: str, vision: VisionShape) -> Iterator[Entry]:
    E = vision.width
    yield from _layer_norm(f"{name}.input_layernorm", f"{path}.attention_norm", E)
    for part in "qkv":
        yield from _linear(f"{name}.self_attn.{part}_proj", f"{path}.qkv", E, E, 0)
    yield from _linear(f"{name}.self_attn.o_proj", f"{path}.o", E, E, 1)
    yield from _layer_norm(f"{name}.post_attention_layernorm", f"{path}.mlp_norm", E)
    yield from _linear(f"{name}.mlp.fc1", f"{path}.fc1", vision.mlp, E, 0, bias=True)
    yield from _linear(f"{name}.mlp.fc2", f"{path}.fc2", E, vision.mlp, 1)
    yield Entry(f"{name}.mlp.fc2.bias", f"{path}.fc2_bias", (E,), None, "bias")
    if "global" in name:
        yield Entry(f"{name}.gate_attn", f"{path}.attention_gate", (1,), None, "gate")
        yield Entry(f"{name}.gate_ffn", f"{path}.mlp_gate", (1,), None, "gate")


class Checkpoint:
    """A checkpoint folder: its shape, and its tensors by legacy name.

    Raises UserError for a folder that is no mllama checkpoint, naming the file or tensor at fault.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"weights={folder} is not a folder. Give a Hugging Face checkpoint folder, or "
                            "weights=random to run on random weights.")
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

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the language model's weights are stored in."""
        name = next(iter(self.files))
        kind = self.slice(name).get_dtype()
        if kind not in STORED:
            raise UserError(f"{name} is stored as {kind}; supported are {', '.join(STORED)}.")
        return STORED[kind]

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


# Fills one entry's part of a Parameter: (entry, destination of the rank's shape).
Fill = Callable[[Entry, Tensor], None]


def build(shape: ModelShape, pixels: Pixels, dtype: torch.dtype, device: torch.device, fill: Fill,
          progress: Callable[[int], None]) -> Node:
    """The weight tree: Parameters at the table's paths, each filled by `fill`; `progress` gets the bytes done."""
    root = Node()
    groups: dict[str, list[Entry]] = {}
    for entry in table(shape):
        groups.setdefault(entry.path, []).append(entry)
    for path, entries in groups.items():
        rows = sum(entry.shape[0] for entry in entries)
        whole = torch.empty((rows, *entries[0].shape[1:]), dtype=dtype, device=device)
        for entry, part in zip(entries, whole.split([entry.shape[0] for entry in entries]), strict=True):
            fill(entry, part)
        _place(root, path, nn.Parameter(whole, requires_grad=False))
        progress(whole.numel() * whole.element_size())
    for layer in root.vision.local_layers:
        layer.register_parameter("attention_gate", None)
        layer.register_parameter("mlp_gate", None)
    root.text.register_buffer("inv_freq", inverse_frequencies(shape.text.rope, shape.text.head_width).to(device))
    for name in ("scale", "mean", "std"):
        value = torch.tensor(getattr(pixels, name), device=device)
        root.vision.register_buffer(f"pixel_{name}", value if name == "scale" else value[:, None, None])
    return root


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
    """Copies a tensor from the memory-mapped files, converted on the way."""

    def fill(entry: Entry, part: Tensor) -> None:
        part.copy_(checkpoint.slice(entry.name)[...].view(part.shape))

    return fill


def random_fill(seed: int, part_dtype: torch.dtype) -> Fill:
    """Random weights that leave nothing out: gates open, norms uneven, biases and positions not zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(RANDOM_PERIOD, generator=generator).to(part_dtype)
    scale = {"norm": 0.1, "bias": 0.1, "gate": 0.3, "position": 0.3, "embed": 1.0}
    shift = {"norm": 1.0, "gate": 0.8}
    start = 0

    def fill(entry: Entry, part: Tensor) -> None:
        nonlocal start
        flat, done = part.view(-1), 0
        while done < flat.numel():
            count = min(flat.numel() - done, RANDOM_PERIOD - start)
            flat[done:done + count] = noise[start:start + count].to(flat.device)
            done, start = done + count, (start + count) % RANDOM_PERIOD
        std = scale.get(entry.init, (math.prod(entry.shape[1:])) ** -0.5 if entry.init == "linear" else None)
        part.mul_(std).add_(shift.get(entry.init, 0.0))

    return fill
