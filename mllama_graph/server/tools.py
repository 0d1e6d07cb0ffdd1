"""Tools of a chat completion: reads `tools` and `tool_choice`, and shows the calls of an answer."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllama_graph.inputs.structured import FORMAT, STRUCTURED, OwnGrammar, checked_schema, format_schema, schema_text
from mllama_graph.model.fields import describe
from mllama_graph.server import fields
from mllama_graph.server.calls import Arguments, Call, CallParser
from mllama_graph.server.errors import refused

NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
MOST_TOOLS = 128
# The most calls that a grammar lets an answer make.
MOST_CALLS = 8
# As Python writes JSON, and so as the model has seen arguments in training.
SPACED = {"item_separator": ", ", "key_separator": ": "}
# As a model may have begun to write them. One space or line's end at a time, so that no answer is filled with them.
LOOSE = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]?"}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """The JSON schema of a tool's parameters, and where errors say that it stands.

    strict: its arguments must be valid even where calls are not enforced.
    """

    schema: dict[str, Any]
    where: str
    strict: bool


@dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call, by name.

    enforced: the answer must consist of calls, one or, with `parallel`, several. reply: the schema of an answer without
    calls, where that is not free. strict: some tools are strict, and the answer has no other grammar.
    """

    tools: Mapping[str, Tool]
    enforced: bool
    parallel: bool
    reply: Any = None
    strict: bool = False

    def grammar(self) -> OwnGrammar:
        """The grammar of an answer that consists of calls, or else of the reply, in llguidance's variant of Lark."""
        calls, parts = [], {}
        for name, tool in self.tools.items():
            head = json.dumps(f'{{"name": "{name}", "parameters": ')
            parts[tool.where] = schema_text(tool.schema, tool.where, **SPACED)
            calls.append(f'{head} %json {parts[tool.where]} "}}"')
        more = f' ("; " call){{0,{MOST_CALLS - 1}}}' if self.parallel else ""
        reply = ""
        if self.reply is not None:
            parts[FORMAT] = schema_text(self.reply, FORMAT)
            reply = f" | %json {parts[FORMAT]}"
        made = OwnGrammar(f"start: call{more}{reply}\ncall: " + "\n    | ".join(calls) + "\n")
        made.parts = parts
        return made

    def begun(self) -> OwnGrammar:
        """The grammar of an answer that has begun with a call of a strict tool; any other answer is free.

        The model wrote the beginning freely: there may be a space or a line's end wherever JSON allows one.
        """
        calls, parts = [], {}
        for name, tool in self.tools.items():
            text = schema_text(tool.schema if tool.strict else {"type": "object"}, tool.where, **LOOSE)
            parts[tool.where] = text
            head = f'"{{" W "\\"name\\"" W ":" W {json.dumps(json.dumps(name))} W "," W'
            calls.append(f'{head} ("\\"parameters\\"" | "\\"arguments\\"") W ":" W %json {text} W "}}"')
        more = f' (W ";" W call){{0,{MOST_CALLS - 1}}}' if self.parallel else ""
        made = OwnGrammar(f"start: call{more}\ncall: " + "\n    | ".join(calls) + "\nW: /[ \\n]?/\n")
        made.parts = parts
        names = "|".join(re.escape(name) for name, tool in sorted(self.tools.items()) if tool.strict)
        made.begin = re.compile(rf'\{{\s*"name"\s*:\s*"(?:{names})"\s*,\s*"(?:parameters|arguments)"\s*:')
        return made

    def fields(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with which the model knows its tools, and calls them where that is required."""
        shown = {"tools": body["tools"]}
        if self.enforced or self.reply is not None:
            return shown | {FORMAT: None, STRUCTURED: {"grammar": self.grammar()}}
        return shown | {STRUCTURED: {"grammar": self.begun()}} if self.strict else shown

    def speaker(self) -> "Calls":
        """What shows one choice."""
        return Calls(CallParser(self.tools.keys(), self.enforced), MOST_TOOLS if self.parallel else 1)


def read(body: Mapping[str, Any]) -> ToolUse | None:
    """The tools that a body lets an answer call; None where it may call none. Raises ApiError or UserError."""
    tools = _tools(body.get("tools"))
    choice = body.get("tool_choice")
    parallel = fields.flag(body, "parallel_tool_calls", True)
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice, tools = _allowed(choice.get("allowed_tools", choice), tools)
    if not tools:
        raise refused("tool_choice needs tools. Give a list of functions.", "tool_choice")
    reply = None if body.get(FORMAT) is None else format_schema(body[FORMAT])
    reply = None if reply is None else checked_schema(reply, FORMAT)
    if choice in (None, "auto"):
        if body.get(STRUCTURED) is not None:
            return ToolUse(tools, False, parallel)
        return ToolUse(tools, False, parallel, reply, any(tool.strict for tool in tools.values()))
    if body.get(STRUCTURED) is not None or reply is not None:
        raise refused("tool_choice requires a call; the answer can't have another format, too.", "tool_choice")
    if choice == "required":
        return ToolUse(tools, True, parallel)
    name = _named(choice)
    if name not in tools:
        raise refused(f"tool_choice names {describe(name)}, which is not one of tools.", "tool_choice")
    return ToolUse({name: tools[name]}, True, False)


def _allowed(choice: Any, tools: dict[str, Tool]) -> tuple[Any, dict[str, Tool]]:
    """The mode of a choice among some tools, and these."""
    given = choice.get("tools") if isinstance(choice, dict) else None
    named = [_named(one) for one in given] if isinstance(given, list) else []
    if not named or any(name not in tools for name in named) or choice.get("mode") not in ("auto", "required"):
        raise refused("tool_choice: allowed_tools needs a mode, auto or required, and some of tools.", "tool_choice")
    return choice["mode"], {name: tools[name] for name in named}


def _named(choice: Any) -> Any:
    inner = choice.get("function", choice) if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(inner, dict):
        text = (
            f"tool_choice is {describe(choice)}; it must be none, auto, required, or an object that names a function."
        )
        raise refused(text, "tool_choice")
    return inner.get("name")


def _tools(given: Any) -> dict[str, Tool]:
    """The tools of a body by name."""
    if given is None:
        return {}
    if not isinstance(given, list):
        raise refused(f"tools is {describe(given)}; it must be a list of functions.", "tools")
    if len(given) > MOST_TOOLS:
        raise refused(f"tools has {len(given)} entries; at most {MOST_TOOLS} are taken.", "tools")
    found: dict[str, Tool] = {}
    for n, tool in enumerate(given):
        function = (
            tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        )
        if not isinstance(function, dict):
            raise refused(f'tools[{n}] must be an object {{"type": "function", "function": {{...}}}}.', "tools")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise refused(f"tools[{n}]: name {describe(name)} must be 1 to 64 letters, digits, dots, _ or -.", "tools")
        if name in found:
            raise refused(f"tools[{n}]: name {describe(name)} is used by an earlier tool.", "tools")
        strict, parameters, where = function.get("strict"), function.get("parameters"), f"tools[{n}]: parameters"
        if not isinstance(strict, bool | None):
            raise refused(f"tools[{n}]: strict is {describe(strict)}; it must be true or false.", "tools")
        schema = checked_schema(NO_PARAMETERS if parameters in (None, {}) else parameters, where)
        schema = schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}
        found[name] = Tool(schema, where, bool(strict))
    return found


class Calls:
    """Shows a choice that may call tools, of which the first `most` calls count."""

    def __init__(self, parser: CallParser, most: int):
        self._parser, self._most = parser, most

    def add(self, text: str, last: bool) -> list[dict[str, Any]]:
        """The `delta` objects that new text completes."""
        parts: list[dict[str, Any]] = []
        first = self._parser.calls
        for piece in self._parser.add(text, last):
            if isinstance(piece, Call):
                called = {"name": piece.name, "arguments": ""}
                call = {"index": first, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": called}
                parts.append({"tool_calls": [call]})
                first += 1
                if first > self._most:
                    parts.pop()
            elif isinstance(piece, Arguments):
                if first <= self._most:
                    parts.append({"tool_calls": [{"index": first - 1, "function": {"arguments": piece.text}}]})
            elif first <= self._most:
                parts.append({"content": piece})
        return parts

    def message(self, text: str) -> dict[str, Any]:
        """The message of a whole answer."""
        content, calls = "", []
        for part in self.add(text, True):
            content += part.get("content", "")
            for call in part.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: value for name, value in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        return {"content": content or (None if calls else ""), "refusal": None} | (
            {"tool_calls": calls} if calls else {}
        )

    def finish(self, reason: str) -> str:
        """The finish_reason to show."""
        return "tool_calls" if self._parser.calls and reason == "stop" else reason


def one_call_each(messages: Sequence[Any]) -> list[Any]:
    """Messages in which each assistant's message has at most one tool call, directly followed by its result.

    Llama 3.2's templates refuse several calls in one message.
    """
    found: list[Any] = []
    left = list(messages)
    while left:
        message = left.pop(0)
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if not isinstance(calls, list) or len(calls) < 2 or not all(isinstance(call, dict) for call in calls):
            found.append(message)
            continue
        count = next((n for n, one in enumerate(left) if not _is_result(one)), len(left))
        results, left = left[:count], left[count:]
        for n, call in enumerate(calls):
            found.append({**message, "content": message.get("content") if n == 0 else None, "tool_calls": [call]})
            own = [one for one in results if one.get("tool_call_id") == call.get("id")]
            found += own
            results = [one for one in results if one not in own]
        found += results
    return found


def _is_result(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("tool", "ipython")
