"""Converts requests to token ids and image tiles, and ids to text, with the files of one checkpoint. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import TooLong, UserError
from mllama_graph.inputs.chat import TEMPLATE_FIELDS, read_chat_options, read_messages, texts
from mllama_graph.inputs.detokenizer import Detokenizer
from mllama_graph.inputs.image_settings import ImageSettings, read_image_settings
from mllama_graph.inputs.image_sources import Source, request_images
from mllama_graph.inputs.images import prepare_images
from mllama_graph.inputs.request import FIELDS, Request, Sampling, read_options
from mllama_graph.inputs.structured import Grammars
from mllama_graph.inputs.template import DEFAULT, TOOL_USE, ChatOptions, ChatTemplate, find_templates
from mllama_graph.inputs.tiktoken import IMAGE
from mllama_graph.inputs.tokenizer import (
    BOS,
    BytesAsIds,
    CheckpointTokenizer,
    TextCodec,
    beyond,
    end_ids,
    special_tokens,
)
from mllama_graph.model.fields import Fields, describe
from mllama_graph.model.shape import ModelShape


class Processor:
    """Tokenizer, chat template and image preparation of one checkpoint; `folder` is None where there is none.

    max_new, sampling: defaults for requests that don't set them. max_input: the most ids in a prompt. longest: the most
    tokens of a prompt and its answer; a request that does not set its limit gets as many new ones as are left. `notes`:
    lines that the user should read at the start of a run. Raises UserError for files that are missing, damaged or
    don't fit the model.
    """

    def __init__(
        self, folder: Path | None, shape: ModelShape, max_new: int, max_input: int, longest: int, sampling: Sampling
    ):
        self.shape, self.max_new, self.max_input, self.longest = shape, max_new, max_input, longest
        self.sampling = sampling
        self.codec: TextCodec = BytesAsIds()
        self.eos: frozenset[int] = frozenset()
        self.bos: int | None = None
        self.images = ImageSettings()
        self.notes: list[str] = []
        self._templates: dict[str, ChatTemplate] = {}
        if folder is not None:
            self._load(folder)
        self.grammars = Grammars(self.codec, self.eos, shape.text.vocab)

    def _load(self, folder: Path) -> None:
        self.codec = CheckpointTokenizer(folder)
        tokenizer_config = Fields.of(folder / "tokenizer_config.json")
        processor_config = Fields.of(folder / "processor_config.json")
        self.images = read_image_settings(folder, processor_config, self.shape)
        tokens = special_tokens(folder, tokenizer_config)
        self.bos = self._first_id(folder, tokens.get("bos_token", BOS))
        self.eos = end_ids(folder, self.codec, tokens.get("eos_token"), self.shape.text.vocab)
        templates, note = find_templates(folder, processor_config, tokenizer_config)
        self._templates = {
            name: ChatTemplate(source, tokens) for name, source in templates.items() if name in (DEFAULT, TOOL_USE)
        }
        unending = (
            ""
            if self.eos
            else f"{folder} names no end-of-sequence token (generation_config.json, config.json, "
            "tokenizer_config.json): texts end only at max_new_tokens or a stop string."
        )
        notes = (note, unending, self.images.note, beyond(self.codec, self.shape.image_token, self.shape.embeddings))
        self.notes = [note for note in notes if note]

    def _first_id(self, folder: Path, token: str) -> int | None:
        """The id that begins a text without a chat template."""
        id = self.codec.token_to_id(token)
        if id is not None:
            return id
        return next(iter(Fields.of(folder / "config.json").within("text_config").ids("bos_token_id")), None)

    @property
    def pixels(self) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
        """(scale, mean, std) of the pixel normalisation in the checkpoint's image processor configuration."""
        return self.images.scale, self.images.mean, self.images.std

    def chat(
        self, id: Any, prompt: str, images: Sequence[Source] = (), system: str | None = None, **options: Any
    ) -> Request:
        """Prepare a request from a prompt, with the images before the text in one user message."""
        content = [{"type": "image", "image": source} for source in images] + [{"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": system}] if system else []
        return self.request({"id": id, "messages": [*messages, {"role": "user", "content": content}], **options})

    def request(self, given: dict[str, Any], base: Path = Path(".")) -> Request:
        """Prepare a request from a line of a requests file. Relative image paths are looked up in `base` first.

        Raises UserError for a request that is not valid.
        """
        kinds = [kind for kind in ("messages", "prompt", "input_ids") if given.get(kind) is not None]
        if len(kinds) != 1:
            raise UserError(_not_one_kind(kinds, given))
        sources: list[Source] = []
        options = read_chat_options(given)
        if kinds == ["messages"]:
            if given.get("images"):
                raise UserError("images beside messages: put them into the messages as image parts.")
            ids = self._messages(read_messages(given["messages"], sources), len(sources), options, given)
        else:
            sources = request_images(given.get("images"), base)
            if kinds == ["prompt"]:
                ids = self._messages(_as_message(given["prompt"], len(sources)), len(sources), options, given)
            else:
                ids = self._ids(given["input_ids"], given)
        positions = tuple(at for at, id in enumerate(ids) if id == self.shape.image_token)
        if len(positions) != len(sources):
            raise UserError(f"{len(positions)} {IMAGE} tokens for {len(sources)} images; each image needs one token.")
        self._check_ids(ids, "input_ids holds" if kinds == ["input_ids"] else "the prompt holds")
        if len(ids) > self.max_input:
            raise TooLong(self._too_long(len(ids)), len(ids), None, min(self.max_input, self.longest - 1))
        max_new = min(self.max_new, max(1, self.longest - len(ids)))
        limits = read_options(given, max_new, self.sampling, self.shape.text.vocab)
        grammar = self.grammars.read(given)
        images = prepare_images(sources, base, self.shape.vision)
        return Request(
            given.get("id"),
            tuple(ids),
            images,
            positions,
            limits.max_new,
            limits.sampling,
            limits.stop,
            limits.ignore_eos,
            grammar=grammar,
            priority=limits.priority,
        )

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.codec.decode(ids)

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        """A detokenizer for one request's generated ids."""
        return self.codec.detokenizer(stops)

    def _ids(self, given: Any, request: dict[str, Any]) -> list[int]:
        if not isinstance(given, list) or not all(type(id) is int for id in given):
            raise UserError("input_ids must be a list of whole numbers.")
        if not given:
            raise UserError("the request is empty: input_ids has no ids.")
        _refuse_template_fields(request, "input_ids are used as given")
        return given

    def _messages(
        self, messages: list[dict[str, Any]], images: int, options: ChatOptions, request: dict[str, Any]
    ) -> list[int]:
        """The ids of messages in the form of chat templates."""
        template = self._templates.get(DEFAULT)
        if options.tools is not None:
            template = self._templates.get(TOOL_USE, template)
        if template is not None:
            if images:
                self._check_image_token()
            return self.codec.encode(template.prompt(messages, options))
        _refuse_template_fields(request, "this checkpoint has no chat template")
        if any(message.get("tool_calls") for message in messages):
            raise UserError("messages hold tool_calls; this checkpoint has no chat template that could show them.")
        text = "\n".join(text for message in messages for text in texts(message.get("content")))
        start = [] if self.bos is None else [self.bos]
        return start + [self.shape.image_token] * images + self.codec.encode(text)

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        """Refuse ids without a row in the embedding, wherever they come from."""
        last = self.shape.embeddings - 1
        wrong = next((id for id in ids if not 0 <= id <= last), None)
        if wrong is not None:
            token = f" ({self.codec.added[wrong][0]})" if wrong in self.codec.added else ""
            raise UserError(f"{what} {describe(wrong)}{token}; ids run from 0 to {last}.")

    def _too_long(self, ids: int) -> str:
        """The message about a prompt of so many ids, of which at least one more must be generated."""
        positions, remedy = self.shape.text.positions, "raise max_input_length"
        if self.longest <= positions <= ids:
            remedy = f"set extend_context=true and {remedy}: the model has {positions} positions"
        return f"the prompt has {ids} ids, max_input_length={self.max_input}. Shorten it, or {remedy}."

    def _check_image_token(self) -> None:
        id = self.codec.token_to_id(IMAGE)
        if id != self.shape.image_token:
            has = f"has no token {IMAGE}" if id is None else f"gives {IMAGE} the id {id}"
            raise UserError(
                f"the checkpoint's tokenizer.json {has}; pictures need it with the id {self.shape.image_token} "
                "(image_token_index in config.json). Use the tokenizer that belongs to the model."
            )


def _not_one_kind(kinds: list[str], given: dict[str, Any]) -> str:
    if not kinds and "role" in given:
        return 'this is a message, not a request. Put it into a list: {"messages": [{"role": ..., "content": ...}]}.'
    unknown = ", ".join(map(describe, sorted(map(str, given.keys() - FIELDS))))
    found = ", ".join(kinds) or ("none, but unknown fields: " + unknown if unknown else "none")
    return f"a request needs exactly one of messages, prompt, input_ids; this has {found}."


def _as_message(prompt: Any, images: int) -> list[dict[str, Any]]:
    """A prompt as one user message, with its images before its text."""
    if not isinstance(prompt, str):
        raise UserError(f"prompt must be a string, not {type(prompt).__name__}.")
    if not prompt.strip() and not images:
        raise UserError("the request is empty: prompt has no text.")
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": prompt}]}]


def _refuse_template_fields(request: dict[str, Any], why: str) -> None:
    if fields := [name for name in TEMPLATE_FIELDS if request.get(name)]:
        raise UserError(f"{', '.join(fields)} can't be used: {why}.")
