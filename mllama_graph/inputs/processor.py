"""Converts requests to token ids and image tiles, and ids to text, with the files of one checkpoint. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.chat import ChatTemplate, read_message, template_source, texts
from mllama_graph.inputs.detokenizer import Detokenizer
from mllama_graph.inputs.image_sources import Source, request_images
from mllama_graph.inputs.images import prepare_images
from mllama_graph.inputs.request import Request, Sampling, read_options
from mllama_graph.model.shape import ModelShape, read_json, read_optional_json

# CLIP's normalisation, which every released checkpoint uses (llama_models image_transform.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE = "<|image|>"


class TextCodec(Protocol):
    """Converts text to ids and ids to text."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens written in the text are recognised."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None."""

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        """A detokenizer for one request's generated ids."""


class CheckpointTokenizer:
    """A checkpoint's tokenizer.json. Raises UserError where it is missing or damaged."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing. Copy tokenizer.json into the checkpoint folder.")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path} can't be read: {error}.") from error

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        stream = DecodeStream(skip_special_tokens=True)
        return Detokenizer(lambda id: stream.step(self.tokenizer, id), self.decode, stops)


class BytesAsIds:
    """Replaces the tokenizer where there is no checkpoint (weights=random): encodes bytes, and decodes ids as <id>."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{id}>" for id in ids)

    def token_to_id(self, token: str) -> int | None:
        return None

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        return Detokenizer(lambda id: f"<{id}>", self.decode, stops)


class Processor:
    """Tokenizer, chat template and image preparation of one checkpoint; `folder` is None where there is none.

    max_new, sampling: defaults for requests that don't set them. max_input: the most ids in a prompt.
    Raises UserError for files that are missing or don't fit the model.
    """

    def __init__(self, folder: Path | None, shape: ModelShape, max_new: int, max_input: int, sampling: Sampling):
        self.shape, self.max_new, self.max_input, self.sampling = shape, max_new, max_input, sampling
        config = read_json(folder / "config.json") if folder else {}
        generation = _optional(folder, "generation_config.json")
        tokenizer_config = _optional(folder, "tokenizer_config.json")
        self.codec: TextCodec = CheckpointTokenizer(folder) if folder else BytesAsIds()
        self._image_config = _image_config(folder, shape) if folder else {}
        text_config = config.get("text_config") or {}
        eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        bos_token = _token_text(tokenizer_config.get("bos_token")) or "<|begin_of_text|>"
        bos = self.codec.token_to_id(bos_token)
        self.bos: int | None = text_config.get("bos_token_id") if bos is None else bos
        tokens = {
            name: _token_text(value)
            for name, value in tokenizer_config.items()
            if name.endswith("_token") and _token_text(value) is not None
        }
        source = template_source(folder, tokenizer_config) if folder else None
        self.template = ChatTemplate(source, tokens | {"bos_token": bos_token}) if source else None

    @property
    def pixels(self) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
        """(scale, mean, std) of the pixel normalisation in the checkpoint's image processor configuration."""
        config = self._image_config
        scale = float(config.get("rescale_factor", 1 / 255))
        if config.get("do_normalize") is False:
            return scale, (0.0,) * 3, (1.0,) * 3
        return scale, tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))

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
            raise UserError(
                f"a request needs exactly one of messages, prompt, input_ids; this has {', '.join(kinds) or 'none'}."
            )
        sources: list[Source]
        if kinds == ["messages"]:
            if given.get("images"):
                raise UserError("images beside messages: put them into the messages as image parts.")
            ids, sources = self._messages(given["messages"])
        else:
            sources = request_images(given.get("images"), base)
            ids = self._prompt(given["prompt"], sources) if kinds == ["prompt"] else self._ids(given["input_ids"])
        positions = tuple(at for at, id in enumerate(ids) if id == self.shape.image_token)
        if len(positions) != len(sources):
            raise UserError(f"{len(positions)} {IMAGE} tokens for {len(sources)} images; each image needs one token.")
        if len(ids) > self.max_input:
            raise UserError(
                f"the prompt has {len(ids)} ids, max_input_length={self.max_input}. "
                f"Shorten it or raise max_input_length."
            )
        options = read_options(given, self.max_new, self.sampling)
        images = prepare_images(sources, base, self.shape.vision)
        return Request(
            given.get("id"),
            tuple(ids),
            images,
            positions,
            options.max_new,
            options.sampling,
            options.stop,
            options.ignore_eos,
        )

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.codec.decode(ids)

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        """A detokenizer for one request's generated ids."""
        return self.codec.detokenizer(stops)

    def _ids(self, given: Any) -> list[int]:
        if not isinstance(given, list) or not all(type(id) is int for id in given):
            raise UserError("input_ids must be a list of whole numbers.")
        if not given:
            raise UserError("the request is empty: input_ids has no ids.")
        if wrong := [id for id in given if not 0 <= id < self.shape.embeddings]:
            raise UserError(f"input_ids holds {wrong[0]}; ids run from 0 to {self.shape.embeddings - 1}.")
        return given

    def _prompt(self, prompt: Any, sources: Sequence[Source]) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(f"prompt must be a string, not {type(prompt).__name__}.")
        if not prompt.strip():
            raise UserError("the request is empty: prompt has no text.")
        if self.template is None:
            return self._without_template(prompt, len(sources))
        content = [{"type": "image"}] * len(sources) + [{"type": "text", "text": prompt}]
        return self.codec.encode(self.template.render([{"role": "user", "content": content}]))

    def _messages(self, messages: Any) -> tuple[list[int], list[Source]]:
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise UserError("the request is empty: messages must be a list of at least one message object.")
        sources: list[Source] = []
        plain = [read_message(message, sources) for message in messages]
        written = [text for message in plain for text in texts(message["content"])]
        if not any(text.strip() for text in written):
            raise UserError("the request is empty: its messages hold no text.")
        if self.template is None:
            return self._without_template("\n".join(written), len(sources)), sources
        return self.codec.encode(self.template.render(plain)), sources

    def _without_template(self, text: str, images: int) -> list[int]:
        """The ids for a checkpoint without a chat template: BOS, image tokens, text."""
        start = [] if self.bos is None else [self.bos]
        return start + [self.shape.image_token] * images + self.codec.encode(text)


def _optional(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; empty where the file does not exist."""
    return (read_optional_json(folder / name) or {}) if folder else {}


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _image_config(folder: Path, shape: ModelShape) -> dict[str, Any]:
    """preprocessor_config.json, or the image part of processor_config.json, which newer transformers write."""
    config = read_optional_json(folder / "preprocessor_config.json")
    if config is None:
        config = _optional(folder, "processor_config.json").get("image_processor") or {}
    tile = (config.get("size") or {}).get("height", shape.vision.tile)
    tiles = config.get("max_image_tiles", shape.vision.max_tiles)
    if (tile, tiles) != (shape.vision.tile, shape.vision.max_tiles):
        raise UserError(
            f"preprocessor_config.json cuts up to {tiles} tiles of {tile} px, config.json says "
            f"{shape.vision.max_tiles} of {shape.vision.tile} px. The two files belong to different models."
        )
    return config
