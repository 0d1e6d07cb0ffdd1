"""The sizes of an mllama model, read from a checkpoint's config.json. Integers and floats only."""

import json
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError

# Rows of a tile in the vision tower are padded to a multiple of this.
ROW_MULTIPLE = 8
# The other RoPE types need frequency tables; no released mllama model uses them.
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeShape:
    """Rotary position embedding: base and frequency scaling."""

    theta: float = 500000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class TextShape:
    """The language model. `cross_layers` are the layers that attend to images instead of text."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    cross_layers: tuple[int, ...]
    eps: float
    positions: int
    rope: RopeShape

    @property
    def self_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.layers) if i not in self.cross_layers)


@dataclass(frozen=True)
class VisionShape:
    """The vision tower. `features`: local layers whose inputs are joined to the output. `tile`: side in pixels."""

    width: int
    heads: int
    layers: int
    global_layers: int
    mlp: int
    patch: int
    tile: int
    max_tiles: int
    channels: int
    features: tuple[int, ...]
    aspect_ratios: tuple[tuple[int, int], ...]
    eps: float

    @property
    def tokens(self) -> int:
        """Tokens per tile: its patches and the class token."""
        return (self.tile // self.patch) ** 2 + 1

    @property
    def out_width(self) -> int:
        return self.width * (1 + len(self.features))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine the shapes of its graphs."""

    text: TextShape
    vision: VisionShape
    image_token: int

    @property
    def embeddings(self) -> int:
        """Rows of the embedding: the vocabulary and 8 more, of which the first is `<|image|>`."""
        return self.text.vocab + 8

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.text.heads // self.text.kv_heads

    def check_ranks(self, tp: int) -> None:
        """Raises UserError if `tp` does not divide the number of heads of every kind."""
        heads = {"query": self.text.heads, "key-value": self.text.kv_heads, "vision": self.vision.heads}
        if any(count % tp for count in heads.values()):
            common = gcd(*heads.values())
            choices = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise UserError(
                f"tp={tp} does not divide the model's heads ({', '.join(f'{n} {k}' for k, n in heads.items())}). "
                f"tp can be {', '.join(choices)}."
            )


def _rope(text: dict[str, Any]) -> RopeShape:
    """Read `rope_parameters` (new), or `rope_theta` and `rope_scaling` (legacy)."""
    given = dict(text.get("rope_scaling") or {}) | dict(text.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"rope type {kind!r} in config.json is not supported. Supported: {', '.join(ROPE_TYPES)}.")
    defaults = RopeShape()
    return RopeShape(
        theta=float(given.get("rope_theta", text.get("rope_theta", defaults.theta))),
        type=kind,
        factor=float(given.get("factor", 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", defaults.low_freq_factor)),
        high_freq_factor=float(given.get("high_freq_factor", defaults.high_freq_factor)),
        original_positions=int(given.get("original_max_position_embeddings", defaults.original_positions)),
    )


def _square(value: Any, name: str) -> int:
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"{name}={list(value)} in config.json is not square; mllama tiles are square.")
        value = value[0]
    return int(value)


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The ModelShape of a config.json.

    Defaults are those of the released 11B model, as in transformers' MllamaConfig. Raises UserError for another model
    type or a shape that mllama can't have.
    """
    if config.get("model_type") != "mllama":
        raise UserError(f"config.json has model_type={config.get('model_type')!r}; only 'mllama' is supported.")
    try:
        return _shape_of(config)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, KeyError) as error:
        raise UserError(f"config.json does not describe a model: {error}.") from error


def _shape_of(config: dict[str, Any]) -> ModelShape:
    text, vision = dict(config.get("text_config") or {}), dict(config.get("vision_config") or {})
    for part, name, expected in ((text, "hidden_act", "silu"), (vision, "hidden_act", "gelu")):
        if part.get(name, expected) != expected:
            raise UserError(f"{name}={part[name]!r} in config.json is not supported; mllama uses {expected!r}.")
    width, heads = int(text.get("hidden_size", 4096)), int(text.get("num_attention_heads", 32))
    layers = int(text.get("num_hidden_layers", 40))
    cross = text.get("cross_attention_layers")
    cross = (3, 8, 13, 18, 23, 28, 33, 38) if cross is None else tuple(sorted(int(i) for i in cross))
    head_width = int(text.get("head_dim") or width // heads)
    shape = ModelShape(
        text=TextShape(
            vocab=int(text.get("vocab_size", 128256)),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads", 8)),
            head_width=head_width,
            mlp=int(text.get("intermediate_size", 14336)),
            cross_layers=cross,
            eps=float(text.get("rms_norm_eps", 1e-5)),
            positions=int(text.get("max_position_embeddings", 131072)),
            rope=_rope(text),
        ),
        vision=_vision(vision),
        image_token=int(config.get("image_token_index", config.get("image_token_id", 128256))),
    )
    _check_shape(shape)
    return shape


def _vision(vision: dict[str, Any]) -> VisionShape:
    max_tiles = int(vision.get("max_num_tiles", 4))
    ratios = vision.get("supported_aspect_ratios") or supported_aspect_ratios(max_tiles)
    features = vision.get("intermediate_layers_indices")
    return VisionShape(
        width=int(vision.get("hidden_size", 1280)),
        heads=int(vision.get("attention_heads", vision.get("num_attention_heads", 16))),
        layers=int(vision.get("num_hidden_layers", 32)),
        global_layers=int(vision.get("num_global_layers", 8)),
        mlp=int(vision.get("intermediate_size", 5120)),
        patch=_square(vision.get("patch_size", 14), "patch_size"),
        tile=_square(vision.get("image_size", 448), "image_size"),
        max_tiles=max_tiles,
        channels=int(vision.get("num_channels", 3)),
        features=tuple(int(i) for i in ([3, 7, 15, 23, 30] if features is None else features)),
        aspect_ratios=tuple((int(h), int(w)) for h, w in ratios),
        eps=float(vision.get("norm_eps", 1e-5)),
    )


def supported_aspect_ratios(max_tiles: int) -> list[tuple[int, int]]:
    """All (height, width) of at most `max_tiles` tiles, in the order of the aspect-ratio ids (1-based)."""
    sides = range(1, max_tiles + 1)
    return [(h, w) for h in sides for w in sides if h * w <= max_tiles]


def _check_shape(shape: ModelShape) -> None:
    text, vision = shape.text, shape.vision
    for name, value in (asdict(text) | asdict(vision)).items():
        if isinstance(value, int) and value < (0 if name == "global_layers" else 1):
            raise UserError(f"{name} is {value} in config.json; it must be at least 1.")
    if text.heads % text.kv_heads:
        raise UserError(f"{text.kv_heads} kv heads do not divide {text.heads} query heads (config.json).")
    if text.head_width % 2:
        raise UserError(f"head_dim {text.head_width} is odd; rotary embedding needs an even one (config.json).")
    if any(not 0 <= i < text.layers for i in text.cross_layers):
        raise UserError(f"cross_attention_layers {list(text.cross_layers)} go beyond the {text.layers} layers.")
    if any(not 0 <= i < vision.layers for i in vision.features):
        raise UserError(f"intermediate_layers_indices {list(vision.features)} go beyond the {vision.layers} layers.")
    if vision.width % vision.heads or vision.tile % vision.patch:
        raise UserError(
            f"vision width {vision.width} / heads {vision.heads} and tile {vision.tile} / patch {vision.patch} "
            "must be whole numbers (config.json)."
        )


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no such file. Raises UserError as `read_json` does."""
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming the file if it is missing or holds no JSON object."""
    if not path.is_file():
        raise UserError(f"{path} is missing. weights= needs a Hugging Face checkpoint folder.")
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


def differences(expected: ModelShape, found: ModelShape) -> list[str]:
    """Fields in which two shapes differ, one line each."""

    def walk(a: dict, b: dict, path: str) -> list[str]:
        lines = []
        for key in a:
            if isinstance(a[key], dict):
                lines += walk(a[key], b[key], f"{path}{key}.")
            elif a[key] != b[key]:
                lines.append(f"{path}{key}: expected {a[key]}, found {b[key]}")
        return lines

    return walk(asdict(expected), asdict(found), "")
