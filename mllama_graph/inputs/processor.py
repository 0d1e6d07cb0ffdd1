"""From what a person writes to token ids and tiles, and back to text. No torch.

The tokenizer and the chat template are run by `tokenizers` and `jinja2`, the libraries that transformers uses for
them; importing transformers itself would more than double the time to a warm start.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mllama_graph.core.config import UserError
from mllama_graph.inputs.images import Tiles, error_text, list_images, open_image, shorten, tile_image
from mllama_graph.engine.scheduler import Sampling
from mllama_graph.model.shape import ModelShape, read_json

# CLIP's, which every released checkpoint uses (llama_models image_transform.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE = "<|image|>"
# Stands for bytes that are no character. The last one of a text may still become one; those before it will not.
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Request:
    """A request, ready for the engine. `positions` are those of the image tokens, one an image."""

    id: Any
    ids: tuple[int, ...]
    images: tuple[Tiles, ...]
    positions: tuple[int, ...]
    max_new: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Defaults:
    """What a request takes where it says nothing of its own."""

    max_new: int
    max_input: int
    sampling: Sampling = field(default_factory=Sampling)


class PlainIds:
    """Stands in where there is no tokenizer (weights=random without a checkpoint): bytes in, bracketed ids out."""

    def encode(self, text: str, add_special_tokens: bool = False):
        return type("Encoding", (), {"ids": list(text.encode())})()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"<{id}>" for id in ids)

    def token_to_id(self, token: str) -> Optional[int]:
        return None


class Processor:
    """Tokenizer, chat template and image preparation of one checkpoint (or of none: `folder` None).

    Raises UserError for files that are missing or at odds with the model.
    """

    def __init__(self, folder: Optional[Path], shape: ModelShape, defaults: Defaults):
        self.shape, self.defaults = shape, defaults
        config = read_json(folder / "config.json") if folder else {}
        generation = (read_json(folder / "generation_config.json", needed=False) or {}) if folder else {}
        tokenizer_config = (read_json(folder / "tokenizer_config.json", needed=False) or {}) if folder else {}
        self.tokenizer = _tokenizer(folder) if folder else PlainIds()
        self.image_config = _image_config(folder, shape) if folder else {}
        text_config = config.get("text_config") or {}
        eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        self.bos_token = _token_text(tokenizer_config.get("bos_token")) or "<|begin_of_text|>"
        self.bos = self.tokenizer.token_to_id(self.bos_token)
        if self.bos is None:
            self.bos = text_config.get("bos_token_id")
        self.tokens_of_template = {
            name: _token_text(value) for name, value in tokenizer_config.items()
            if name.endswith("_token") and _token_text(value) is not None} | {"bos_token": self.bos_token}
        source = _template_source(folder, tokenizer_config) if folder else None
        self.template = _compile_template(source) if source else None

    # ---- requests

    def chat(self, id: Any, prompt: str, images: Sequence[str] = (), system: Optional[str] = None, **options: Any
             ) -> Request:
        """A request from a prompt: through the chat template, its images first."""
        content = [{"type": "image", "image": source} for source in images] + [{"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": system}] if system else []
        return self.request({"id": id, "messages": [*messages, {"role": "user", "content": content}], **options})

    def request(self, given: dict[str, Any], base: Path = Path(".")) -> Request:
        """A request from one line of a requests file; relative image paths also count from `base`.

        Raises UserError naming what is wrong with it.
        """
        kinds = [kind for kind in ("messages", "prompt", "input_ids") if given.get(kind) is not None]
        if len(kinds) != 1:
            raise UserError(f"a request needs exactly one of messages, prompt, input_ids; this has "
                            f"{', '.join(kinds) or 'none'}.")
        if kinds == ["messages"]:
            if given.get("images"):
                raise UserError("images beside messages: put them into the messages as image parts.")
            ids, sources = self._messages(given["messages"])
        else:
            sources = _image_list(given.get("images"))
            ids = self._prompt(given["prompt"], sources) if kinds == ["prompt"] else self._ids(given["input_ids"])
        positions = tuple(at for at, id in enumerate(ids) if id == self.shape.image_token)
        if len(positions) != len(sources):
            raise UserError(f"{len(positions)} {IMAGE} tokens for {len(sources)} images; each image needs one token.")
        if len(ids) > self.defaults.max_input:
            raise UserError(f"the prompt has {len(ids)} ids, max_input_length={self.defaults.max_input}. "
                            f"Shorten it or raise max_input_length.")
        options = _options(given, self.defaults)
        tiles = tuple(tile_image(open_image(_resolve(source, base)), self.shape.vision) for source in sources)
        return Request(given.get("id"), tuple(ids), tiles, positions, **options)

    def _ids(self, given: Any) -> list[int]:
        if not isinstance(given, list) or not all(type(id) is int for id in given):
            raise UserError("input_ids must be a list of whole numbers.")
        if not given:
            raise UserError("the request is empty: input_ids has no ids.")
        if wrong := [id for id in given if not 0 <= id < self.shape.embeddings]:
            raise UserError(f"input_ids holds {wrong[0]}; ids run from 0 to {self.shape.embeddings - 1}.")
        return given

    def _prompt(self, prompt: Any, sources: Sequence[str]) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(f"prompt must be a string, not {type(prompt).__name__}.")
        if not prompt.strip():
            raise UserError("the request is empty: prompt has no text.")
        if self.template is None:
            return self._without_template(prompt, len(sources))
        content = [{"type": "image"}] * len(sources) + [{"type": "text", "text": prompt}]
        return self._render([{"role": "user", "content": content}])

    def _messages(self, messages: Any) -> tuple[list[int], list[str]]:
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise UserError("the request is empty: messages must be a list of at least one message object.")
        sources: list[str] = []
        plain = [_message(message, sources) for message in messages]
        texts = [part for message in plain for part in _texts(message["content"])]
        if not any(text.strip() for text in texts):
            raise UserError("the request is empty: its messages hold no text.")
        if self.template is None:
            return self._without_template("\n".join(texts), len(sources)), sources
        return self._render(plain), sources

    def _without_template(self, text: str, images: int) -> list[int]:
        """A checkpoint without a chat template gets BOS, image tokens, text."""
        start = [] if self.bos is None else [self.bos]
        return start + [self.shape.image_token] * images + self.tokenizer.encode(text, add_special_tokens=False).ids

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        try:
            text = self.template.render(messages=messages, add_generation_prompt=True, **self.tokens_of_template)
        except jinja2.TemplateError as error:
            raise UserError(f"the checkpoint's chat template refuses these messages: {error}.") from error
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class Detokenizer:
    """Turns one request's ids into text as they come, and looks for its stop strings.

    Text that may still change is held back: half a character, or the start of a stop string.
    """

    def __init__(self, processor: Processor, stop: Sequence[str]):
        self._processor, self._stop = processor, tuple(stop)
        # Ids since the last whole character, and how much of their text is taken already.
        self._pending: list[int] = []
        self._taken = 0
        self._text, self._sent = "", 0
        self.stopped = False

    def add(self, id: int) -> str:
        """The text that became certain with this id. Sets `stopped` once a stop string is complete."""
        self._pending.append(id)
        piece = self._processor.text(self._pending)
        whole = not piece.endswith(REPLACEMENT)
        self._take(piece if whole else piece[:-1])
        if whole:
            self._pending, self._taken = [], 0
        found = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[:min(found)]
            return self._send(len(self._text))
        held = max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
        return self._send(len(self._text) - held)

    def flush(self) -> str:
        """What was held back, once no id will follow."""
        if not self.stopped:
            self._take(self._processor.text(self._pending))
        return self._send(len(self._text))

    @property
    def text(self) -> str:
        """All text so far, without the stop string; complete after `flush`."""
        return self._text

    def _take(self, piece: str) -> None:
        self._text += piece[self._taken:]
        self._taken = max(self._taken, len(piece))

    def _send(self, upto: int) -> str:
        delta = self._text[self._sent:upto]
        self._sent = max(self._sent, upto)
        return delta


# ---- reading a checkpoint's files


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing. Copy tokenizer.json into the checkpoint folder.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} can't be read: {error}.") from error


def _token_text(value: Any) -> Optional[str]:
    return value.get("content") if isinstance(value, dict) else value


def _template_source(folder: Path, tokenizer_config: dict[str, Any]) -> Optional[str]:
    """The chat template, from the newest of the three places that transformers has kept it in."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf8")
    source = (read_json(folder / "chat_template.json", needed=False) or {}).get("chat_template")
    source = source or tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source


def _compile_template(source: str) -> jinja2.Template:
    """The environment that transformers gives chat templates (transformers utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the checkpoint's chat template is not valid: {error}.") from error


def _image_config(folder: Path, shape: ModelShape) -> dict[str, Any]:
    """preprocessor_config.json, or the image part of processor_config.json that newer transformers write."""
    config = read_json(folder / "preprocessor_config.json", needed=False)
    if config is None:
        config = (read_json(folder / "processor_config.json", needed=False) or {}).get("image_processor") or {}
    tile = (config.get("size") or {}).get("height", shape.vision.tile)
    tiles = config.get("max_image_tiles", shape.vision.max_tiles)
    if (tile, tiles) != (shape.vision.tile, shape.vision.max_tiles):
        raise UserError(f"preprocessor_config.json cuts up to {tiles} tiles of {tile} px, config.json says "
                        f"{shape.vision.max_tiles} of {shape.vision.tile} px. The two files belong to different models.")
    return config


# ---- reading a request


def _message(message: dict[str, Any], sources: list[str]) -> dict[str, Any]:
    """A message as chat templates take it; its images' sources are appended to `sources`."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool", "ipython"):
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
        elif kind in ("image", "image_url", "input_image"):
            sources.append(_source(part))
            parts.append({"type": "image"})
        else:
            raise UserError(f"message part {str(part)[:80]} is neither a text nor an image part.")
    return {**message, "content": parts}


def _source(part: dict[str, Any]) -> str:
    value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
    value = value.get("url") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise UserError("an image part needs its file path or data: URI in image_url.url.")
    return value


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _image_list(given: Any) -> list[str]:
    if given is not None and not (isinstance(given, str) or (
            isinstance(given, list) and all(isinstance(source, str) for source in given))):
        raise UserError("images must be a list of file paths or data: URIs.")
    return list_images(given)


def _resolve(source: str, base: Path) -> str:
    """A path as given, or from the requests file's folder where that is where it exists."""
    if source.startswith("data:"):
        return source
    if source.startswith(("http://", "https://")):
        raise UserError(f"image {shorten(source)} is a web address; give a file path or a data: URI.")
    path = source.removeprefix("file://")
    try:
        return str(base / path) if not Path(path).exists() and (base / path).exists() else path
    except (OSError, ValueError) as error:
        raise UserError(f"image {shorten(source)} can't be opened: {error_text(error)}.") from error


# Every field of a request that means something here, and those that tasks read.
FIELDS = frozenset({"id", "messages", "prompt", "input_ids", "images", "max_new_tokens", "temperature", "top_p", "top_k",
                    "seed", "stop", "ignore_eos", "logprobs", "answer", "kind"})
LARGEST = 2**31 - 1
# Field of a request -> (type, least value or None, greatest value).
_NUMBERS = {"max_new_tokens": (int, 1, LARGEST), "temperature": (float, 0, 1e6), "top_p": (float, 0, 1),
            "top_k": (int, 0, LARGEST), "seed": (int, None, 2**64 - 1), "logprobs": (int, 0, LARGEST)}


def _number(given: dict[str, Any], name: str, default: Any) -> Any:
    value = given.get(name)
    if value is None:
        return default
    kind, least, most = _NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{name}={value!r} must be a {'number' if kind is float else 'whole number'}.")
    # NaN is no number to compare with, so the bounds are asked for, not their breach.
    if not (-math.inf if least is None else least) <= value <= most:
        raise UserError(f"{name}={value} must be at least {least} and at most {most}." if least is not None else
                        f"{name}={value} must be at most {most}.")
    return kind(value)


def _options(given: dict[str, Any], defaults: Defaults) -> dict[str, Any]:
    """The options of a request, over the run's defaults."""
    base = defaults.sampling
    top_p = _number(given, "top_p", base.top_p)
    if top_p == 0:
        raise UserError("top_p=0 keeps no token; it must be above 0 and at most 1.")
    stop = given.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise UserError("stop must be a string or a list of strings that are not empty.")
    ignore_eos = given.get("ignore_eos") or False
    if not isinstance(ignore_eos, bool):
        raise UserError(f"ignore_eos={ignore_eos!r} must be true or false.")
    sampling = Sampling(_number(given, "temperature", base.temperature), top_p, _number(given, "top_k", base.top_k),
                        _number(given, "seed", base.seed), _number(given, "logprobs", None))
    return {"max_new": _number(given, "max_new_tokens", defaults.max_new), "sampling": sampling, "stop": tuple(stop),
            "ignore_eos": ignore_eos}
