"""Reads the tensors of a .pth or .bin file, as torch.save writes them, without executing anything that it contains.

Such a file is a zip archive: data.pkl describes the tensors, and each storage is an uncompressed entry. The pickle is
read with a table of the few names that tensors need; any other name is refused, so that no code of the file can run.
Imports no torch.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import refuse_lfs_pointer

# Storage classes -> (dtype as in safetensors headers, bytes per element).
STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
# Size of a zip entry's local header without its name and extra field, and where their lengths stand in it.
LOCAL_HEADER, LOCAL_LENGTHS = 30, 26
NOT_READABLE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file. kind: dtype as in safetensors headers. key: its storage. start, stride: in elements."""

    kind: str
    width: int
    key: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last of this tensor."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride)) if prod(self.shape) else 0


class PthFile:
    """The tensors of a file by name. Raises UserError where it is not such a file or holds more than tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {info.filename: info for info in archive.infolist()}
                description = next((name for name in entries if name.endswith("data.pkl")), None)
                if description is None:
                    raise UserError(f"{path} can't be read: the archive has no data.pkl, which torch.save writes.")
                root = description.removesuffix("data.pkl")
                if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                    raise UserError(f"{path} can't be read: it was written on a big-endian machine.")
                with archive.open(description) as file:
                    content = _TensorUnpickler(file, path).load()
        except zipfile.BadZipFile as error:
            refuse_lfs_pointer(path)
            raise UserError(
                f"{path} can't be read: it is no zip archive, as torch.save has written since 1.6 ({error}). Download "
                "it again, or save it again with a newer torch."
            ) from error
        except NOT_READABLE as error:
            raise UserError(f"{path} can't be read: {type(error).__name__}: {error}.") from error
        # Training frameworks keep the weights one level down.
        for name in ("model", "state_dict", "module"):
            if isinstance(content, dict) and isinstance(content.get(name), dict):
                content = content[name]
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name.")
        self.tensors: dict[str, StoredTensor] = {
            str(name): tensor for name, tensor in content.items() if isinstance(tensor, StoredTensor)
        }
        self._root, self._entries = root, entries

    def storage(self, tensor: StoredTensor) -> np.ndarray:
        """The bytes from a tensor's first to its last element, mapped from the file, uint8 (span * width,).

        Raises UserError where the file is too short for them.
        """
        info = self._entries.get(f"{self._root}data/{tensor.key}")
        first, size = tensor.start * tensor.width, tensor.span * tensor.width
        if info is None or info.compress_type != zipfile.ZIP_STORED or first + size > info.file_size:
            raise UserError(f"{self.path} is damaged: storage {tensor.key} does not hold its tensors.")
        with self.path.open("rb") as file:
            file.seek(info.header_offset + LOCAL_LENGTHS)
            lengths = struct.unpack("<HH", file.read(4))
        offset = info.header_offset + LOCAL_HEADER + sum(lengths) + first
        # Copy on write: torch warns about memory that it can't write to.
        return np.memmap(self.path, np.uint8, "c", offset, (size,)) if size else np.empty(0, np.uint8)


class _TensorUnpickler(pickle.Unpickler):
    """Builds StoredTensors from a pickle, and refuses every name outside of its table."""

    def __init__(self, file: IO[bytes], path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        names: Mapping[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in names:
            raise UserError(
                f"{self._path} holds more than tensors: {module}.{name}. It is not unpickled, since that could run "
                "code. Save the tensors alone, as safetensors."
            )
        return names[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, int, str]:
        kind, (dtype, width), key = pid[0], pid[1], pid[2]
        if kind != "storage":
            raise ValueError(f"unknown persistent id {kind!r}")
        return dtype, width, str(key)


def _tensor(storage: tuple[str, int, str], start: int, shape: tuple, stride: tuple, *_: Any) -> StoredTensor:
    kind, width, key = storage
    if any(type(n) is not int or n < 0 for n in (start, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError("a tensor's shape or stride is not valid")
    return StoredTensor(kind, width, key, start, tuple(shape), tuple(stride))


def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor
