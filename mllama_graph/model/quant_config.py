"""What a quantised checkpoint's configuration says that its tensors don't, and the methods that are not read. No torch.

The tensors themselves say which layers are quantised, and in which layout (stored.py): lists of ignored modules are
often wrong, since they keep the names of older versions of transformers.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import Fields, describe, read_json
from mllama_graph.model.formats import DYNAMIC, FLOAT, STATIC
from mllama_graph.model.names import legacy_name

# quant_method -> how it is called here.
METHODS = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "auto-round": "auto-round",
    "intel/auto-round": "auto-round",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
}
# Formats of compressed-tensors.
FORMATS = ("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
# Kinds of ModelSlim's description -> activations. FLOAT: the layer is not quantised.
KINDS = {"FLOAT": FLOAT, "W8A16": FLOAT, "W8A8": STATIC, "W8A8_DYNAMIC": DYNAMIC}
READ = (
    "compressed-tensors (FP8, int8, and 8 or 4 bits packed), bitsandbytes, GPTQ and AWQ of 4 or 8 bits, and ModelSlim"
)
INSTEAD = f"Read are {READ}. Use one of these, or the unquantised checkpoint, which quant= quantises."
DESCRIPTIONS = "quant_model_description*.json"
# Older tools write the configuration into a file of its own.
OWN_FILES = ("quantize_config.json", "quant_config.json")
# Ends of names of tensors that belong to formats that are not read.
NOT_READ = {
    ".biases": "MLX",
    ".weight_global_scale": "NVFP4",
    ".weight_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".compressed": "2:4 sparse",
    ".bitmask": "2:4 sparse",
    ".weight._data": "quanto",
    ".weights_scales": "EETQ",
    ".q_weight": "EXL2",
    ".B_24": "marlin-24, 2:4 sparse",
    ".vptq_indices": "VPTQ",
}


def refuse(folder: Path, method: str, where: str) -> UserError:
    """The error for a checkpoint of a format that is not read."""
    return UserError(f"{folder} is quantised ({method}; {where}), which is not read. {INSTEAD}")


class QuantConfig:
    """The quantisation part of a checkpoint's configuration; empty where there is none.

    Raises UserError naming the method, format or number of bits that is not read.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.key, self.given = folder, "", Fields({}, str(folder / "config.json"))
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(config.get(key), dict) and config[key]:
                self.key, self.given = key, Fields(config[key], f"{folder / 'config.json'}: {key}")
                break
        else:
            for path in (folder / name for name in OWN_FILES):
                if path.is_file():
                    self.key, self.given = path.name, Fields.of(path)
                    break
        self.quantize = str(config.get("quantize") or "").upper()
        self.descriptions = sorted(folder.glob(DESCRIPTIONS))
        self._refuse_unread()

    @property
    def method(self) -> str:
        """The name of the method, as users know it."""
        if self.key:
            given = self.given.values.get("quant_method")
            return METHODS.get(str(given), "GPTQ" if self.key == OWN_FILES[0] else "AWQ")
        return "ModelSlim" if self.quantize or self.descriptions else "no configuration"

    def _refuse_unread(self) -> None:
        given, where = self.given.values, f"{self.key} in config.json"
        if self.quantize and self.quantize not in KINDS:
            raise refuse(self.folder, f"ModelSlim, {self.quantize}", "quantize in config.json")
        if not self.key:
            return
        method = given.get("quant_method")
        if self.key not in OWN_FILES and (not isinstance(method, str) or method not in METHODS):
            unnamed = "MLX" if self.key == "quantization" else "an unnamed method"
            raise refuse(self.folder, method if isinstance(method, str) else unnamed, where)
        for form in self._formats():
            raise refuse(self.folder, f"{self.method}, {describe(form)}", where)
        for bits in self._bits():
            if bits not in (4, 8) or (self.method == "AWQ" and bits != 4):
                raise refuse(self.folder, f"{self.method}, {describe(bits)} bits", where)

    def _formats(self) -> list[Any]:
        """The formats that the configuration names and that are not read."""
        given = self.given.values
        if self.method == "compressed-tensors":
            found = [given.get("format"), *(group.get("format") for group in self.groups)]
            found.append(self.given.within("sparsity_config").values.get("format"))
            return [form for form in found if form and form not in FORMATS]
        read: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
            "GPTQ": (("checkpoint_format", "format"), ("gptq", "gptq_v2")),
            "AWQ": (("version",), ("gemm", "GEMM")),
            "auto-round": (("data_type",), ("int",)),
        }
        names, allowed = read.get(self.method, ((), ()))
        return [given[name] for name in names if given.get(name) and given[name] not in allowed]

    def _bits(self) -> list[Any]:
        """All numbers of bits that the configuration gives to weights."""
        weights = [group.get("weights") for group in self.groups]
        found = [part.get("num_bits") for part in weights if isinstance(part, dict)]
        found += [self.given.values.get(name) for name in ("bits", "w_bit", "weight_bits")]
        return [bits for bits in found if bits is not None]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of modules that compressed-tensors names, each with its scheme."""
        return [group for group in self.given.within("config_groups").values.values() if isinstance(group, dict)]

    def _scheme(self, module: str) -> dict[str, Any]:
        """The group of compressed-tensors that a module belongs to: one that names it, else one for all linears."""
        found: dict[str, Any] = {}
        for group in self.groups:
            targets = group.get("targets")
            for target in map(str, targets if isinstance(targets, list) else []):
                if target == "Linear":
                    found = found or group
                elif target.startswith("re:"):
                    if _matches(target[3:], module):
                        return group
                elif module.endswith(legacy_name(target)):
                    return group
        return found or next(iter(self.groups), {})

    def activations(self, module: str) -> str:
        """How the activations of an int8 layer are rounded: FLOAT, DYNAMIC or STATIC."""
        if self.descriptions or self.quantize:
            return KINDS[self.kind(f"{module}.weight")]
        rounded = self._scheme(module).get("input_activations")
        if not isinstance(rounded, dict) or rounded.get("num_bits", 8) != 8 or rounded.get("type", "int") != "int":
            return FLOAT
        return DYNAMIC if rounded.get("dynamic") else STATIC

    @cached_property
    def _description(self) -> dict[str, str]:
        """ModelSlim's description: the kind of each tensor, by legacy name."""
        return {legacy_name(n): str(kind) for path in self.descriptions for n, kind in read_json(path).items()}

    def kind(self, weight: str) -> str:
        """ModelSlim's kind of a quantised weight. Raises UserError for one that is not read."""
        kind = self._description.get(weight, self.quantize or "W8A16")
        if kind not in KINDS:
            where = f"{weight} in {self.descriptions[0].name}"
            raise refuse(self.folder, f"ModelSlim, {kind}", where)
        return kind

    @property
    def group_sizes(self) -> list[int]:
        """The sizes of groups of inputs that the configuration names."""
        weights = [group.get("weights") for group in self.groups]
        found = [part.get("group_size") for part in weights if isinstance(part, dict)]
        found += [self.given.values.get("group_size"), self.given.values.get("q_group_size")]
        return [size for size in found if isinstance(size, int) and size > 0]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The sizes of blocks of outputs and inputs that share a scale."""
        weights = [group.get("weights") for group in self.groups]
        found = [part.get("block_structure") for part in weights if isinstance(part, dict)]
        found.append(self.given.values.get("weight_block_size"))
        return [
            (block[0], block[1])
            for block in found
            if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        ]

    @property
    def symmetric(self) -> bool:
        """Whether GPTQ's zero points are said to be in the middle of the codes."""
        return self.given.flag("sym", False)

    @property
    def stores_less_one(self) -> bool:
        """Whether zero points are stored less one, as GPTQ's first version does; the second stores them as they are."""
        if self.method == "auto-round":
            packing = str(self.given.values.get("packing_format") or self.given.values.get("backend") or "gptq")
            return "gptq" in packing and "gptqmodel" not in packing
        return "gptq_v2" not in (self.given.values.get("checkpoint_format"), self.given.values.get("format"))


def _matches(pattern: str, module: str) -> bool:
    """Whether a module's name matches a pattern of any generation of names."""
    try:
        return any(re.match(pattern, name) for name in (module, module.removeprefix("language_model.")))
    except re.error:
        return False
