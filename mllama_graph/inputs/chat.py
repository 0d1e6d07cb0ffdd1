"""Reads chat messages in the form of OpenAI's clients, and converts them to the form that chat templates expect."""

import json
from collections.abc import Mapping
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_sources import Source, part_source
from mllama_graph.inputs.template import ChatOptions
from mllama_graph.model.fields import describe

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
# Fields that stand for the content of an assistant's message.
INSTEAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
# Fields of a request that only a chat template can use.
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
# Variables of a template that are not for chat_template_kwargs: fields of the request, or fixed by the checkpoint.
OTHERS = ("messages", "chat_template", *TEMPLATE_FIELDS)


def read_message(message: dict[str, Any], sources: list[Source], where: str = "message") -> dict[str, Any]:
    """Convert a message from OpenAI's form to that of chat templates. Its images are appended to `sources`.

    Fields that are null are dropped, as in transformers. `where`: the message's place, such as "messages[1]".
    Raises UserError, with the field, for an unknown role or part and for a wrong type.
    """
    message = {name: value for name, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: role {describe(role)} is not one of {', '.join(ROLES)}.")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    if isinstance(content, str):
        return message
    if content is None and any(message.get(name) for name in INSTEAD):
        return message
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be a string or a list of parts, not {describe(content)}.")
    return {**message, "content": [_part(part, sources, f"{where}.content[{n}]") for n, part in enumerate(content)]}


def _part(part: Any, sources: list[Source], where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in IMAGE_PARTS:
        sources.append(part_source(part, len(sources) + 1))
        return {"type": "image"}
    name = "refusal" if kind == "refusal" else "text"
    if kind not in (*TEXT_PARTS, "refusal"):
        shown = f"has type {describe(kind)}" if isinstance(part, dict) else f"is {describe(part)}"
        raise UserError(f"{where} {shown}; it is neither a text nor an image part.")
    if not isinstance(part.get(name), str):
        raise UserError(f"{where}.{name} must be a string, not {describe(part.get(name))}.")
    return {"type": "text", "text": part[name]}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: clients send them as JSON text, templates write JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where} must be a list of objects, not {describe(calls)}.")
    return [{**call, **_called(call, f"{where}[{n}]")} for n, call in enumerate(calls)]


def _called(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a tool call to replace."""
    function = call.get("function")
    if function is None:
        return {}
    if not isinstance(function, dict):
        raise UserError(f"{where}.function must be an object, not {describe(function)}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}.function.arguments is not valid JSON: {str(error)[:100]}.") from error
    if not isinstance(function.get("name"), str):
        raise UserError(f"{where}.function.name must be a string, not {describe(function.get('name'))}.")
    return {"function": {**function, "arguments": arguments}} if "arguments" in function else {}


def read_messages(given: Any, sources: list[Source]) -> list[dict[str, Any]]:
    """Read the field `messages` of a request; the sources of its images are appended to `sources`, in order.

    Raises UserError for messages that are not valid or hold nothing to answer.
    """
    if not isinstance(given, list):
        raise UserError(f"messages must be a list of {{role, content}} objects, not {describe(given)}.")
    if not given:
        raise UserError("the request is empty: messages has no message.")
    messages = []
    for n, message in enumerate(given):
        if not isinstance(message, dict):
            raise UserError(f"messages[{n}] is {describe(message)}; it must be a message object.")
        messages.append(read_message(message, sources, f"messages[{n}]"))
    called = any(message.get(name) for message in messages for name in INSTEAD)
    if not (sources or called or any(text.strip() for message in messages for text in texts(message.get("content")))):
        raise UserError("the request is empty: its messages hold no text and no image.")
    return messages


def texts(content: Any) -> list[str]:
    """The texts of a message's content, after `read_message`."""
    if content is None or isinstance(content, str):
        return [content] if content else []
    return [part["text"] for part in content if part["type"] == "text"]


def read_chat_options(given: Mapping[str, Any]) -> ChatOptions:
    """Read the fields of a request that its chat template sees; they have the names of apply_chat_template's arguments.

    Raises UserError for a wrong type.
    """
    variables = given.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise UserError(f"chat_template_kwargs must be an object, not {describe(variables)}.")
    if taken := [name for name in OTHERS if name in (variables or {})]:
        raise UserError(f"chat_template_kwargs can't set {', '.join(taken)}; give tools and the like as fields.")
    continued = given.get("continue_final_message")
    if not isinstance(continued, bool | str | None):
        raise UserError(f"continue_final_message is {describe(continued)}; it must be true, false or a field's name.")
    start = given.get("add_generation_prompt")
    if not isinstance(start, bool | None):
        raise UserError(f"add_generation_prompt is {describe(start)}; it must be true or false.")
    if start and continued:
        raise UserError("add_generation_prompt starts a new message, continue_final_message goes on with the last one.")
    return ChatOptions(
        _objects(given.get("tools"), "tools"),
        _objects(given.get("documents"), "documents"),
        variables or {},
        not continued if start is None else start,
        "content" if continued is True else continued or "",
    )


def _objects(value: Any, name: str) -> list[dict[str, Any]] | None:
    if value is not None and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise UserError(f"{name} must be a list of objects, not {describe(value)}.")
    return value
