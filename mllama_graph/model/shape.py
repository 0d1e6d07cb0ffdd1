"""The sizes of a model, read from a checkpoint's config.json. Integers and floats only.

A model is an mllama, or a text-only Llama that proposes tokens for one (speculate=draft).
"""

from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import Fields

# Rows of a tile in the vision tower are padded to a multiple of this.
ROW_MULTIPLE = 8
# Rows of the embedding beyond the vocabulary, in checkpoints whose embedding was not resized.
EXTRA_EMBEDDINGS = 8
# Far above every model: a count beyond these is a mistake, and would take minutes and memory to find out.
MOST_LAYERS, MOST_TILES = 10_000, 100
# The other RoPE types need frequency tables; no released mllama model uses them.
ROPE_TYPES = ("default", "linear", "llama3")
# The model type of text-only Llama, and the defaults of its config.json that are not mllama's.
LLAMA = "llama"
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}
# An id that no token has.
NO_ID = -1


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


# The vision tower of a text-only model.
NO_VISION = VisionShape(
    width=0,
    heads=1,
    layers=0,
    global_layers=0,
    mlp=0,
    patch=1,
    tile=1,
    max_tiles=0,
    channels=3,
    features=(),
    aspect_ratios=(),
    eps=1e-5,
)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine the shapes of its graphs.

    image_token: the id of an image; NO_ID for a text-only model. embeddings: rows of the embedding. Released models
    have 8 rows more than the vocabulary, of which the first is `<|image|>`; fine-tuning on new tokens resizes it.
    """

    text: TextShape
    vision: VisionShape
    image_token: int
    embeddings: int

    @property
    def sees(self) -> bool:
        """Whether the model has a vision tower and so takes images."""
        return self.vision.max_tiles > 0

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.text.heads // self.text.kv_heads

    def check_ranks(self, tp: int) -> None:
        """Raises UserError if `tp` does not divide the number of heads of every kind."""
        heads = {"query": self.text.heads, "key-value": self.text.kv_heads}
        heads |= {"vision": self.vision.heads} if self.sees else {}
        if any(count % tp for count in heads.values()):
            common = gcd(*heads.values())
            choices = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise UserError(
                f"tp={tp} does not divide the model's heads ({', '.join(f'{n} {k}' for k, n in heads.items())}). "
                f"tp can be {', '.join(choices)}."
            )


def _rope(text: Fields) -> RopeShape:
    """Read `rope_parameters` (new), or `rope_theta` and `rope_scaling` (legacy)."""
    legacy, new = text.within("rope_scaling"), text.within("rope_parameters")
    given = Fields(legacy.values | new.values, (new if new.values else legacy).where)
    kind = given.text("rope_type", given.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise given.fault("rope_type" if "rope_type" in given.values else "type", f"one of {', '.join(ROPE_TYPES)}")
    defaults = RopeShape()
    return RopeShape(
        theta=given.number("rope_theta", text.number("rope_theta", defaults.theta)),
        type=kind,
        factor=given.number("factor", 1.0),
        low_freq_factor=given.number("low_freq_factor", defaults.low_freq_factor),
        high_freq_factor=given.number("high_freq_factor", defaults.high_freq_factor),
        original_positions=given.integer("original_max_position_embeddings", defaults.original_positions),
    )


def square_side(part: Fields, name: str, default: int) -> int:
    """The side of a square in pixels, given as a number or as two equal ones."""
    if not isinstance(part.values.get(name), list):
        return part.integer(name, default, least=1)
    sides = part.integers(name)
    if not sides or len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
        raise part.fault(name, "one side, or two equal ones, since mllama's tiles are square")
    return sides[0]


def shape_of(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The ModelShape of a config.json.

    Defaults are those of the released 11B model, as in transformers' MllamaConfig. Raises UserError for another model
    type, for a field of a wrong type, or a shape that mllama can't have. `where` names the file in errors.
    """
    if config.get("model_type") != "mllama":
        raise UserError(f"{where} has model_type={config.get('model_type')!r}; only 'mllama' is supported.")
    given = Fields(config, where)
    text, vision = given.within("text_config"), given.within("vision_config")
    for part, expected in ((text, "silu"), (vision, "gelu")):
        if part.text("hidden_act", expected) != expected:
            raise part.fault("hidden_act", f"{expected!r}, which mllama uses")
    token = "image_token_index" if "image_token_index" in config else "image_token_id"
    read = _text(text)
    shape = ModelShape(read, _vision(vision), given.integer(token, 128256, least=0), read.vocab + EXTRA_EMBEDDINGS)
    _check_shape(shape, where)
    return shape


def llama_shape_of(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The ModelShape of a text-only Llama's config.json. Defaults are those of transformers' LlamaConfig.

    Raises UserError for another model type, for a field of a wrong type, or a shape that Llama can't have.
    """
    if config.get("model_type") != LLAMA:
        raise UserError(f"{where} has model_type={config.get('model_type')!r}, not {LLAMA!r}.")
    given = Fields(LLAMA_DEFAULTS | {name: value for name, value in config.items() if value is not None}, where)
    if given.text("hidden_act", "silu") != "silu":
        raise given.fault("hidden_act", "'silu', which Llama uses")
    # Heads of keys and values are as many as those of queries where the file does not say it.
    heads = {"num_key_value_heads": given.integer("num_attention_heads", 32, least=1), "cross_attention_layers": []}
    text = _text(Fields(heads | given.values, where))
    shape = ModelShape(text, NO_VISION, NO_ID, text.vocab)
    _check_shape(shape, where)
    return shape


def _text(text: Fields) -> TextShape:
    width = text.integer("hidden_size", 4096, least=1)
    heads = text.integer("num_attention_heads", 32, least=1)
    layers = text.integer("num_hidden_layers", 40, least=1, most=MOST_LAYERS)
    cross = text.integers("cross_attention_layers")
    cross = [3, 8, 13, 18, 23, 28, 33, 38] if cross is None else cross
    if any(i < 0 for i in cross):
        raise text.fault("cross_attention_layers", "a list of layers, counted from 0")
    return TextShape(
        vocab=text.integer("vocab_size", 128256, least=1),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=text.integer("num_key_value_heads", 8, least=1),
        head_width=text.integer("head_dim", 0, least=1) if text.has("head_dim") else width // heads,
        mlp=text.integer("intermediate_size", 14336, least=1),
        # A model whose last layers were cut off keeps their indices; transformers ignores them, too.
        cross_layers=tuple(sorted({i for i in cross if i < layers})),
        eps=text.number("rms_norm_eps", 1e-5),
        positions=text.integer("max_position_embeddings", 131072, least=1),
        rope=_rope(text),
    )


def _vision(vision: Fields) -> VisionShape:
    max_tiles = vision.integer("max_num_tiles", 4, least=1, most=MOST_TILES)
    ratios = vision.values.get("supported_aspect_ratios") or supported_aspect_ratios(max_tiles)
    if not isinstance(ratios, list) or not all(_is_ratio(ratio) for ratio in ratios):
        raise vision.fault("supported_aspect_ratios", "a list of [height, width] in tiles")
    features = vision.integers("intermediate_layers_indices")
    heads = "attention_heads" if "attention_heads" in vision.values else "num_attention_heads"
    return VisionShape(
        width=vision.integer("hidden_size", 1280, least=1),
        heads=vision.integer(heads, 16, least=1),
        layers=vision.integer("num_hidden_layers", 32, least=1, most=MOST_LAYERS),
        global_layers=vision.integer("num_global_layers", 8, least=0, most=MOST_LAYERS),
        mlp=vision.integer("intermediate_size", 5120, least=1),
        patch=square_side(vision, "patch_size", 14),
        tile=square_side(vision, "image_size", 448),
        max_tiles=max_tiles,
        channels=vision.integer("num_channels", 3, least=1),
        features=tuple([3, 7, 15, 23, 30] if features is None else features),
        aspect_ratios=tuple((height, width) for height, width in ratios),
        eps=vision.number("norm_eps", 1e-5),
    )


def _is_ratio(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)
    )


def supported_aspect_ratios(max_tiles: int) -> list[tuple[int, int]]:
    """All (height, width) of at most `max_tiles` tiles, in the order of the aspect-ratio ids (1-based)."""
    sides = range(1, max_tiles + 1)
    return [(h, w) for h in sides for w in sides if h * w <= max_tiles]


def _check_shape(shape: ModelShape, where: str) -> None:
    text, vision = shape.text, shape.vision
    if text.heads % text.kv_heads:
        raise UserError(f"{where}: {text.kv_heads} kv heads do not divide {text.heads} query heads.")
    if text.head_width % 2 or not text.head_width:
        raise UserError(f"{where}: head_dim {text.head_width} is not even; rotary embedding needs pairs.")
    if any(not 0 <= i < vision.layers for i in vision.features):
        raise UserError(
            f"{where}: intermediate_layers_indices {list(vision.features)} go beyond the {vision.layers} layers."
        )
    if vision.width % vision.heads or vision.tile % vision.patch:
        raise UserError(
            f"{where}: vision width {vision.width} / heads {vision.heads} and tile {vision.tile} / patch "
            f"{vision.patch} must be whole numbers."
        )


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
