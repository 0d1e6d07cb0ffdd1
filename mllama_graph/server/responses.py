"""POST /v1/responses, stateless: input items to messages, and results as a response object or its events."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import Request
from mllama_graph.inputs.structured import FORMAT
from mllama_graph.model.fields import describe
from mllama_graph.server import fields, tools
from mllama_graph.server.answers import to_json
from mllama_graph.server.chat import Plain, Speaker, texts
from mllama_graph.server.errors import ApiError, refused
from mllama_graph.server.fields import Asked
from mllama_graph.server.jobs import Job
from mllama_graph.server.service import Service
from mllama_graph.server.tools import ToolUse
from mllama_graph.server.usage import usage_of

LOGPROBS = "message.output_text.logprobs"
# What needs a store of earlier responses, or an agent of the server's own.
REFUSED = ("previous_response_id", "conversation", "background", "prompt")
# Fields of the other endpoints. These are unknown here, and unknown fields are ignored.
FOREIGN = ("n", "best_of", "prompt_logprobs", "response_format", "stream_options")
# What is returned of a tool beside what was sent of it.
TOOL = {"description": None, "parameters": None, "strict": None}
MOST_METADATA, MOST_KEY_LETTERS, MOST_VALUE_LETTERS = 16, 64, 512


def job(service: Service, body: Mapping[str, Any]) -> Job:
    """The job of a response. Raises ApiError with the field."""
    for name in REFUSED:
        if body.get(name):
            raise refused(f"{name} is not supported: this server keeps nothing.", name, "unsupported_parameter")
    include = _checked(body, "include", list, "a list of texts") or []
    if not all(isinstance(one, str) for one in include):
        raise refused(f"include is {describe(include)}; it must be a list of texts.", "include")
    _check_metadata(_checked(body, "metadata", dict, "an object of texts") or {})
    # Nothing is obfuscated here, whatever include_obfuscation says.
    fields.flag(_checked(body, "stream_options", dict, "an object") or {}, "include_obfuscation")
    top = fields.whole(body, "top_logprobs", 0, fields.MOST_TOP_LOGPROBS)
    known = {name: value for name, value in body.items() if name not in FOREIGN}
    asked = fields.read(known, service.model(body), ("max_output_tokens",), top or 0 if LOGPROBS in include else None)
    shown = (_checked(body, "text", dict, "an object") or {}).get("format")
    if shown is not None:
        asked.fields[FORMAT] = _response_format(shown)
    chat = {**known, **asked.fields, "tools": _chat_tools(body.get("tools"))}
    use = tools.read(chat)
    if use:
        asked.fields.update(use.fields(chat))
    messages = messages_of(body.get("input"), body.get("instructions"))

    def prepare() -> list[Request]:
        service.check_text(sum(map(len, texts(messages))), "input")
        resolved = tools.one_call_each(service.pictures.resolved(messages))
        return [service.processor.request({**asked.of_request(), "messages": resolved})]

    return Job(asked, 1, prepare, lambda requests: Responses(service, body, asked, requests, use))


def _checked(body: Mapping[str, Any], name: str, kind: type, rule: str) -> Any:
    """A field of a type, or None. Raises ApiError for another type."""
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise refused(f"{name} is {describe(value)}; it must be {rule}.", name, "invalid_type")
    return value


def _check_metadata(given: Mapping[str, Any]) -> None:
    """Bound what is returned with each response, as OpenAI does."""
    if len(given) > MOST_METADATA:
        raise refused(f"metadata has {len(given)} entries; at most {MOST_METADATA} are taken.", "metadata")
    for key, value in given.items():
        if not isinstance(value, str):
            raise refused(f"metadata.{key[:MOST_KEY_LETTERS]} is {describe(value)}; it must be a text.", "metadata")
        if len(key) > MOST_KEY_LETTERS or len(value) > MOST_VALUE_LETTERS:
            rule = f"keys of at most {MOST_KEY_LETTERS} characters and texts of at most {MOST_VALUE_LETTERS}"
            raise refused(f"metadata.{key[:MOST_KEY_LETTERS]} is too long; metadata takes {rule}.", "metadata")


def _chat_tools(given: Any) -> Any:
    """Tools in the form of chats, where a function has an object of its own. What is no list is checked later."""
    if not isinstance(given, list):
        return given
    found = []
    for n, tool in enumerate(given):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = describe(tool.get("type") if isinstance(tool, dict) else tool)
            raise refused(f"tools[{n}] is {kind}; this server calls nothing itself, and takes functions only.", "tools")
        found.append({"type": "function", "function": {name: tool[name] for name in tool if name != "type"}})
    return found


def _response_format(shown: Any) -> Any:
    """text.format as a response_format: its schema stands beside the type there."""
    if isinstance(shown, dict) and shown.get("type") == "json_schema":
        if shown.get("schema") is None:
            raise refused("text.format.schema is missing; it must be a JSON schema.", "text.format", "missing_field")
        return {"type": "json_schema", "json_schema": {"schema": shown.get("schema")}}
    return shown


def messages_of(given: Any, instructions: Any) -> list[Any]:
    """The chat messages of `input` and `instructions`. Raises ApiError for items that can't be one."""
    if instructions is not None and not isinstance(instructions, str):
        raise refused(f"instructions is {describe(instructions)}; it must be a text.", "instructions")
    first = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*first, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise refused("input must be a text or a list of items.", "input", "missing_field")
    found: list[dict[str, Any]] = []
    for message in (_message(item, f"input[{n}]") for n, item in enumerate(given)):
        if found and found[-1].get("tool_calls") and message.get("tool_calls"):
            found[-1]["tool_calls"] += message["tool_calls"]
        else:
            found.append(message)
    return first + found


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise refused(f"{where} is {describe(item)}; it must be an item.", "input")
    kind = item.get("type", "message")
    if kind == "function_call":
        called = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": called}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind != "message":
        raise refused(f"{where} has type {describe(kind)}; it must be a message or a function call.", "input")
    return {"role": item.get("role"), "content": item.get("content")}


class Responses:
    """The form of responses: items, of which each is a message of text or a function call. `use`: tools, if any.

    The last of the items is open until the next one begins, or the response ends.
    """

    def __init__(
        self, service: Service, body: Mapping[str, Any], asked: Asked, requests: list[Request], use: ToolUse | None
    ):
        self._service, self._asked, self._requests, self._number = service, asked, requests, 0
        self._speaker: Speaker = use.speaker() if use else Plain()
        self._items: list[dict[str, Any]] = []
        self._result: Result | None = None
        # Without tools, the answer is one message, which is announced at once.
        self._plain = use is None
        sampling = requests[0].sampling
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "model": asked.model,
            "background": False,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": None,
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": fields.flag(body, "parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": None,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": asked.logprobs or 0,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "text": {"format": {"type": "text"}} | (body.get("text") or {}),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [TOOL | tool for tool in body.get("tools") or []],
            "truncation": "disabled",
            **{name: body.get(name) for name in ("user", "safety_identifier", "prompt_cache_key")},
        }

    def begin(self) -> bytes:
        """The events that open the response."""
        response = self._response("in_progress", [])
        events = self._event("response.created", response=response)
        events += self._event("response.in_progress", response=response)
        return events + (self._open(_message_item()) if self._plain else b"")

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of new text."""
        self._result = delta.result or self._result
        logprobs = [] if delta.logprobs is None else self._logprobs([delta.logprobs])
        parts = self._speaker.add(delta.text, delta.result is not None)
        events = []
        for part in parts or ([{"content": ""}] if logprobs else []):
            if "content" in part:
                events.append(self._text(part["content"], logprobs))
                logprobs = []
            for call in part.get("tool_calls", ()):
                events.append(self._call(call))
        return b"".join(events)

    def end(self) -> bytes:
        """The events that close the last item and the response."""
        assert self._result is not None
        status = _status(self._result)
        events = self._close(status) if self._items else self._open(_message_item()) + self._close(status)
        closing = "response.completed" if status == "completed" else "response.incomplete"
        return events + self._event(closing, response=self._finished(self._result))

    def failed(self, error: ApiError) -> bytes:
        told = {"code": error.code or "server_error", "message": error.message}
        response = self._response("failed", []) | {"error": told}
        return self._event("error", **told, param=error.param) + self._event("response.failed", response=response)

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """A response."""
        [result] = results
        self.delta(0, Delta(None, None, result.text, result))
        self.end()
        for item in self._items:
            if item["type"] == "message" and result.logprobs is not None:
                item["content"][0]["logprobs"] = self._logprobs(result.logprobs)
        return self._finished(result)

    def _finished(self, result: Result) -> dict[str, Any]:
        response = self._response(_status(result), self._items)
        response["completed_at"] = int(time.time()) if response["status"] == "completed" else None
        used = usage_of(self._requests, [result], 1)
        response["usage"] = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": used["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._head | {
            "status": status,
            "error": None,
            "incomplete_details": why,
            "output": output,
            "usage": None,
        }

    # ---- items

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        """The events of text: it goes on with the open message, or opens one."""
        events = b""
        if not self._items or self._items[-1]["type"] != "message":
            events = self._close("completed") + self._open(_message_item())
        part = self._items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        return events + self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _call(self, call: Mapping[str, Any]) -> bytes:
        """The events of a part of a tool call, in the form of chats; the part with the name opens an item."""
        events = b""
        if "id" in call:
            item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
            item |= {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
            events = self._close("completed") + self._open(item)
        if new := call["function"]["arguments"]:
            self._items[-1]["arguments"] += new
            events += self._item_event("response.function_call_arguments.delta", delta=new)
        return events

    def _open(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        parts = item.get("content")
        # A message is announced without its part, which has an event of its own.
        shown = item if parts is None else item | {"content": []}
        events = self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)
        if parts is not None:
            events += self._item_event("response.content_part.added", content_index=0, part=parts[0])
        return events

    def _close(self, status: str) -> bytes:
        """The events that close the last item, if there is one."""
        if not self._items:
            return b""
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            told = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            events = self._item_event("response.output_text.done", **told)
            events += self._item_event("response.content_part.done", content_index=0, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            events = self._item_event("response.function_call_arguments.done", **told)
        return events + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _logprobs(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ends, top = self._service.processor.eos, self._asked.logprobs or 0
        return [self._service.tokens.chat(entry, top) for entry in entries if entry["id"] not in ends]

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        data = to_json({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _message_item() -> dict[str, Any]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
    return item | {"content": [part]}


def _status(result: Result) -> str:
    return "incomplete" if result.finish_reason == "length" else "completed"
