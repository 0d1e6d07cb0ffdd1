"""Renders chat templates as transformers does, and converts chat messages to the form that templates expect.

jinja2 runs the template, as it does in transformers; importing transformers itself would more than double the time of a
warm start.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_sources import Source, part_source
from mllama_graph.model.shape import read_optional_json

ROLES = ("system", "user", "assistant", "tool", "ipython")
IMAGE_PARTS = ("image", "image_url", "input_image")


class ChatTemplate:
    """A checkpoint's chat template. `tokens`: the special tokens that it may refer to, such as bos_token.

    Raises UserError for a template that is not valid.
    """

    def __init__(self, source: str, tokens: dict[str, Any]):
        self._tokens = tokens
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the checkpoint's chat template is not valid: {error}.") from error

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Render a chat as a prompt. Raises UserError where the template refuses the messages."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except jinja2.TemplateError as error:
            raise UserError(f"the checkpoint's chat template refuses these messages: {error}.") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """A checkpoint's chat template; of the three places where transformers has stored it, the newest comes first."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf8")
    source = (read_optional_json(folder / "chat_template.json") or {}).get("chat_template")
    source = source or tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source


def read_message(message: dict[str, Any], sources: list[Source]) -> dict[str, Any]:
    """Convert a message from OpenAI's form to that of chat templates. Its images are appended to `sources`.

    Raises UserError for an unknown role or part.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message role {role!r} is not one of system, user, assistant.")
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise UserError("message content must be a string or a list of parts.")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in IMAGE_PARTS:
            sources.append(part_source(part, len(sources) + 1))
            parts.append({"type": "image"})
        else:
            raise UserError(f"message part {str(part)[:80]} is neither a text nor an image part.")
    return {**message, "content": parts}


def texts(content: Any) -> list[str]:
    """The texts of a message's content, after `read_message`."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
