"""A checkpoint's files: location, dtype and shape of each tensor. Reads only headers, and imports no torch.

A checkpoint is a Hugging Face folder with config.json and safetensors, in one file or in shards with an index. The
weight names of both transformers generations are accepted, and those of MLX. meta_files.py reads Meta's own format.
"""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model import foreign
from mllama_graph.model.adapter import Adapter
from mllama_graph.model.fields import Fields, read_json
from mllama_graph.model.formats import Formats
from mllama_graph.model.names import legacy_name
from mllama_graph.model.published import Published
from mllama_graph.model.quant_config import QuantConfig
from mllama_graph.model.shape import ModelShape, shape_of
from mllama_graph.model.small import read_small
from mllama_graph.model.table import Entry, table

log = logging.getLogger(__name__)

# Buffers that early conversions saved; here they are computed from config.json.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
HEAD_MODULE = "language_model.lm_head."
PATCH = "vision_model.patch_embedding.weight"
INDEX, WHOLE_FILE = "model.safetensors.index.json", "model.safetensors"
# Safetensors files that lie beside a model's and don't belong to it: Meta's or Mistral's own, and adapters.
OTHER_FILES = ("consolidated", "adapter_model", "optimizer", "._")
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


class CheckpointFiles:
    """A checkpoint folder: the model's shape, its tensors by legacy name, and the adapters to merge into them.

    shape_of: the shape of a config.json, given with its path. Raises UserError naming the file or tensor at fault if
    the folder is not a checkpoint of that kind.
    """

    def __init__(
        self,
        folder: Path,
        adapters: Sequence[Adapter] = (),
        shape_of: Callable[[dict[str, Any], str], ModelShape] = shape_of,
    ):
        self.folder, self.adapters = folder, tuple(adapters)
        self._opened: dict[Path, Any] = {}
        if not (folder / "config.json").is_file():
            raise UserError(foreign.explain_missing_config(folder))
        self.config = read_json(folder / "config.json")
        self._quantised_as = QuantConfig(folder, self.config)
        self.shape: ModelShape = self._with_embeddings(shape_of(self.config, str(folder / "config.json")))

    def __getstate__(self) -> dict[str, Any]:
        """State without open files; the process that unpickles it opens them itself."""
        return self.__dict__ | {"_opened": {}}

    def _with_embeddings(self, shape: ModelShape) -> ModelShape:
        """The shape with as many embeddings as the file has, since fine-tuning may have resized them.

        Rows beyond the head's are allowed; `verify` refuses fewer.
        """
        found = self.stored_shape(EMBEDDING) if EMBEDDING in self.tensors else ()
        rows = found[0] if len(found) == 2 else 0
        return replace(shape, embeddings=rows) if rows >= max(shape.text.vocab, shape.image_token + 1) else shape

    @cached_property
    def paths(self) -> list[Path]:
        """The files that hold the model. As in transformers, one whole file comes before an index."""
        if (self.folder / WHOLE_FILE).is_file():
            return [self.folder / WHOLE_FILE]
        if (self.folder / INDEX).is_file():
            return sorted({self.folder / file for file in _weight_map(self.folder / INDEX).values()})
        paths = [path for path in sorted(self.folder.glob("*.safetensors")) if not path.name.startswith(OTHER_FILES)]
        if not paths:
            raise UserError(foreign.explain_missing_weights(self.folder))
        _refuse_missing_shards(paths)
        return paths

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Path]]:
        """Legacy tensor name -> (name in the file, file)."""
        found: dict[str, tuple[str, Path]] = {}
        for path in self.paths:
            names: list[str] = self._open(path).keys()
            for name in names:
                legacy = legacy_name(name)
                if legacy in found:
                    raise UserError(f"{name} is in {found[legacy][1].name} and again in {path.name}.")
                if not legacy.endswith(IGNORED_SUFFIX):
                    found[legacy] = (name, path)
        has_head = any(name.startswith(HEAD_MODULE) for name in found)
        if not has_head and EMBEDDING in found and self._tied:
            found[HEAD] = found[EMBEDDING]
        return found

    @property
    def _tied(self) -> bool:
        """Whether config.json says that the head is the embedding. Where a head is stored, transformers uses that."""
        given = Fields(self.config, str(self.folder / "config.json"))
        return any(part.flag("tie_word_embeddings", False) for part in (given, given.within("text_config")))

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist. Download it again.")
            if not path.is_file():
                raise UserError(
                    f"{path} is named in the index but missing. Download it, or delete {INDEX} if that is out of date."
                )
            self._opened[path] = foreign.open_safetensors(path)
        return self._opened[path]

    def _header(self, name: str) -> Any:
        """The header entry (shape and dtype) of a tensor, by its legacy name."""
        stored, path = self.tensors[name]
        return self._open(path).get_slice(stored)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by its legacy name; of a tied head, that of the rows of the embedding it uses."""
        found = tuple(self._header(name).get_shape())
        if name == HEAD and self.tensors[name] == self.tensors.get(EMBEDDING):
            return (min(self.shape.text.vocab, found[0]), *found[1:])
        return (found[0], found[3], found[1], found[2]) if self.is_mlx_patch(name) and len(found) == 4 else found

    def is_mlx_patch(self, name: str) -> bool:
        """Whether a tensor is the patch embedding as MLX stores it: channels last, (E, patch, patch, channels)."""
        if name != PATCH:
            return False
        stored, path = self.tensors[name]
        return "vision_tower" in stored or (self._open(path).metadata() or {}).get("format") == "mlx"

    def kind(self, name: str) -> str:
        """The dtype of a tensor as in safetensors headers, by its legacy name."""
        kind: str = self._header(name).get_dtype()
        return kind

    def small(self, name: str) -> np.ndarray:
        """The values of a small tensor, by its legacy name."""
        stored, path = self.tensors[name]
        self._open(path)
        return read_small(path, stored)

    @cached_property
    def published(self) -> Published:
        """The quantised weights. Raises UserError where one is not stored as its format says."""
        return Published(self, self._quantised_as)

    @property
    def quantised(self) -> str:
        """What is quantised in the checkpoint, and how; empty where nothing is."""
        return self.published.describe()

    def formats(self, world: int) -> tuple[Formats, list[str]]:
        """The formats in which a rank of `world` holds quantised layers, and notes on those that it does not."""
        return self.published.formats(world, [name for adapter in self.adapters for name in adapter.changes])

    @cached_property
    def stored(self) -> str:
        """The dtype of most unquantised weights: fp32, fp16 or bf16. Raises UserError where one has any other."""
        counts: Counter[str] = Counter()
        for name in (name for name in self.tensors if name not in self.published.used):
            kind = self.kind(name)
            if kind not in SAFETENSORS:
                raise UserError(foreign.explain_dtype(self.folder, name, kind))
            counts[kind] += math.prod(self.stored_shape(name))
        return SAFETENSORS[counts.most_common(1)[0][0]] if counts else "fp32"

    def verify(self) -> None:
        """Check that the checkpoint has the table's tensors, each with its shape and dtype, and that the adapters fit.

        Raises UserError naming the tensors at fault.
        """
        entries, _ = table(self.shape), self.stored
        found = {name: self.stored_shape(name) for name in self.tensors if name not in self.published.used}
        found |= {entry.name: entry.shape for entry in self.published.entries if entry.name in self.published.stored}
        verify_tensors(self.folder, entries, found)
        for adapter in self.adapters:
            adapter.verify(entries, self.shape)


def verify_tensors(folder: Path, entries: Sequence[Entry], found: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError naming the tensors that are missing, unexpected or of the wrong shape.

    Layers beyond those of config.json are ignored, as in transformers: a trimmed model may keep their weights.
    """
    expected = {entry.name: entry for entry in entries}
    known = {_without_layer(name) for name in expected}
    extra = [name for name in found if name not in expected]
    unused = [name for name in extra if _without_layer(name) in known and _without_layer(name) != name]
    if unused:
        log.info("%d tensors belong to layers that config.json does not have, and are ignored", len(unused))
    missing = [name for name in expected if name not in found]
    wrong = [
        f"{name} is {list(found[name])}, expected {list(entry.shape)}"
        for name, entry in expected.items()
        if name in found and not _fits(found[name], entry.shape)
    ]
    unexpected = [name for name in extra if name not in unused]
    for fault, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{folder}: {len(names)} tensors {fault}: {'; '.join(names[:5])}{more}.")


def _without_layer(name: str) -> str:
    """A tensor's name with * in place of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a stored shape is the expected one, or has as many elements in a different number of axes."""
    return math.prod(found) == math.prod(expected) and (found == expected or len(found) != len(expected))


def _weight_map(path: Path) -> dict[str, str]:
    """An index's map of tensors to files. Raises UserError where it is not one."""
    found = Fields.of(path).within("weight_map")
    if not found.values:
        raise UserError(f"{path} has no weight_map object, which names the file of each tensor.")
    for name, file in found.values.items():
        if not isinstance(file, str) or not file:
            raise found.fault(name, "a file name")
    return found.values


def _refuse_missing_shards(paths: Sequence[Path]) -> None:
    """Raises UserError where the names of shards without an index say that some are missing, or mix two sets."""
    shards: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := SHARD.fullmatch(path.name):
            shards.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (name, count), there in shards.items():
        if missing := sorted(set(range(1, count + 1)) - there):
            raise UserError(
                f"{paths[0].parent} lacks {len(missing)} of {count} shards, the first of them "
                f"{name}-{missing[0]:05d}-of-{count:05d}.safetensors. Download them."
            )
