"""Quantised checkpoints as they are published: which leaves stay quantised in memory, in which format. No torch.

A leaf may stack several weights (q, k and v; gate and up). It stays quantised where one format holds all of them, and a
rank's part of each; otherwise its weights are dequantised while they are loaded, which is always right.
"""

import math
import re
from collections.abc import Iterable

from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import FLOAT, Format, Formats, is_linear, leaf_of
from mllama_graph.model.quant_config import NOT_READ, QuantConfig, refuse
from mllama_graph.model.stored import IRREGULAR, Finder, Headers, Stored
from mllama_graph.model.table import Entry, Shard, table

# Tensors that may lie beside a quantised weight, which the engine doesn't need or which Finder has checked.
BESIDE = (
    "weight_format",
    "weight_shape",
    "weight_zero_point",
    "weight_offset",
    "weight_g_idx",
    "g_idx",
    "input_scale",
    "input_offset",
    "input_zero_point",
    "output_scale",
    "weight.nested_quant_map",
)
# The part of a tensor's name up to its layer.
LAYER = re.compile(r".*\.layers\.\d+\.")
# Scales of quantised K/V pages: pages hold what kv= says.
OF_PAGES = (".k_scale", ".v_scale", ".q_scale", ".kv_cache_scale", ".kv_cache_offset")


class Published:
    """The quantised weights of a checkpoint, by the name of their entry; none of an unquantised checkpoint.

    used: the names of all tensors that belong to them. Raises UserError naming the tensor at fault.
    """

    def __init__(self, files: Headers, config: QuantConfig):
        self.method, self._folder = config.method, files.folder
        for name in files.tensors:
            for end, method in NOT_READ.items():
                if name.endswith(end):
                    raise refuse(files.folder, method, f"it holds {name}")
        self.entries = [entry for entry in table(files.shape) if is_linear(entry)]
        finder = Finder(files, config)
        found = ((entry.name, finder.find(entry)) for entry in self.entries)
        self.stored: dict[str, Stored] = {name: stored for name, stored in found if stored}
        self.used = {name for stored in self.stored.values() for name in stored.tensors.values()}
        modules = {name.removesuffix("weight") for name in self.stored}
        self.used |= {module + end for module in modules for end in BESIDE if module + end in files.tensors}
        if self.stored:
            self.used |= {name for name in files.tensors if name.endswith(OF_PAGES)}
            self.used |= _zero_biases(files)
            self.used |= self._of_cut_layers(files)

    def _of_cut_layers(self, files: Headers) -> set[str]:
        """The tensors of quantised weights in layers that config.json does not have: a trimmed model may keep them."""
        layers = {LAYER.match(entry.name) for entry in self.entries}
        there = {found[0] for found in layers if found}
        kinds = {LAYER.sub("", name) for name in self.used}
        named = ((name, LAYER.match(name)) for name in files.tensors)
        return {name for name, found in named if found and found[0] not in there and LAYER.sub("", name) in kinds}

    def describe(self) -> str:
        """What the checkpoint holds, for messages; empty where it is unquantised."""
        if not self.stored:
            return ""
        codes = sorted({stored.code for stored in self.stored.values()})
        return f"{self.method}: {len(self.stored)} of {len(self.entries)} linear weights in {', '.join(codes)}"

    def formats(self, world: int, changed: Iterable[str] = ()) -> tuple[Formats, list[str]]:
        """The formats in which a rank of `world` holds leaves, and a line for each kind of leaf that is held otherwise.

        changed: names of weights that adapters change, which are added to unquantised weights.
        """
        leaves: dict[str, list[Entry]] = {}
        for entry in self.entries:
            leaves.setdefault(leaf_of(entry), []).append(entry)
        formats, reasons = {}, dict[str, list[str]]()
        for leaf, entries in leaves.items():
            if not any(entry.name in self.stored for entry in entries):
                continue
            form, why = self._held(entries, world, frozenset(changed))
            if form:
                formats[leaf] = form
            if why:
                kept = "multiplied with unrounded activations" if form else "dequantised while loading"
                reasons.setdefault(f"{kept}: {why}", []).append(leaf)
        notes = [f"{len(found)} quantised layers, {found[0]} the first, are {why}" for why, found in reasons.items()]
        return tuple(sorted(formats.items())), notes

    def _held(self, entries: list[Entry], world: int, changed: frozenset[str]) -> tuple[Format | None, str]:
        """The format of a leaf, or None; and why it is not just as the checkpoint stores it, or nothing."""
        there = [self.stored[entry.name] for entry in entries if entry.name in self.stored]
        first, why = there[0], ""
        if any(entry.name in changed for entry in entries):
            return None, "an adapter changes them"
        if len(there) < len(entries):
            return None, "only some of the weights that are stacked there are quantised"
        for what in ("code", "permutation", "codebook"):
            if len({getattr(stored, what) for stored in there}) > 1:
                return None, f"the weights that are stacked there have different {what}s"
        if first.permutation == IRREGULAR:
            return None, "act-order with groups of different sizes"
        inputs, split = entries[0].shape[1], world > 1 and entries[0].shard == 1
        sizes = {stored.group for stored in there}
        # A smaller group with the same scale repeated is the same weight.
        group = math.gcd(*(size or inputs for size in sizes), Shard(0, world).size(inputs) if split else inputs)
        group = group if sizes != {0} else 0
        shifted, activations = any(stored.shifted for stored in there), first.activations
        if any((stored.activations, stored.static) != (activations, first.static) for stored in there):
            activations, why = FLOAT, "the weights that are stacked there round activations differently"
        if activations != FLOAT and first.code == "int8" and (group or shifted or first.permutation):
            activations, why = FLOAT, "int8 activations need symmetric weights with a scale per output"
        form = Format(first.code, group, shifted, bool(first.permutation), activations)
        for entry in entries:
            if fault := form.fault(entry, world):
                return None, f"each {fault.removeprefix(entry.name).strip()}"
        return form, why


def _zero_biases(files: Headers) -> set[str]:
    """The biases of norms that ModelSlim's anti_outlier adds, where they are zero. Raises UserError where not."""
    found = {
        name
        for name in files.tensors
        if name.startswith("language_model.") and name.endswith(("norm.bias", "norm.module.bias"))
    }
    for name in found:
        if files.small(name).any():
            raise UserError(
                f"{files.folder}: {name} is not zero: anti_outlier added it to a norm, which has none in this engine. "
                "Quantise again without anti_outlier, or with a method that adds no bias."
            )
    return found
