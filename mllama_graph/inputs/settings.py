"""Typed fields of a checkpoint's JSON files. No torch.

People edit these files, and other programs write them: a value of the wrong type is the user's error, named by its file
and field.
"""

import math
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import read_optional_json


def describe(value: Any) -> str:
    """A value as messages show it: short, on one line, and without looking into lists and objects."""
    if isinstance(value, (dict, list, tuple)):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    if isinstance(value, (str, int, float)):
        shown = repr(value[:60] if isinstance(value, str) else value)
        return shown if len(shown) <= 60 else shown[:40] + "..."
    return f"a {type(value).__name__}"


class Settings:
    """The fields of one JSON object. A field that is null counts as absent.

    `found`: whether the file exists. `values`: the object, where it is not a file of its own but the field `inside` of
    one. Every method raises UserError, with file and field, for a value of another type.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None, inside: str = ""):
        found = read_optional_json(path) if values is None else values
        self.path, self.found, self._inside = path, found is not None, inside
        self._values = found or {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def value(self, name: str) -> Any:
        """The field's value, unchecked; None where it is absent."""
        return self._values.get(name)

    def wrong(self, name: str, rule: str) -> UserError:
        """The error of a field that breaks a rule, such as "must be a number"."""
        return UserError(f"{self.path}: {self._inside}{name} is {describe(self.value(name))}; it {rule}.")

    def object(self, name: str) -> "Settings | None":
        """An object's fields, or None."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return None if value is None else Settings(self.path, value, f"{self._inside}{name}.")

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return default if value is None else value

    def count(self, name: str, default: int) -> int:
        """A whole number above 0."""
        value = self.value(name)
        if value is not None and (not _is_number(value) or value != int(value) or value < 1):
            raise self.wrong(name, "must be a whole number above 0")
        return default if value is None else int(value)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.value(name)
        if value is not None and not _is_number(value):
            raise self.wrong(name, "must be a number")
        return default if value is None else float(value)

    def vector(self, name: str, size: int, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of `size` finite numbers, or one number for all of them."""
        value = self.value(name)
        if value is None:
            return default
        if isinstance(value, list) and len(value) == size and all(map(_is_number, value)):
            return tuple(map(float, value))
        if not _is_number(value):
            raise self.wrong(name, f"must be a number or a list of {size} numbers")
        return (float(value),) * size

    def ids(self, name: str) -> frozenset[int]:
        """A token id or a list of them."""
        value = self.value(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int for id in ids):
            raise self.wrong(name, "must be a token id or a list of token ids")
        return frozenset(ids)

    def token(self, name: str) -> str | None:
        """A token's text, given as a string or as an object with its `content`."""
        value = self.value(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise self.wrong(name, "must be a token: a string, or an object with content")
        return text


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)
    )
