"""Finds tool calls in generated text, in the two forms of Llama 3.2.

JSON: {"name": "f", "parameters": {"x": 1}}, several separated by semicolons or in a list. Pythonic: [f(x=1), g()].
"""

import ast
import json
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

PYTHON_TAG = "<|python_tag|>"
NAMES, ARGUMENTS = ("name", "function"), ("parameters", "arguments")
# The beginning of a call, up to its arguments.
HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)')
BETWEEN = re.compile(r"[\s;,]*")
CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Call:
    """A tool call that begins. Its arguments, JSON text, follow as Arguments."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments of the latest call."""

    text: str


Piece = str | Call | Arguments


class Brackets:
    """Finds the end of a bracketed text that arrives in pieces: how deep it is nested, and whether in a string."""

    def __init__(self, quotes: str):
        self._quotes, self._depth, self._quote, self._escaped = quotes, 0, "", False

    def end(self, text: str, start: int) -> int:
        """The index behind the last bracket, or -1 if it has not come. `start`: where the text of this call begins."""
        for at in range(start, len(text)):
            character = text[at]
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = character == "\\"
                self._quote = "" if character == self._quote else self._quote
            elif character in self._quotes:
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return -1


class CallParser:
    """Splits a text that arrives in pieces into content and tool calls.

    Calls are taken at the beginning of a text only, and only those of the tools `names`. A call is given out once it
    is complete and valid; anything else is content. `certain`: a grammar guarantees that the text consists of calls in
    the JSON form, so that arguments are given out as they come.
    """

    def __init__(self, names: Collection[str], certain: bool = False):
        self._names, self._certain = names, certain
        self._text, self._at = "", 0
        # Of the group of brackets at `_at`: what finds its end, and up to where it has looked.
        self._brackets: Brackets | None = None
        self._looked = 0
        # Where the arguments of the present call have been given out to; None outside of one.
        self._sent: int | None = None
        self._free = False
        self.calls = 0

    def add(self, text: str, last: bool) -> list[Piece]:
        """The content and the calls that new text completes. `last`: no more text follows."""
        if self._free:
            return [text] if text else []
        self._text += text
        pieces: list[Piece] = []
        while not self._free and (found := self._next(last)):
            pieces += found
        if last and not self._free and self._sent is None:
            pieces += self._rest()
        return pieces

    def _next(self, last: bool) -> list[Piece]:
        """The pieces of the next call, or of the rest where no call follows; none while more text is needed."""
        if self._sent is not None:
            return self._more()
        at = self._skipped()
        if at == len(self._text) or (not self.calls and PYTHON_TAG.startswith(self._text[at:])):
            return []
        if self._text[at:].strip() == "[":
            return []
        if self._certain and (head := HEAD.match(self._text, at)):
            self._sent, self._looked, self._brackets = head.end(), head.end(), Brackets('"')
            self.calls += 1
            return [Call(head[1]), *self._more()]
        if not self._possible(at):
            return self._rest()
        if self._brackets is None:
            self._brackets, self._looked = Brackets('"' if self._json(at) else "\"'"), at
        end = self._brackets.end(self._text, self._looked)
        self._looked = len(self._text)
        if end < 0:
            return []
        calls = self._calls(self._text[at:end])
        if not calls:
            return self._rest()
        self._at, self._brackets = end, None
        self.calls += len(calls)
        return [piece for name, arguments in calls for piece in (Call(name), Arguments(arguments))]

    def _skipped(self) -> int:
        """Where the next call would begin."""
        if self.calls:
            between = BETWEEN.match(self._text, self._at)
            return between.end() if between else self._at
        text = self._text.lstrip()
        at = len(self._text) - len(text)
        return at + len(PYTHON_TAG) if text.startswith(PYTHON_TAG) else at

    def _more(self) -> list[Piece]:
        """The arguments that have come since the last ones."""
        assert self._sent is not None and self._brackets is not None
        begin, end = self._sent, self._brackets.end(self._text, self._looked)
        self._sent = self._looked = len(self._text)
        if end >= 0:
            # The object's own bracket follows the arguments.
            self._sent, self._brackets, self._at = None, None, end + 1
        new = self._text[begin : end if end >= 0 else None]
        return [Arguments(new)] if new else []

    def _rest(self) -> list[Piece]:
        """The rest of the text, which is content."""
        rest, self._free = self._text[self._at :], True
        if self.calls:
            # What remains between or after calls: separators, and the brace of a call that was given out already.
            rest = BETWEEN.sub("", rest, count=1)
        return [rest] if rest else []

    def _json(self, at: int) -> bool:
        return bool(re.match(r"\{|\[\s*\{", self._text[at : at + 100]))

    def _possible(self, at: int) -> bool:
        """Whether the text from `at` on may be a call, as far as it has come."""
        text = self._text[at:]
        if self._json(at):
            text = text.lstrip("[ \t\r\n")[1:].lstrip()
            if not text.startswith('"'):
                return not text
            try:
                key, end = scanstring(text, 1)
            except ValueError:
                return any(name.startswith(text[1:]) for name in ("type", *NAMES, *ARGUMENTS))
            value = re.match(r'\s*:\s*"([^"\\]*)"', text[end:])
            return key in ("type", *ARGUMENTS) or (key in NAMES and (value is None or value[1] in self._names))
        if not text.startswith("["):
            return False
        inner = text[1:].lstrip()
        name = re.match(r"[\w.]*", inner)
        assert name is not None
        if len(name[0]) == len(inner):
            return any(known.startswith(inner) for known in self._names)
        return name[0] in self._names and inner[len(name[0]) :].lstrip()[:1] in ("", "(")

    def _calls(self, text: str) -> list[tuple[str, str]]:
        """(name, arguments) of the calls in a text; none unless all of it is calls of known tools."""
        found = json_calls(text) if re.match(r"\{|\[\s*\{", text) else python_calls(text)
        return found if all(name in self._names for name, _ in found) else []


def json_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of a call in the JSON form, or of a list of calls; none if it is anything else."""
    try:
        given = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return []
    found = [_json_call(one) for one in (given if isinstance(given, list) else [given])]
    return [call for call in found if call] if all(found) else []


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _json_call(given: Any) -> tuple[str, str] | None:
    if not isinstance(given, dict):
        return None
    name = next((given[key] for key in NAMES if isinstance(given.get(key), str)), None)
    arguments = next((given[key] for key in ARGUMENTS if isinstance(given.get(key), dict)), None)
    if name is None or (arguments is None and any(key in given for key in ARGUMENTS)):
        return None
    return name, json.dumps(arguments or {}, ensure_ascii=False)


def python_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of the calls in a Python list; none if it is anything else."""
    try:
        with warnings.catch_warnings():
            # Of escapes that Python does not know.
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return []
        return [_python_call(node) for node in tree.elts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _python_call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a call with named arguments")
    arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _value(node: ast.expr) -> Any:
    """The JSON value of a literal. Raises ValueError for anything else."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    value = ast.literal_eval(node)
    if isinstance(value, str):
        # A lone surrogate, which \ud800 gives, is no text.
        value.encode()
    elif value is not None and not isinstance(value, int | float):
        raise ValueError("not a value of JSON")
    return value


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    if not isinstance(key, str):
        raise ValueError("not a key of JSON")
    return key
