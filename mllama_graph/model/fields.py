"""Reads the fields of a JSON object by type. Errors name the file and the field."""

import math
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError

# The first bytes of the small text file that Git leaves in place of a large file (Git LFS specification, version 1).
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# The largest size that any field can have: an int32.
MOST = 2**31 - 1


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError if the file is a Git LFS pointer instead of the content it stands for."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent} "
                "(git lfs install first, if Git does not know lfs)."
            )


class Fields:
    """A JSON object of a configuration file. `where`: the file, and the path of the object inside of it.

    Every method returns its default where the field is absent, and raises UserError where its type is wrong.
    """

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def fault(self, name: str, rule: str) -> UserError:
        """The error for a field that breaks a rule."""
        return UserError(f"{self.where}: {name} is {_shown(self.values.get(name))}; it must be {rule}.")

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
        # A whole number of several hundred digits has no float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or math.isnan(value):
            raise self.fault(name, "a finite number")
        return float(value)

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
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise self.fault(name, "a list of whole numbers")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None


def _shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
