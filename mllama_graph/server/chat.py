"""POST /v1/chat/completions: messages to requests, and results in OpenAI's form, whole or streamed."""

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import Request
from mllama_graph.server import fields, tools
from mllama_graph.server.answers import DONE, event, text_json, to_json
from mllama_graph.server.errors import ApiError, refused
from mllama_graph.server.fields import Asked
from mllama_graph.server.jobs import Job, choices_of
from mllama_graph.server.service import Service
from mllama_graph.server.usage import usage_of

LIMITS = ("max_tokens", "max_completion_tokens")
# What would make an answer that this server can't give, with the remedy.
REFUSED = {
    "functions": "Give tools.",
    "function_call": "Give tool_choice.",
    "web_search_options": "This server calls nothing itself.",
}
TEMPLATE = ("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class Speaker(Protocol):
    """Turns one choice's text into parts of an assistant's message, such as content or tool calls."""

    def add(self, text: str, last: bool) -> list[dict[str, Any]]:
        """The `delta` objects that new text completes; `last`: no more text follows."""

    def message(self, text: str) -> dict[str, Any]:
        """The message of a whole answer, without its role."""

    def finish(self, reason: str) -> str:
        """The finish_reason to show, after the last text."""


class Plain:
    """A choice whose whole text is content."""

    def add(self, text: str, last: bool) -> list[dict[str, Any]]:
        return [{"content": text}] if text else []

    def message(self, text: str) -> dict[str, Any]:
        return {"content": text, "refusal": None}

    def finish(self, reason: str) -> str:
        return reason


def texts(messages: Any) -> list[str]:
    """The texts of messages whose form is not checked yet."""
    messages = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [text for text in (*contents, *(part.get("text") for part in parts)) if isinstance(text, str)]


def read(service: Service, body: Mapping[str, Any]) -> Asked:
    """Read the fields of a chat completion. Raises ApiError with the field."""
    if body.get("messages") is None:
        raise refused("messages is missing: give a list of {role, content} objects.", "messages", "missing_field")
    for name, remedy in REFUSED.items():
        if body.get(name) is not None:
            raise refused(f"{name} is not supported. {remedy}", name, "unsupported_parameter")
    if body.get("modalities") not in (None, ["text"]):
        raise refused('modalities must be ["text"]: the model generates texts only.', "modalities")
    service.check_text(sum(map(len, texts(body["messages"]))), "messages")
    show, top = fields.flag(body, "logprobs"), fields.whole(body, "top_logprobs", 0, fields.MOST_TOP_LOGPROBS)
    if top and not show:
        raise refused("top_logprobs needs logprobs=true.", "top_logprobs")
    asked = fields.read(body, service.model(body), LIMITS, (top or 0) if show else None)
    for name in TEMPLATE:
        if body.get(name) is not None and name != "tools":
            asked.fields[name] = body[name]
    if asked.fields.get("continue_final_message") and body.get("add_generation_prompt"):
        text = "add_generation_prompt starts a new message, continue_final_message goes on with the last one."
        raise refused(text, "add_generation_prompt")
    return asked


def job(service: Service, body: Mapping[str, Any]) -> Job:
    """The job of a chat completion. Raises ApiError with the field."""
    asked, use = read(service, body), tools.read(body)
    if use:
        asked.fields.update(use.fields(body))

    def prepare() -> list[Request]:
        messages = tools.one_call_each(service.pictures.resolved(body["messages"]))
        return choices_of(service.processor.request({**asked.of_request(), "messages": messages}), asked)

    return Job(
        asked, asked.choices, prepare, lambda requests: Chat(service, asked, requests, use.speaker if use else Plain)
    )


class Chat:
    """The form of chat completions. `speaker` makes what shows one choice."""

    def __init__(self, service: Service, asked: Asked, requests: list[Request], speaker: Callable[[], Speaker] = Plain):
        self._service, self._asked, self._requests = service, asked, requests
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._speakers = [speaker() for _ in requests]
        self._tokens = [0] * len(requests)
        self._results: list[Result] = []
        head = to_json(self._head | {"object": "chat.completion.chunk", "choices": []})
        # The constant parts of a content chunk: `{..."choices":[{"index":N,"delta":{"content":` TEXT `},...`.
        self._opening = [
            b"data: " + head.removesuffix(b"]}") + b'{"index":%d,"delta":{"content":' % n for n in range(len(requests))
        ]
        usage = b',"usage":null' if asked.usage else b""
        self._closing = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._plain = asked.logprobs is None and not asked.usage_always

    def begin(self) -> bytes:
        """A chunk with the role for each choice."""
        return b"".join(self._chunk(n, {"role": "assistant", "content": ""}) for n in range(len(self._requests)))

    def delta(self, index: int, delta: Delta) -> bytes:
        """The chunks of one token: of its text, and at the end of the finish reason."""
        self._tokens[index] += delta.token is not None
        if delta.result:
            self._results.append(delta.result)
        speaker, result = self._speakers[index], delta.result
        # Clients count chunks and measure the time between them: a token without text has one, too.
        always = result is None and isinstance(speaker, Plain)
        if always and self._plain:
            return self._opening[index] + text_json(delta.text) + self._closing
        parts = speaker.add(delta.text, result is not None)
        logprobs = self._logprobs(delta)
        if self._plain and not result and len(parts) == 1 and parts[0].keys() == {"content"}:
            return self._opening[index] + text_json(parts[0]["content"]) + self._closing
        if not parts and (logprobs or always):
            parts = [{"content": ""}]
        chunks = []
        for part in parts:
            chunks.append(self._chunk(index, part, logprobs))
            # Of the token that completed them: with the first part only.
            logprobs = None
        if result:
            chunks.append(self._chunk(index, {}, None, speaker.finish(result.finish_reason)))
        return b"".join(chunks)

    def end(self) -> bytes:
        """The chunk with the usage, if it was asked for, and the end of the stream."""
        if not self._asked.usage:
            return DONE
        usage = usage_of(self._requests, self._results, self._asked.choices)
        return event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """A chat completion."""
        choices = []
        for index, (result, speaker) in enumerate(zip(results, self._speakers)):
            message = {"role": "assistant", **speaker.message(result.text)}
            shown = {"content": self._shown(result.logprobs), "refusal": None} if result.logprobs is not None else None
            reason = speaker.finish(result.finish_reason)
            choices.append({"index": index, "message": message, "logprobs": shown, "finish_reason": reason})
        usage = usage_of(self._requests, results, self._asked.choices)
        prompt = self._service.tokens.prompt(results[0].prompt_logprobs, self._asked.prompt_logprobs)
        return self._head | {"choices": choices, "usage": usage, "system_fingerprint": None} | prompt

    def _chunk(self, index: int, part: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": part, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        if self._asked.usage_always:
            chunk["usage"] = usage_of(self._requests, [], self._asked.choices, sum(self._tokens))
        elif self._asked.usage:
            chunk["usage"] = None
        return event(chunk)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        shown = self._shown([delta.logprobs])
        return {"content": shown, "refusal": None} if shown else None

    def _shown(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of the tokens that are text: the end of a message is not, as in OpenAI's answers."""
        top, ends = self._asked.logprobs or 0, self._service.processor.eos
        ends = frozenset() if self._asked.fields.get("ignore_eos") else ends
        return [self._service.tokens.chat(entry, top) for entry in entries if entry["id"] not in ends]
