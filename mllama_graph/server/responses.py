"""POST /v1/responses, stateless: input items to messages, and results as a response object or its events."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import Request
from mllama_graph.inputs.structured import FORMAT
from mllama_graph.model.fields import describe
from mllama_graph.server import fields
from mllama_graph.server.answers import to_json
from mllama_graph.server.chat import texts
from mllama_graph.server.errors import ApiError, refused
from mllama_graph.server.fields import Asked
from mllama_graph.server.jobs import Job
from mllama_graph.server.service import Service
from mllama_graph.server.usage import usage_of

# What needs a store of earlier responses, or an agent of the server's own.
REFUSED = ("previous_response_id", "conversation", "background", "prompt")


def job(service: Service, body: Mapping[str, Any]) -> Job:
    """The job of a response. Raises ApiError with the field."""
    for name in REFUSED:
        if body.get(name):
            raise refused(f"{name} is not supported: this server keeps nothing.", name, "unsupported_parameter")
    if body.get("tools"):
        raise refused("tools are taken by /v1/chat/completions.", "tools", "unsupported_parameter")
    asked = fields.read(body, service.model(body), ("max_output_tokens",), None)
    shown = (body.get("text") or {}).get("format") if isinstance(body.get("text"), dict | None) else body["text"]
    if shown is not None:
        asked.fields[FORMAT] = _response_format(shown)
    messages = messages_of(body.get("input"), body.get("instructions"))

    def prepare() -> list[Request]:
        service.check_text(sum(map(len, texts(messages))), "input")
        resolved = service.pictures.resolved(messages)
        return [service.processor.request({**asked.of_request(), "messages": resolved})]

    return Job(asked, 1, prepare, lambda requests: Responses(body, asked, requests))


def _response_format(shown: Any) -> Any:
    """text.format as a response_format: its schema stands beside the type there."""
    if isinstance(shown, dict) and shown.get("type") == "json_schema":
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
    return first + [_message(item, f"input[{n}]") for n, item in enumerate(given)]


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
    """The form of responses: one message of text."""

    def __init__(self, body: Mapping[str, Any], asked: Asked, requests: list[Request]):
        self._asked, self._requests = asked, requests
        self._item, self._text, self._number = f"msg_{uuid.uuid4().hex}", "", 0
        self._result: Result | None = None
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": asked.model,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": requests[0].sampling.temperature,
            "top_p": requests[0].sampling.top_p,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def begin(self) -> bytes:
        """The events that open the response, its message and its text."""
        response = self._response("in_progress", [])
        return b"".join(
            (
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event("response.output_item.added", output_index=0, item=self._message("in_progress", [])),
                self._text_event("response.content_part.added", part=_part("")),
            )
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """The event of new text."""
        self._text += delta.text
        self._result = delta.result or self._result
        if not delta.text:
            return b""
        return self._text_event("response.output_text.delta", delta=delta.text, logprobs=[])

    def end(self) -> bytes:
        """The events that close the text, its message and the response."""
        assert self._result is not None
        response = self.whole([self._result])
        closing = "response.completed" if response["status"] == "completed" else "response.incomplete"
        return b"".join(
            (
                self._text_event("response.output_text.done", text=self._text, logprobs=[]),
                self._text_event("response.content_part.done", part=_part(self._text)),
                self._event("response.output_item.done", output_index=0, item=response["output"][0]),
                self._event(closing, response=response),
            )
        )

    def failed(self, error: ApiError) -> bytes:
        told = {"code": error.code or "server_error", "message": error.message}
        response = self._response("failed", []) | {"error": told}
        return self._event("error", **told, param=error.param) + self._event("response.failed", response=response)

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """A response."""
        [result] = results
        status = "incomplete" if result.finish_reason == "length" else "completed"
        response = self._response(status, [self._message(status, [_part(result.text)])])
        used = usage_of(self._requests, results, 1)
        response["usage"] = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": used["prompt_tokens_details"]["cached_tokens"]},
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

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        data = to_json({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
