"""Converts text to ids and ids to text with a checkpoint's tokenizer, and reads its special tokens. No torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.detokenizer import Detokenizer
from mllama_graph.inputs.tiktoken import tokenizer_of
from mllama_graph.model.fields import Fields

# The names of special tokens that transformers gives to chat templates (PreTrainedTokenizerBase).
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BOS = "<|begin_of_text|>"
# Llama 3's ends of a turn and of a message, which not every configuration file names.
ENDS = ("<|eot_id|>", "<|eom_id|>")
# The end of a text, which Meta's own format names nowhere.
TEXT_END = "<|end_of_text|>"


class TextCodec(Protocol):
    """Converts text to ids and ids to text."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens written in the text are recognised."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None."""

    @property
    def added(self) -> dict[int, tuple[str, bool]]:
        """The tokens that were added to the vocabulary: id -> (text, whether it is special)."""

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        """A detokenizer for one request's generated ids."""


class CheckpointTokenizer:
    """A checkpoint's tokenizer.json, or Meta's tokenizer.model. Raises UserError where neither can be read."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        if path.is_file():
            with _refusing(f"{path} can't be read"):
                self.tokenizer = Tokenizer.from_file(str(path))
        elif (folder / "tokenizer.model").is_file():
            self.tokenizer = tokenizer_of(folder / "tokenizer.model")
        else:
            raise UserError(f"{path} is missing. Copy tokenizer.json into the checkpoint folder.")
        # Training stores both in the file; transformers applies neither unless it is asked to.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        with _refusing("the prompt can't be tokenized"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    @cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        return {id: (token.content, token.special) for id, token in self.tokenizer.get_added_tokens_decoder().items()}

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        stream = DecodeStream(skip_special_tokens=True)
        return Detokenizer(lambda id: stream.step(self.tokenizer, id), self.decode, stops)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns what tokenizers raises into a UserError: bare Exception, and for a panic a BaseException of its own.

    It panics on some files, for instance where a merge is shorter than continuing_subword_prefix.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:200].rstrip('.')}.") from error


class BytesAsIds:
    """Replaces the tokenizer where there is no checkpoint (weights=random): encodes bytes, and decodes ids as <id>."""

    added: dict[int, tuple[str, bool]] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{id}>" for id in ids)

    def token_to_id(self, token: str) -> int | None:
        return None

    def detokenizer(self, stops: Sequence[str]) -> Detokenizer:
        return Detokenizer(lambda id: f"<{id}>", self.decode, stops)


def special_tokens(folder: Path, tokenizer_config: Fields) -> dict[str, str]:
    """The special tokens that chat templates may refer to, by name, as transformers reads them.

    special_tokens_map.json counts only where tokenizer_config.json has no added_tokens_decoder, which newer files have.
    A checkpoint that says nothing of bos_token gets Llama 3's.
    """
    sources = [tokenizer_config]
    if not tokenizer_config.has("added_tokens_decoder"):
        sources.append(Fields.of(folder / "special_tokens_map.json"))
    tokens: dict[str, str] = {}
    for source in sources:
        for name in TOKEN_NAMES:
            if (text := source.token(name)) is not None:
                tokens[name] = text
    if not any("bos_token" in source.values for source in sources):
        tokens["bos_token"] = BOS
    return tokens


def end_ids(folder: Path, codec: TextCodec, eos_token: str | None, outputs: int) -> frozenset[int]:
    """The ids that end a text: those of every configuration file, and Llama 3's ends where the tokenizer has them.

    outputs: the size of the vocabulary that the model generates; other ids never come.
    """
    config = Fields.of(folder / "config.json")
    sources = [Fields.of(folder / "generation_config.json"), config, config.within("text_config")]
    ids = {id for source in sources for id in source.ids("eos_token_id")}
    if eos_token is not None and (id := codec.token_to_id(eos_token)) is not None:
        ids.add(id)
    ends = ENDS if (folder / "config.json").is_file() else (TEXT_END, *ENDS)
    ids |= {id for id, (text, special) in codec.added.items() if special and text in ends}
    return frozenset(id for id in ids if 0 <= id < outputs)


def beyond(codec: TextCodec, image_token: int, embeddings: int) -> str:
    """A line on tokens whose ids have no trained row of the embedding, or "" where there is none.

    image_token: the id of the last token that models are trained on. embeddings: rows of the embedding.
    """
    reserved = sorted(id for id in codec.added if image_token < id < embeddings)
    outside = sorted(id for id in codec.added if id >= embeddings)
    parts = []
    if reserved:
        parts.append(f"{_listed(codec, reserved)} use rows of the embedding that are reserved and usually untrained")
    if outside:
        parts.append(
            f"{_listed(codec, outside)} lie beyond the embedding, whose ids run from 0 to {embeddings - 1}: "
            "prompts that hold one are refused"
        )
    return f"tokenizer.json: {'; '.join(parts)}." if parts else ""


def _listed(codec: TextCodec, ids: Sequence[int]) -> str:
    first = f"{codec.added[ids[0]][0]} ({ids[0]})"
    return first if len(ids) == 1 else f"{len(ids)} tokens from {first} to {codec.added[ids[-1]][0]} ({ids[-1]})"
