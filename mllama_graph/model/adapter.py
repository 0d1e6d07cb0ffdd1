"""PEFT adapters: which weights they change, and how. Reads only the headers of files, and does not import torch.

An adapter is a folder that peft's `save_pretrained` wrote: adapter_config.json, and adapter_model.safetensors or .bin.
A tensor's name is `base_model.model.`, the module's name in the model, and the part (see LORA). merge.py adds the
adapter to the weights.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import Fields
from mllama_graph.model.foreign import open_safetensors
from mllama_graph.model.names import legacy_name
from mllama_graph.model.pth import PthFile
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Entry

PREFIX = "base_model.model."
# A name such as module.lora_A.weight; older versions of peft put the adapter's name before .weight.
LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
# What peft inserts into the names of tensors that replace the model's own (modules_to_save, biases of adapted modules).
WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!weight$|bias$)[^.]+)?)(?=\.|$)")
# Keys of adapter_config.json that change what the adapter computes in ways that this module does not support.
NOT_READ = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that also change the base model's weights: the adapter does not fit the original ones.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE_WITH_PEFT = "Merge it with peft (merge_and_unload), save the model, and give that as weights=."


@dataclass(frozen=True)
class Change:
    """What an adapter does to one weight. replacement, a, b, magnitude and added are names of tensors in its file.

    replacement: the new value. a, b: low-rank factors; their product times `scale` is added. magnitude: the norms that
    DoRA gives to the rows after that. added: a bias; `scale` times it is added. embedding: the module is an embedding,
    and a and b are stored transposed. module: the changed module, for errors.
    """

    module: str
    scale: float = 1.0
    replacement: str | None = None
    a: str | None = None
    b: str | None = None
    embedding: bool = False
    magnitude: str | None = None
    added: str | None = None


class Adapter:
    """An adapter. `weight`: a factor for all that it adds. `changes`: legacy tensor name -> Change.

    Raises UserError if the folder is not a LoRA adapter, or is of a kind that is not supported.
    """

    def __init__(self, folder: Path, weight: float = 1.0):
        self.folder, self.weight = folder, weight
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"adapter={folder} has no adapter_config.json. Give the folder that peft's save_pretrained wrote."
            )
        self._config = Fields.of(folder / "adapter_config.json")
        self._refuse_other_kinds()
        self.base = self._config.values.get("base_model_name_or_path")
        self.path = self._file()
        self._shapes = self._headers()
        self.changes = self._changes()

    def _refuse_other_kinds(self) -> None:
        config = self._config
        if not (kind := config.text("peft_type", "")):
            raise UserError(
                f"adapter={self.folder}: adapter_config.json has no peft_type. Give the folder that peft's "
                "save_pretrained wrote."
            )
        if kind != "LORA":
            raise UserError(f"adapter={self.folder} is of peft_type={kind}; only LORA is read. {MERGE_WITH_PEFT}")
        for name in NOT_READ:
            if config.values.get(name):
                raise UserError(f"adapter={self.folder}: {name} in adapter_config.json is not read. {MERGE_WITH_PEFT}")
        init = config.values.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
            raise UserError(
                f"adapter={self.folder}: init_lora_weights={init} changed the base model's weights in training, so "
                f"that the adapter does not fit the checkpoint. {MERGE_WITH_PEFT}"
            )

    def _file(self) -> Path:
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (self.folder / name).is_file():
                return self.folder / name
        raise UserError(f"adapter={self.folder} has no adapter_model.safetensors. Download it, or save it with peft.")

    def _headers(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the file. Raises UserError for an unreadable file or a wrong dtype."""
        if self.path.suffix == ".bin":
            stored = {name: (tensor.kind, tensor.shape) for name, tensor in PthFile(self.path).tensors.items()}
        else:
            with open_safetensors(self.path) as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
                stored = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        for name, (kind, _) in stored.items():
            if kind not in SAFETENSORS:
                raise UserError(f"{self.path}: {name} is stored as {kind}; supported are {', '.join(SAFETENSORS)}.")
        if not stored:
            raise UserError(f"{self.path} holds no tensor, so that the adapter changes nothing. Save it again.")
        return {name: shape for name, (_, shape) in stored.items()}

    def _changes(self) -> dict[str, Change]:
        """Group the file's tensors by the weight that they change."""
        factors: dict[str, dict[str, str]] = {}
        changes: dict[str, Change] = {}
        for key in self._shapes:
            name = key.removeprefix(PREFIX)
            if found := LORA.fullmatch(name):
                part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
                factors.setdefault(found["module"], {})[part] = key
            elif ".original_module." not in name:
                name = WRAPPER.sub("", name)
                changes[legacy_name(name)] = Change(name.rpartition(".")[0], replacement=key)
        for module, parts in factors.items():
            weight = legacy_name(f"{module}.weight")
            scale = self._scale(module)
            embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
            a, b = (parts.get(f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB")
            if a is None or b is None:
                raise UserError(f"{self.path}: {module} has lora_{'A' if b is None else 'B'} without the other factor.")
            # For an adapted embedding or head, peft saves the whole weight too, in case training resized it.
            saved = changes[weight].replacement if weight in changes else None
            changes[weight] = Change(module, scale, saved, a, b, embedding, parts.get("lora_magnitude_vector"))
            if self._config.flag("use_dora", False) and changes[weight].magnitude is None:
                raise UserError(f"{self.path}: {module} has no lora_magnitude_vector, which use_dora needs.")
            if added := parts.get("lora_B.bias"):
                changes[legacy_name(f"{module}.bias")] = Change(module, scale, added=added)
        return changes

    def _scale(self, module: str) -> float:
        """The scale of a module: alpha / r, or alpha / sqrt(r) with rslora. Patterns may set alpha and r per module."""
        config = self._config
        rank = self._of_pattern("rank_pattern", module, config.number("r", 8))
        alpha = self._of_pattern("alpha_pattern", module, config.number("lora_alpha", 8))
        if not rank >= 1:
            raise config.fault("r", "at least 1")
        return alpha / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)

    def _of_pattern(self, name: str, module: str, default: float) -> float:
        """The value of the first pattern in the table `name` that matches the end of the module's name, as in peft."""
        patterns = self._config.within(name)
        for pattern in patterns.values:
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return patterns.number(pattern, default)
            except re.error as error:
                raise UserError(f"{patterns.where}: {pattern!r} is no regular expression: {error}.") from error
        return default

    def verify(self, entries: Sequence[Entry], shape: ModelShape) -> None:
        """Raises UserError, with the module and shape, if the adapter does not fit the model."""
        expected = {entry.name: entry for entry in entries}
        biases = {name for name in self.changes if name.endswith(".bias") and name not in expected}
        unknown = sorted({change.module for name, change in self.changes.items() if name not in expected})
        if unknown:
            what = "has no bias in" if biases and len(biases) == len(unknown) else "does not have"
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise UserError(
                f"adapter={self.folder} changes {len(unknown)} modules that the model {what}: "
                f"{', '.join(unknown[:3])}{more}. {self._trained_on()}"
            )
        for name, change in self.changes.items():
            for key, wanted in self._wanted(change, expected[name].shape, name):
                if not _equal(self._shapes[key], wanted):
                    raise UserError(
                        f"adapter={self.folder}: {key.removeprefix(PREFIX)} is {list(self._shapes[key])}, and the "
                        f"model needs {list(wanted)}. {self._trained_on()}"
                    )

    def _wanted(self, change: Change, shape: tuple[int, ...], name: str) -> list[tuple[str, tuple[int, ...]]]:
        """(key, required shape) of each tensor of a change. `name`, `shape`: the weight that it changes."""
        whole = [(key, shape) for key in (change.replacement, change.added) if key]
        if not change.a or not change.b:
            return whole
        if len(shape) < 2:
            raise UserError(f"adapter={self.folder} adapts {change.module}, which has no matrix. {MERGE_WITH_PEFT}")
        if change.magnitude and change.embedding:
            raise UserError(f"adapter={self.folder} has DoRA on the embedding {change.module}. {MERGE_WITH_PEFT}")
        rank = int(self._of_pattern("rank_pattern", change.module, self._config.number("r", 8)))
        into, out = (shape[:1], shape[1:]) if change.embedding else (shape[1:], shape[:1])
        wanted = [*whole, (change.a, (rank, *into)), (change.b, (*out, rank))]
        return [*wanted, (change.magnitude, shape[:1])] if change.magnitude else wanted

    def _trained_on(self) -> str:
        base = f" {self.base}" if isinstance(self.base, str) and self.base else " another model"
        return f"It was trained on{base}: give that base model as weights=."


def _equal(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether shapes are equal apart from axes of length 1, which the factors of a convolution have."""
    return tuple(n for n in found if n != 1) == tuple(n for n in wanted if n != 1)


def read_adapters(given: Any) -> list[Adapter]:
    """The adapters that adapter= names: one, or a comma-separated list, each as PATH or PATH:WEIGHT.

    Raises UserError if a folder is missing, if an adapter that replaces weights has a WEIGHT other than 1, or if two
    adapters can't be merged into the same weight.
    """
    if given is None:
        return []
    items = [str(item) for item in given] if isinstance(given, (list, tuple)) else _split(str(given))
    adapters = [_adapter(item.strip()) for item in items]
    changed: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, change in adapter.changes.items():
            fixed = change.replacement or change.magnitude
            if fixed and adapter.weight != 1:
                raise UserError(
                    f"adapter={adapter.folder}:{adapter.weight:g} replaces {change.module} (modules_to_save, biases or "
                    "DoRA), which has no weighted form. Use it with weight 1."
                )
            other = changed.setdefault(name, adapter)
            if other is not adapter and (fixed or other.changes[name].replacement or other.changes[name].magnitude):
                raise UserError(
                    f"adapter={other.folder} and {adapter.folder} both set {change.module}, which can have one value "
                    "(modules_to_save, biases or DoRA). Give one of the two."
                )
    return adapters


def _split(given: str) -> list[str]:
    """The items of a comma-separated list. The name of an existing folder is one item, even if it has commas."""
    return [given] if Path(given).expanduser().is_dir() else [item for item in given.split(",") if item.strip()]


def _adapter(item: str) -> Adapter:
    """The adapter that PATH or PATH:WEIGHT names."""
    folder, weight = Path(item).expanduser(), 1.0
    if not folder.is_dir():
        path, colon, number = item.rpartition(":")
        with contextlib.suppress(ValueError):
            folder, weight = (Path(path).expanduser(), float(number)) if colon else (folder, 1.0)
    if not folder.is_dir():
        raise UserError(
            f"adapter={item} is not a folder. Give the folder that peft's save_pretrained wrote, as PATH or "
            "PATH:WEIGHT; several separated by commas."
        )
    if not math.isfinite(weight):
        raise UserError(f"adapter={item}: the weight must be a finite number.")
    return Adapter(folder, weight)
