"""How the weight of a linear layer is stored. Integers and strings only.

`Format` is the one description that the weight tree, the loader, the kernels, the memory plan, the cost model and a
graph's key read. A leaf without a format holds its weight in a floating-point dtype, unchanged.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import WHOLE, Entry, Shard, table

# Kinds of code, and the bits of each. codebook: an index into 16 values that the leaf holds (NF4, FP4).
BITS = {"int8": 8, "fp8": 8, "int4": 4, "codebook": 4}
# What a leaf multiplies its weight with: rows as they are, or rows rounded to int8 with a scale that is computed from
# each row (dynamic) or stored beside the weight (static).
FLOAT, DYNAMIC, STATIC = "float", "dynamic", "static"
# Largest absolute value of an int8 activation. vLLM and Ascend divide by 127; compressed-tensors by 127.5.
MOST = 127
# A kernel reads this many inputs at once, so that groups and shards are multiples of it.
UNIT = 8
# Bytes of each dtype that a part can have.
WIDTHS = {"int8": 1, "uint8": 1, "float8_e4m3fn": 1, "int32": 4, "float32": 4}


@dataclass(frozen=True)
class Part:
    """One tensor of a quantised leaf."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return WIDTHS[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class Format:
    """The format of a quantised weight (out, in): value = code x scale + shift, int4 codes counting from -8.

    code: a key of BITS. group: inputs that share a scale; 0: the whole row. shifted: each scale has a shift, as zero
    points need. sorted: inputs are stored in the order of their groups (act-order of GPTQ), with an index of inputs.
    activations: FLOAT, DYNAMIC or STATIC.
    """

    code: str
    group: int = 0
    shifted: bool = False
    sorted: bool = False
    activations: str = FLOAT

    def __post_init__(self) -> None:
        assert self.code in BITS and self.activations in (FLOAT, DYNAMIC, STATIC)
        if self.activations != FLOAT and (self.code, self.activations) != ("int4", DYNAMIC):
            assert self.code == "int8" and not (self.group or self.shifted or self.sorted), "checked by the reader"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.code]

    @property
    def kind(self) -> str:
        """The format in the words of quant=; nf4 stands for every codebook of 16 values."""
        if self.code in ("fp8", "codebook"):
            return {"fp8": "fp8", "codebook": "nf4"}[self.code]
        return f"w{self.bits}a{16 if self.activations == FLOAT else 8}"

    def groups(self, inputs: int) -> int:
        """Scales per output."""
        return inputs // self.group if self.group else 1

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """The tensors of a leaf by name, for a weight of this size."""
        dtype = {"int8": "int8", "fp8": "float8_e4m3fn"}.get(self.code, "uint8")
        of_groups = Part((outputs, self.groups(inputs)), "float32")
        parts = {"weight": Part((outputs, inputs * self.bits // 8), dtype), "scale": of_groups}
        if self.shifted:
            parts["shift"] = of_groups
        if self.code == "codebook":
            parts["codebook"] = Part((16,), "float32")
        if self.sorted:
            parts["order"] = Part((inputs,), "int32")
        if self.activations == STATIC:
            # The scale of an activation's codes, and the code of zero.
            parts["input_scale"] = parts["input_zero"] = Part((1,), "float32")
        return parts

    def bytes(self, outputs: int, inputs: int) -> int:
        """Size of a leaf in bytes."""
        return sum(part.bytes for part in self.parts(outputs, inputs).values())

    def fault(self, entry: Entry, world: int) -> str | None:
        """Why a rank of `world` can't hold an entry in this format, or None."""
        inputs = entry.shape[1]
        split = world > 1 and entry.shard == 1
        held = Shard(0, world).size(inputs) if split else inputs
        unit = self.group or UNIT
        if self.group % UNIT:
            return f"{entry.name} has groups of {self.group} inputs, not of a multiple of {UNIT}"
        if held % unit or (split and inputs % world):
            of_rank = f", {inputs / world:g} a rank at tp={world}" if split else ""
            return f"{entry.name} has {inputs} inputs{of_rank}: not a multiple of {unit}"
        if split and self.sorted:
            return f"{entry.name} sorts its inputs by group (act-order), so that tp={world} can't split them"
        return None


# Formats by path of a leaf of the weight tree ("text.layers.0.qkv"), sorted by path: hashable, and part of a key.
Formats = tuple[tuple[str, Format], ...]

# What quant= chooses. Groups of 4-bit formats are set by quant_group=.
CHOICES = {
    "w8a16": Format("int8"),
    "w8a8": Format("int8", activations=DYNAMIC),
    "w4a16": Format("int4", group=128),
    "w4a8": Format("int4", group=128, activations=DYNAMIC),
    "fp8": Format("fp8"),
}
# Groups that quant_group= may ask for.
GROUPS = (32, 64, 128)
# The path of the embedding, which is no linear layer: its rows are looked up.
EMBEDDING = "text.embed"
# The parts of a model that quant_parts= names, by the first words of a leaf's path. Published checkpoints quantise the
# language model's layers alone.
PARTS = {
    "text": "text.layers.",
    "head": "text.head",
    "vision": "vision.",
    "projector": "projector",
    "embedding": EMBEDDING,
}


def is_linear(entry: Entry) -> bool:
    """Whether an entry is the weight of a linear layer, which only `Ops.linear` reads."""
    return entry.path.endswith(".weight") and len(entry.shape) == 2 and entry.init == "linear"


def is_quantisable(entry: Entry) -> bool:
    """Whether a format can hold an entry: the weight of a linear layer, or the embedding."""
    return is_linear(entry) or leaf_of(entry) == EMBEDDING


def leaf_of(entry: Entry) -> str:
    """The path of the leaf that an entry belongs to."""
    return entry.path.rpartition(".")[0]


def chosen(quant: str, group: int, parts: Iterable[str], shape: ModelShape, world: int) -> Formats:
    """The formats that quant=, quant_group= and quant_parts= choose for a model in floating point.

    The embedding has int8 rows. Raises UserError where a format can't hold a layer.
    """
    if quant == "none":
        return ()
    prefixes, form = tuple(PARTS[part] for part in parts), CHOICES[quant]
    if form.group:
        form = replace(form, group=group)
    if EMBEDDING in prefixes and form.code != "int8":
        raise UserError(
            f"quant={quant}: the embedding is held in 8 bits only. Leave it out of quant_parts=, or use w8a16."
        )
    found = {}
    for entry in table(shape):
        if is_quantisable(entry) and entry.path.startswith(prefixes):
            if fault := form.fault(entry, world):
                raise UserError(f"quant={quant}: {fault}. Choose another quant=, quant_group=, quant_parts= or tp=.")
            found[leaf_of(entry)] = Format("int8") if leaf_of(entry) == EMBEDDING else form
    return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Storage:
    """What a step's data is stored in. weight: bytes of an element of a weight without a format. compute: bytes of an
    element of activations. page: bytes of an element of K/V pages, its share of scales included."""

    weight: int
    compute: int
    page: float
    formats: Formats = ()


def page_bytes(width: int, head_width: int) -> float:
    """Bytes of an element of K/V pages whose dtype has `width`; int8 pages have an fp32 scale per token and head."""
    return width + 4 / head_width if width == 1 else width


@lru_cache
def stored_bytes(shape: ModelShape, storage: Storage, shard: Shard = WHOLE) -> dict[str, int]:
    """Bytes of a rank's Parameters, padding included: of each quantised leaf, and of each other Parameter, by path."""
    formats, sizes = dict(storage.formats), dict[str, list[tuple[int, ...]]]()
    for entry in table(shape):
        path = leaf if is_quantisable(entry) and (leaf := leaf_of(entry)) in formats else entry.path
        sizes.setdefault(path, []).append(entry.local(shard))
    return {
        path: formats[path].bytes(sum(rows for rows, _ in found), found[0][1])
        if path in formats
        else storage.weight * sum(prod(size) for size in found)
        for path, found in sizes.items()
    }


def described(formats: Formats) -> str:
    """The kinds of quantised layers in the words of quant=, or "none"."""
    kinds = sorted({form.kind for _, form in formats})
    return "+".join(kinds) or "none"
