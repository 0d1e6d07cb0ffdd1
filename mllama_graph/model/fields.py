"""Reads a checkpoint's JSON files, and their fields by type. Errors name the file and the field. No torch."""

import json
import reprlib
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError

# The first bytes of the small text file that Git leaves in place of a large file (Git LFS specification, version 1).
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# The largest size that any field can have: an int32.
MOST = 2**31 - 1
# The bound of all other numbers: they are used in fp32.
LARGEST = 1e30


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError if the file is a Git LFS pointer instead of the content it stands for."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent} "
                "(git lfs install first, if Git does not know lfs)."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming the file if it is missing or holds no JSON object."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Give a Hugging Face checkpoint folder.")
    try:
        # Editors on Windows begin UTF-8 files with a byte order mark.
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: byte {error.start} is not UTF-8. Save it as UTF-8.") from error
    except (ValueError, OSError, RecursionError) as error:
        if path.is_file():
            refuse_lfs_pointer(path)
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


class Fields:
    """A JSON object of a configuration file. `where`: the file, and the path of the object inside of it.

    Every method returns its default where the field is absent, and raises UserError where its type is wrong.
    """

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    @classmethod
    def of(cls, path: Path) -> "Fields":
        """The fields of a file; none where there is no such file."""
        return cls(read_json(path) if path.is_file() else {}, str(path))

    def fault(self, name: str, rule: str) -> UserError:
        """The error for a field that breaks a rule."""
        return UserError(f"{self.where}: {name} is {describe(self.values.get(name))}; it must be {rule}.")

    def within(self, name: str) -> "Fields":
        """The object in a field; empty where it is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.fault(name, "an object")
        return Fields(value or {}, f"{self.where}: {name}")

    def integer(self, name: str, default: int, least: int | None = None, most: int = MOST) -> int:
        """A whole number from `least` to `most`; 128.0 counts as one."""
        if name not in self.values:
            return default
        value = self.values[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(name, "a whole number")
        if least is not None and value < least:
            raise self.fault(name, f"at least {least}")
        if value > most:
            raise self.fault(name, f"at most {most}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        if name not in self.values:
            return default
        value = self.values[name]
        if not _is_number(value):
            raise self.fault(name, "a finite number")
        return float(value)

    def numbers(self, name: str, size: int, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of `size` finite numbers, or one number for all of them."""
        if name not in self.values:
            return default
        value = self.values[name]
        found = value if isinstance(value, list) else [value] * size
        if len(found) != size or not all(map(_is_number, found)):
            raise self.fault(name, f"a finite number or a list of {size}")
        return tuple(map(float, found))

    def flag(self, name: str, default: bool) -> bool:
        """true or false; null counts as false."""
        value = self.values.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.fault(name, "true or false")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.fault(name, "a string")
        return value

    def integers(self, name: str) -> list[int] | None:
        """A list of whole numbers; None where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise self.fault(name, "a list of whole numbers")
        return value

    def ids(self, name: str) -> frozenset[int]:
        """A token id or a list of them; empty where it is absent or null."""
        value = self.values.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(id) is not int for id in found):
            raise self.fault(name, "a token id or a list of token ids")
        return frozenset(found)

    def token(self, name: str) -> str | None:
        """A token's text, given as a string or as an object with its `content`; None where it is absent or null."""
        value = self.values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise self.fault(name, "a token: a string, or an object with content")
        return text

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None


def _is_number(value: Any) -> bool:
    # NaN is not below any number.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def describe(value: Any) -> str:
    """A value as errors show it: as JSON writes it, on one line, and shortened without reading all of it."""
    text = _Short().repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Short(reprlib.Repr):
    def repr1(self, x: Any, level: int) -> str:
        if x is None or isinstance(x, bool):
            return json.dumps(x)
        # Python refuses to write a number of more than 4300 digits.
        if isinstance(x, int) and abs(x) >= 10**20:
            return "a number of more than 20 digits"
        return super().repr1(x, level) if isinstance(x, (str, int, float, list, dict)) else f"a {type(x).__name__}"
