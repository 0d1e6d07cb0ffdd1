"""How published checkpoints store a quantised linear weight: its tensors in each layout, and their checks. No torch.

Shape letters in comments: N outputs, K inputs, G groups of inputs.

rows: int8 or fp8 (N, K), of compressed-tensors, ModelSlim, LLM.int8 and others. packed: int32 words along K, of
compressed-tensors. gptq: int32 words along K, transposed. awq: int32 words along N, transposed. blocks: bytes of
bitsandbytes' 4 bits, in blocks of the flattened weight.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import DYNAMIC, FLOAT, STATIC
from mllama_graph.model.quant_config import QuantConfig
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Entry

FLOATS = tuple(SAFETENSORS)
INTEGERS = ("I8", "U8", "I32", "I64")
# int8 (N, K), and what else may be in rows.
CODES = {"I8": "int8", "F8_E4M3": "fp8"}
# The permutation of a weight whose groups have different sizes, which no format holds.
IRREGULAR = "irregular"


class Headers(Protocol):
    """What is read here of a checkpoint's files: `CheckpointFiles`, which holds what this module finds."""

    folder: Path
    shape: ModelShape

    @property
    def tensors(self) -> dict[str, tuple[str, Path]]: ...
    def kind(self, name: str) -> str: ...
    def stored_shape(self, name: str) -> tuple[int, ...]: ...
    def small(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Stored:
    """A quantised linear weight as a checkpoint stores it. code, shifted, activations: as in `Format`.

    layout: see the head of this file. tensors: names of its tensors by role. group: inputs that share a scale, 0: the
    whole row. permutation: a digest of each input's group where inputs are not in the order of their groups.
    codebook: a digest of its values. static: scale and zero of static activations. options: what reading needs besides.
    """

    name: str
    layout: str
    code: str
    tensors: dict[str, str]
    group: int = 0
    shifted: bool = False
    permutation: str = ""
    codebook: str = ""
    activations: str = FLOAT
    static: tuple[float, float] = (1.0, 0.0)
    options: dict[str, float] = field(default_factory=dict)


class Finder:
    """Finds how each linear weight of a checkpoint is stored. Raises UserError naming a tensor that breaks a rule."""

    def __init__(self, files: Headers, config: QuantConfig):
        self.files, self.config = files, config

    def find(self, entry: Entry) -> Stored | None:
        """How a weight is stored; None where it is in floating point, or missing."""
        module, tensors = entry.name.removesuffix(".weight"), self.files.tensors
        if f"{module}.weight_packed" in tensors:
            return self._packed(entry, module)
        if f"{module}.qweight" in tensors:
            return self._gptq_or_awq(entry, module)
        if entry.name not in tensors or (kind := self.files.kind(entry.name)) in FLOATS:
            return None
        if f"{entry.name}.absmax" in tensors or kind == "U8":
            return self._blocks(entry)
        return self._rows(entry, module, kind)

    # ---- layouts

    def _rows(self, entry: Entry, module: str, kind: str) -> Stored:
        outputs, inputs = entry.shape
        if kind not in CODES:
            raise self._fault(f"{entry.name} is stored as {kind}; read are {', '.join((*FLOATS, *CODES))}")
        self._check(entry.name, (entry.shape,))
        names = {role: f"{module}.{role}" for role in ("weight_scale", "weight_scale_inv", "SCB")}
        scale = next((name for name in names.values() if name in self.files.tensors), names["weight_scale"])
        self._check(scale, None, FLOATS, f"{entry.name} is {kind} and needs it")
        tensors, options = {"weight": entry.name, "scale": scale}, {}
        if scale.endswith(".SCB"):
            # LLM.int8 stores the largest value of each row.
            options["divisor"] = 127.0
            form = f"{module}.weight_format"
            if form in self.files.tensors and self.files.small(form).any():
                raise self._fault(f"{form} says that the weight is not stored by rows. Save it again on a CPU")
        shape = self._size(scale)
        group = self._group_of_scale(scale, shape, outputs, inputs, options)
        shifted = False
        for role in ("weight_zero_point", "weight_offset"):
            if (zero := f"{module}.{role}") in self.files.tensors:
                self._check(zero, (self.files.stored_shape(scale),), FLOATS + INTEGERS)
                if self.files.small(zero).any():
                    tensors["zero"], shifted = zero, True
        found = Stored(entry.name, "rows", CODES[kind], tensors, group, shifted, options=options)
        return self._with_activations(found, module, outputs) if kind == "I8" else found

    def _with_activations(self, found: Stored, module: str, outputs: int) -> Stored:
        """The same weight with its rounding of activations, and the tensors of a static one."""
        there = [role for role in ("input_scale", "deq_scale") if f"{module}.{role}" in self.files.tensors]
        activations = STATIC if there else self.config.activations(module)
        tensors, static = dict(found.tensors), (1.0, 0.0)
        if activations == STATIC:
            name = f"{module}.input_scale"
            self._check(name, ((), (1,), (1, 1)), FLOATS, "static activations need it")
            zero = next(
                (n for r in ("input_offset", "input_zero_point") if (n := f"{module}.{r}") in self.files.tensors), None
            )
            if zero:
                self._check(zero, ((), (1,), (1, 1)), FLOATS + INTEGERS)
            static = (float(self.files.small(name).item()), float(self.files.small(zero).item()) if zero else 0.0)
            if not (0 < static[0] < math.inf and -128 <= static[1] <= 127):
                raise self._fault(f"{name} is {static[0]:g} with a zero of {static[1]:g}, which no int8 input has")
            if (scale := f"{module}.deq_scale") in self.files.tensors:
                # Of fp16 models: fp32 bits in an int64.
                self._check(scale, ((outputs,), (outputs, 1)), ("F32", "I64"))
                tensors["deq_scale"] = scale
            if (bias := f"{module}.quant_bias") in self.files.tensors:
                self._check(bias, ((outputs,), (outputs, 1)), ("I32",))
                tensors["quant_bias"] = bias
        return replace(found, tensors=tensors, activations=activations, static=static)

    def _packed(self, entry: Entry, module: str) -> Stored:
        outputs, inputs = entry.shape
        name, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        bits = self._bits(name, self._size(name), 1, inputs)
        self._check(name, ((outputs, -(-inputs * bits // 32)),), ("I32",))
        if (whole := f"{module}.weight_shape") in self.files.tensors:
            if (found := self.files.small(whole).tolist()) != list(entry.shape):
                raise self._fault(f"{whole} is {found}, expected {list(entry.shape)}")
        self._check(scale, None, FLOATS, f"{name} needs it")
        options: dict[str, float] = {"bits": bits}
        group = self._group_of_scale(scale, self._size(scale), outputs, inputs, options)
        tensors, groups = {"weight": name, "scale": scale}, self._size(scale)[1]
        if shifted := (zero := f"{module}.weight_zero_point") in self.files.tensors:
            # Older versions stored zero points as they are, and those of symmetric weights too.
            unpacked = self.files.kind(zero) == "I8"
            self._check(zero, (self._size(scale) if unpacked else (-(-outputs * bits // 32), groups),), ("I32", "I8"))
            if shifted := not unpacked or bool(self.files.small(zero).any()):
                tensors["zero"] = zero
        permutation = self._permutation(f"{module}.weight_g_idx", inputs, group, groups, tensors)
        code = {4: "int4", 8: "int8"}[bits]
        found = Stored(entry.name, "packed", code, tensors, group, shifted, permutation, options=options)
        dynamic = bits == 4 and self.config.activations(module) == DYNAMIC
        return replace(found, activations=DYNAMIC) if dynamic else found

    def _gptq_or_awq(self, entry: Entry, module: str) -> Stored:
        outputs, inputs = entry.shape
        name, scale, zero = (f"{module}.{role}" for role in ("qweight", "scales", "qzeros"))
        size = self._size(name)
        if size[0] == inputs and size[1] != outputs:
            layout, bits = "awq", self._bits(name, size, 1, outputs)
            words = (inputs, outputs * bits // 32)
            if bits != 4:
                raise self._fault(f"{name} holds {bits} bits a weight in AWQ's layout; 4 are read")
        else:
            layout, bits = "gptq", self._bits(name, size, 0, inputs)
            words = (-(-inputs * bits // 32), outputs)
        self._check(name, (words,), ("I32",))
        self._check(scale, None, FLOATS, f"{name} needs it")
        groups = self._size(scale)[0]
        group = self._group(scale, inputs, groups)
        self._check(scale, ((groups, outputs),))
        self._check(zero, ((groups, -(-outputs * bits // 32)),), ("I32",), f"{name} needs it")
        less_one = layout == "gptq" and self.config.stores_less_one
        tensors, options = {"weight": name, "scale": scale, "zero": zero}, {"bits": bits, "less_one": float(less_one)}
        shifted = not self._in_the_middle(self.files.small(zero), bits, less_one)
        permutation = self._permutation(f"{module}.g_idx", inputs, group, groups, tensors)
        code = {4: "int4", 8: "int8"}[bits]
        return Stored(entry.name, layout, code, tensors, group, shifted, permutation, options=options)

    def _blocks(self, entry: Entry) -> Stored:
        outputs, inputs = entry.shape
        name, states = entry.name, f"{entry.name}.quant_state.bitsandbytes__"
        state = next((found for kind in ("nf4", "fp4") if (found := states + kind) in self.files.tensors), None)
        if state is None:
            raise self._fault(f"{name} is {self.files.kind(name)}, and {states}nf4 or fp4 is missing")
        self._check(name, None, ("U8",))
        if math.prod(self._size(name)) != -(-outputs * inputs // 2):
            raise self._fault(f"{name} is {list(self._size(name))}, expected [{-(-outputs * inputs // 2)}, 1]")
        try:
            given = json.loads(self.files.small(state).tobytes())
            block, shape = int(given["blocksize"]), given.get("shape", list(entry.shape))
            nested, offset = int(given.get("nested_blocksize") or 0), float(given.get("nested_offset") or 0.0)
        except (ValueError, KeyError, TypeError) as error:
            raise self._fault(f"{state} is no description of a 4-bit weight ({error!r})") from error
        if list(shape) != list(entry.shape) or block < 2 or block % 2:
            raise self._fault(f"{state} has shape {shape} and blocks of {block}; expected {list(entry.shape)}, even")
        tensors = {"weight": name, "scale": f"{name}.absmax", "codebook": f"{name}.quant_map", "state": state}
        count = -(-outputs * inputs // block)
        self._check(tensors["codebook"], ((16,),), ("F32",), f"{name} needs it")
        is_nested = f"{name}.nested_absmax" in self.files.tensors
        self._check(tensors["scale"], ((count,),), ("U8",) if is_nested else FLOATS, f"{name} needs it")
        options: dict[str, float] = {"block": block}
        if is_nested:
            tensors |= {"nested_scale": f"{name}.nested_absmax", "nested_map": f"{name}.nested_quant_map"}
            options |= {"nested_block": nested or 256, "offset": offset}
            self._check(tensors["nested_scale"], ((-(-count // int(options["nested_block"])),),), ("F32",))
            self._check(tensors["nested_map"], ((256,),), ("F32",), f"{name} needs it")
        codebook = _digest(self.files.small(tensors["codebook"]))
        # Where rows are no multiple of blocks, a block's scale is repeated for the parts that don't cross rows.
        group = math.gcd(block, inputs)
        return Stored(entry.name, "blocks", "codebook", tensors, group, codebook=codebook, options=options)

    # ---- rules

    def _bits(self, name: str, size: tuple[int, ...], axis: int, count: int) -> int:
        """Bits of each of `count` codes along an axis of int32 words."""
        for bits in (4, 8):
            if size[axis] == -(-count * bits // 32):
                return bits
        raise self._fault(
            f"{name} is {list(size)}: {32 * size[axis] / count:.3g} bits for each of {count}; 4 and 8 bits are read"
        )

    def _group_of_scale(
        self, name: str, size: tuple[int, ...], outputs: int, inputs: int, options: dict[str, float]
    ) -> int:
        """Inputs that share a scale of (1 or N, G), or of (N / block, K / block)."""
        if math.prod(size) == 1:
            return 0
        rows, groups = size
        if rows != outputs:
            for block, width in self.config.blocks or [(128, 128)]:
                if rows == -(-outputs // block) and groups == -(-inputs // width):
                    options["block_rows"] = block
                    return width if groups > 1 else 0
            raise self._fault(f"{name} is {list(size)}, expected [{outputs}, 1] or [{outputs}, groups]")
        return self._group(name, inputs, groups)

    def _group(self, name: str, inputs: int, groups: int) -> int:
        """The size of each of so many groups of inputs, the last of which may be smaller; 0: the whole row."""
        if groups == 1:
            return 0
        for size in self.config.group_sizes:
            if -(-inputs // size) == groups:
                return size
        if groups < 1 or inputs % groups:
            raise self._fault(f"{name} has {groups} groups, which {inputs} inputs don't make")
        return inputs // groups

    def _permutation(self, name: str, inputs: int, group: int, groups: int, tensors: dict[str, str]) -> str:
        """The digest of the group of each input; empty where inputs are in the order of their groups."""
        if name not in self.files.tensors:
            return ""
        self._check(name, ((inputs,),), ("I32", "I64"))
        index = self.files.small(name)
        # compressed-tensors writes -1 where it has no order.
        if not group or (index == -1).all() or np.array_equal(index, np.arange(inputs) // group):
            return ""
        if index.min() < 0 or index.max() >= groups:
            raise self._fault(f"{name} names groups {index.min()} to {index.max()}; there are {groups}")
        tensors["order"] = name
        return _digest(index) if (np.bincount(index, minlength=groups) == group).all() else IRREGULAR

    def _in_the_middle(self, words: np.ndarray, bits: int, less_one: bool) -> bool:
        """Whether all zero points are half of the codes' range. Of "sym" checkpoints, in either version of GPTQ."""
        middle = sum((1 << (bits - 1)) << at for at in range(0, 32, bits))
        lower = sum(((1 << (bits - 1)) - 1) << at for at in range(0, 32, bits))
        found = words.view(np.uint32)
        if self.config.symmetric and ((found == middle).all() or (found == lower).all()):
            return True
        return bool((found == (lower if less_one else middle)).all())

    def _size(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, as (1, 1) where it has no axes and (n, 1) where it has one."""
        found = self.files.stored_shape(name)
        if len(found) > 2:
            raise self._fault(f"{name} is {list(found)}, expected a matrix")
        return (*found, *(1,) * (2 - len(found)))

    def _check(
        self,
        name: str,
        shapes: Sequence[tuple[int, ...]] | None,
        kinds: Sequence[str] = (),
        why: str = "it belongs to a quantised weight",
    ) -> None:
        """Raises UserError where a tensor is missing, or has another shape or dtype than one of those given."""
        if name not in self.files.tensors:
            raise self._fault(f"{name} is missing: {why}")
        if shapes is not None and (found := self.files.stored_shape(name)) not in shapes:
            raise self._fault(f"{name} is {list(found)}, expected {' or '.join(str(list(s)) for s in shapes)}")
        if kinds and (kind := self.files.kind(name)) not in kinds:
            raise self._fault(f"{name} is stored as {kind}, expected {' or '.join(kinds)}")

    def _fault(self, what: str) -> UserError:
        return UserError(f"{self.files.folder}: {what}.")


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
