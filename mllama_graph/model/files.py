"""A checkpoint's files: location, dtype and shape of each tensor. Reads only headers, and imports no torch.

A checkpoint is a Hugging Face folder with config.json and safetensors, in one file or in shards with an index. The
weight names of both transformers generations are accepted.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import ModelShape, read_json, read_optional_json, shape_of
from mllama_graph.model.table import table

# Weight names of transformers >= 4.52 -> legacy names, which released checkpoints have and the table uses.
RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# Buffers that early conversions saved; here they are computed from config.json.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


class CheckpointFiles:
    """A checkpoint folder: the model's shape, and its tensors by legacy name.

    Raises UserError naming the file or tensor at fault if the folder is not an mllama checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shape: ModelShape = shape_of(read_json(folder / "config.json"))
        self._opened: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """State without open files; the process that unpickles it opens them itself."""
        return {"folder": self.folder, "shape": self.shape, "_opened": {}}

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Path]]:
        """Legacy tensor name -> (name in the file, file)."""
        index = read_optional_json(self.folder / "model.safetensors.index.json")
        if index is None:
            paths = sorted(self.folder.glob("*.safetensors"))
        elif isinstance(index.get("weight_map"), dict):
            paths = sorted({self.folder / file for file in index["weight_map"].values()})
        else:
            raise UserError(f"{self.folder / 'model.safetensors.index.json'} has no weight_map object.")
        if not paths:
            raise UserError(f"{self.folder} holds no .safetensors file. Convert the checkpoint to safetensors.")
        found: dict[str, tuple[str, Path]] = {}
        for path in paths:
            names: list[str] = self._open(path).keys()
            for name in names:
                legacy = legacy_name(name)
                if legacy in found:
                    raise UserError(f"{name} is in {found[legacy][1].name} and again in {path.name}.")
                if not legacy.endswith(IGNORED_SUFFIX):
                    found[legacy] = (name, path)
        return found

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            if not path.is_file():
                raise UserError(f"{path} is named in the index but missing.")
            try:
                self._opened[path] = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} can't be read as safetensors: {error}.") from error
        return self._opened[path]

    def _header(self, name: str) -> Any:
        """The header entry (shape and dtype) of a tensor, by its legacy name."""
        stored, path = self.tensors[name]
        return self._open(path).get_slice(stored)

    @cached_property
    def stored(self) -> str:
        """The dtype of the stored weights: fp32, fp16 or bf16. Raises UserError for any other."""
        name = next(iter(self.tensors))
        kind = self._header(name).get_dtype()
        if kind not in SAFETENSORS:
            raise UserError(f"{name} is stored as {kind}; supported are {', '.join(SAFETENSORS)}.")
        return SAFETENSORS[kind]

    def verify(self) -> None:
        """Check that the checkpoint has exactly the table's tensors, each with its shape.

        Raises UserError naming the tensors at fault.
        """
        expected = {entry.name: entry for entry in table(self.shape)}
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in expected]
        shapes = [(name, tuple(self._header(name).get_shape())) for name in expected if name in self.tensors]
        wrong = [
            f"{name} is {list(found)}, expected {list(expected[name].shape)}"
            for name, found in shapes
            if not _fits(found, expected[name].shape)
        ]
        for fault, names in (("missing", missing), ("unexpected", extra), ("of the wrong shape", wrong)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise UserError(f"{self.folder}: {len(names)} tensors {fault}: {'; '.join(names[:5])}{more}.")


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a stored shape is the expected one, or has as many elements in a different number of axes."""
    return math.prod(found) == math.prod(expected) and (found == expected or len(found) != len(expected))


def legacy_name(name: str) -> str:
    """The legacy form of a tensor's name."""
    for new, legacy in RENAMES:
        if name.startswith(new):
            return legacy + name[len(new) :]
    return name
