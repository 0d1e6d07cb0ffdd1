"""Finds a checkpoint's chat template and renders it as transformers does. Does not import torch.

Templates are run by jinja2, as in transformers. transformers itself is not used, since importing it would more than
double the time of a warm start.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.tiktoken import IMAGE
from mllama_graph.model.fields import Fields

# Where transformers looks for templates, in its order: three files of the processor, then the tokenizer's. The folder
# `EXTRA` holds further templates, which belong to chat_template.jinja.
PLACES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
EXTRA = "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
# The fields in which messages carry reasoning; templates read one of the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Put after the text of a message to continue, to find where the text ends in the prompt. If the mark's final space is
# missing there, the template trims messages.
END_MARK = "<END-OF-THE-MESSAGE-TO-CONTINUE> "
# What a probe puts into a message: its text, and the value of a further field in its text part.
TEXT, BESIDE = "probed text", "probed-field"

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatOptions:
    """What a request gives to the chat template besides messages; named as the arguments of apply_chat_template.

    variables: chat_template_kwargs; they override special tokens of the same name. continue_final_message: the field of
    the last message (such as "content") whose text the answer continues, or "" to start a new message.
    """

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: str = ""


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's text for training; here it renders just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A chat template. `tokens`: the special tokens that it can use, by name, such as bos_token.

    Raises UserError for a template that is not valid.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        self._source, self._tokens = source, tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # jinja2 also passes on Python's own errors, such as RecursionError
            raise UserError(f"the checkpoint's chat template is not valid: {_reason(error)}.") from error

    def prompt(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Render a chat as a prompt. Content is converted to the form (string or parts) that the template takes.

        Raises UserError if the template refuses the messages, or leaves out the text that the answer must continue.
        """
        messages = self._shaped([_with_reasoning(message) for message in messages], options)
        if not options.continue_final_message:
            return self._render(messages, options)
        messages[-1], text = _marked(messages[-1], options.continue_final_message)
        rendered = self._render(messages, options)
        end = rendered.rfind(END_MARK.strip())
        if end < 0 or text.strip() not in rendered:
            raise UserError("continue_final_message: the chat template does not show the text of the last message.")
        kept = rendered[end : end + len(END_MARK)] == END_MARK
        return rendered[:end] if kept else rendered[:end].rstrip()

    def _render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=options.tools,
                documents=options.documents,
                add_generation_prompt=options.add_generation_prompt,
                **{**self._tokens, **options.variables},
            )
        except Exception as error:  # a template runs code: it can raise anything
            raise UserError(f"the checkpoint's chat template refuses these messages: {_reason(error)}.") from error

    # ---- forms of content

    def _shaped(self, messages: Sequence[Message], options: ChatOptions) -> list[Message]:
        """The messages with content in the form that the template takes, and with roles that the template knows."""
        if "developer" not in self._source:
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        if options.tools is None and options.documents is None and not options.variables:
            forms = self._plain_forms
        else:
            # With tools, a template may take another form than without; and it may need the request's variables to run.
            forms = self._forms({message["role"] for message in messages}, options)
        return [_in_form(message, forms[message["role"]]) for message in messages]

    @cached_property
    def _plain_forms(self) -> dict[str, str | None]:
        """The forms for requests that give the template nothing but messages."""
        return self._forms({"user", "system", "developer", "assistant", "tool", "ipython"}, ChatOptions())

    def _forms(self, roles: set[str], options: ChatOptions) -> dict[str, str | None]:
        """The form of content that each role takes: "text", "parts", "both", or None if probing can't tell."""
        user = self._form("user", None, options)
        return {role: user if role == "user" else self._form(role, user, options) for role in roles}

    def _form(self, role: str, user: str | None, options: ChatOptions) -> str | None:
        """Find the form that one role takes by rendering a probe in each form. `user`: the form of the role user."""
        texts = self._probe(role, TEXT, user, options)
        parts = self._probe(role, [{"type": "text", "text": TEXT, "beside": BESIDE}], user, options)
        takes_text = TEXT in texts
        # A template that expects a string prints the list as Python shows it, with all fields of the part.
        takes_parts = TEXT in parts and not (f"'{BESIDE}'" in parts and takes_text)
        return {(True, True): "both", (True, False): "text", (False, True): "parts"}.get((takes_text, takes_parts))

    def _probe(self, role: str, content: Any, user: str | None, options: ChatOptions) -> str:
        """Render a chat that has a message with this role and content; "" if the template refuses it."""
        asked = {"role": "user", "content": [{"type": "text", "text": "hi"}] if user == "parts" else "hi"}
        probed = {"role": role, "content": content}
        call = {"type": "function", "id": "call_0", "function": {"name": "probe", "arguments": {}}}
        chats: dict[str, list[Message]] = {
            "user": [probed],
            "assistant": [asked, probed],
            "tool": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, probed | {"name": "probe"}],
        }
        chats["ipython"] = chats["tool"]
        try:
            return self._render(chats.get(role, [probed, asked]), options)
        except UserError:
            return ""


def _in_form(message: Message, form: str | None) -> Message:
    content = message.get("content")
    if form == "text" and isinstance(content, list):
        return {**message, "content": as_text(content)}
    if form == "parts" and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def as_text(content: Sequence[Mapping[str, Any]]) -> str:
    """Join parts into one string: each image becomes <|image|>, and two texts in a row are separated by a newline."""
    pieces, previous = [], None
    for part in content:
        if part["type"] == previous == "text":
            pieces.append("\n")
        previous = part["type"]
        pieces.append(part["text"] if previous == "text" else IMAGE)
    return "".join(pieces)


def _marked(message: Message, name: str) -> tuple[Message, str]:
    """The message with END_MARK after its text, and the text without it. `name`: the field that holds the text."""
    value = message.get(name)
    if isinstance(value, str):
        # The same reasoning is in several fields; all must carry the mark, since the template may read any of them.
        names = [other for other in REASONING if message.get(other) == value] if name in REASONING else [name]
        return {**message, **dict.fromkeys(names, value + END_MARK)}, value
    parts = value if isinstance(value, list) else []
    for at, part in reversed([*enumerate(parts)]):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            marked = {**part, "text": part["text"] + END_MARK}
            return {**message, name: [*parts[:at], marked, *parts[at + 1 :]]}, part["text"]
    raise UserError(f"continue_final_message: the last message has no text in {name} to continue.")


def _with_reasoning(message: Message) -> Message:
    """The message; if it has reasoning, under both names that templates read."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson. jinja2's own would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    """An exception's message in one line, without memory addresses."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split())) or type(error).__name__
    return text[:300].rstrip(".")


# ---- files


def find_templates(folder: Path, processor_config: Fields, tokenizer_config: Fields) -> tuple[dict[str, str], str]:
    """A checkpoint's chat templates by name, and a note for the user ("" if there is nothing to say).

    The first of `PLACES` that holds templates is used, as in transformers' processors. Raises UserError for files that
    can't be read.
    """
    found: dict[str, dict[str, str]] = {}
    for place in PLACES:
        if place == "chat_template.jinja":
            found[place] = _jinja_files(folder)
        elif place.endswith("_config.json"):
            found[place] = _named(processor_config if place.startswith("processor") else tokenizer_config)
        else:
            found[place] = _named(Fields.of(folder / place))
    used = [place for place in PLACES if found[place]]
    if not used:
        return {}, (
            f"{folder} has no chat template ({', '.join(PLACES)}): prompts are completed as plain text, "
            "and the roles of messages are dropped."
        )
    templates = found[used[0]]
    if DEFAULT not in templates:
        names = ", ".join(sorted(templates))[:100]
        return templates, (
            f"{folder} has chat templates ({names}), but none is named {DEFAULT}: prompts "
            f"{'without tools ' if TOOL_USE in templates else ''}are completed as plain text, "
            "and the roles of messages are dropped."
        )
    others = [place for place in used[1:] if found[place].get(DEFAULT) not in (None, templates[DEFAULT])]
    note = f"the chat template is that of {used[0]}; {', '.join(others)} in the same folder differs." if others else ""
    return templates, note


def _named(given: Fields) -> dict[str, str]:
    """Templates by name in the field chat_template: a string, {name: template}, or [{"name": ..., "template": ...}]."""
    value = given.values.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if value is None or isinstance(value, str):
        return {DEFAULT: value} if value else {}
    if isinstance(value, dict) and all(isinstance(text, str) for entry in value.items() for text in entry):
        return value
    raise given.fault("chat_template", "a template, or templates with their names")


def _jinja_files(folder: Path) -> dict[str, str]:
    """Templates by name that are stored as .jinja files."""
    paths = {path.stem: path for path in sorted((folder / EXTRA).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths[DEFAULT] = folder / "chat_template.jinja"
    try:
        texts = {name: path.read_text(encoding="utf8") for name, path in paths.items()}
    except (OSError, UnicodeError) as error:
        raise UserError(f"a chat template in {folder} can't be read: {error}.") from error
    return {name: text for name, text in texts.items() if text}
