"""The checkpoint table: every tensor's name, path, shape, shard axis and random init. Integers and strings only.

Sharding follows Megatron-LM: the first linear layer of a block is split by outputs (axis 0), the second by inputs
(axis 1), so that an attention or MLP block ends with one all-reduce. Embedding and head are split by vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mllama_graph.model.shape import ModelShape, VisionShape


@dataclass(frozen=True)
class Shard:
    """One rank's part of every sharded axis: one of `world` equal parts, the last of which may be padded."""

    rank: int = 0
    world: int = 1

    def size(self, whole: int) -> int:
        """Length of a rank's part of an axis of length `whole`, padding included."""
        return -(-whole // self.world)

    def bounds(self, whole: int) -> tuple[int, int]:
        """The part without padding, as [start, stop) of the whole axis."""
        size = self.size(whole)
        return min(self.rank * size, whole), min((self.rank + 1) * size, whole)


WHOLE = Shard()


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    name: legacy Hugging Face name. path: its Parameter in the weight tree; entries with the same path are stacked along
    axis 0 in table order. shape: shape of the whole tensor. shard: the axis that tensor parallelism splits, or None.
    init: kind of random initialisation.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    shard: int | None
    init: str

    def local(self, shard: Shard) -> tuple[int, ...]:
        """Shape of a rank's part, padding included."""
        return tuple(shard.size(n) if axis == self.shard else n for axis, n in enumerate(self.shape))

    def region(self, shard: Shard) -> tuple[slice, ...]:
        """The part of the whole tensor that a rank holds, without padding."""
        return tuple(
            slice(*shard.bounds(n)) if axis == self.shard else slice(0, n) for axis, n in enumerate(self.shape)
        )


def table(shape: ModelShape) -> list[Entry]:
    """Every tensor of a model, in the order of the tree."""
    projector = "multi_modal_projector", "projector", shape.text.width, shape.vision.out_width
    seeing = [*_vision_entries(shape.vision), *_linear(*projector, None, bias=True)] if shape.sees else []
    return [*_text_entries(shape), *seeing]


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
    yield Entry(f"{model}.embed_tokens.weight", "text.embed.weight", (shape.embeddings, text.width), 0, "embed")
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
    yield from _linear("language_model.lm_head", "text.head", text.vocab, text.width, 0)


def _vision_entries(vision: VisionShape) -> Iterator[Entry]:
    E, ratios, tiles = vision.width, len(vision.aspect_ratios) + 1, vision.max_tiles
    model = "vision_model"
    yield Entry(
        f"{model}.patch_embedding.weight",
        "vision.patch",
        (E, vision.channels, vision.patch, vision.patch),
        None,
        "linear",
    )
    yield Entry(f"{model}.class_embedding", "vision.class_token", (E,), None, "position")
    position = f"{model}.gated_positional_embedding"
    yield Entry(f"{position}.gate", "vision.position_gate", (1,), None, "gate")
    yield Entry(f"{position}.embedding", "vision.position", (vision.tokens, E), None, "position")
    yield Entry(
        f"{position}.tile_embedding.weight",
        "vision.tile_position",
        (ratios, tiles * vision.tokens * E),
        None,
        "position",
    )
    for side in ("pre_tile", "post_tile"):
        embedding = f"{model}.{side}_positional_embedding"
        yield Entry(f"{embedding}.gate", f"vision.{side}_gate", (1,), None, "gate")
        yield Entry(f"{embedding}.embedding.weight", f"vision.{side}", (ratios, tiles * E), None, "position")
    yield from _layer_norm(f"{model}.layernorm_pre", "vision.norm_before", E)
    yield from _layer_norm(f"{model}.layernorm_post", "vision.norm_after", E)
    for stack, layers, path in (
        ("transformer", vision.layers, "local_layers"),
        ("global_transformer", vision.global_layers, "global_layers"),
    ):
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


def elements(shape: ModelShape, shard: Shard = WHOLE) -> int:
    """Number of parameters that a rank holds, padding included."""
    return sum(prod(entry.local(shard)) for entry in table(shape))


# Parts of the model that every rank holds whole, by `Entry.init`. They are small, or read once per image.
REPLICATED = {
    "norm": "norms",
    "bias": "biases",
    "gate": "gates",
    "position": "vision positions",
    "linear": "vision patches",
}


def replicated(shape: ModelShape) -> dict[str, int]:
    """Number of parameters that every rank holds whole, by part of the model."""
    parts: dict[str, int] = {}
    for entry in table(shape):
        if entry.shard is None:
            part = "projector" if entry.path.startswith("projector") else REPLICATED[entry.init]
            parts[part] = parts.get(part, 0) + prod(entry.shape)
    return parts
