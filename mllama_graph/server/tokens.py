"""Tokens as the API shows them: exact bytes, texts, and log-probabilities."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.tokenizer import CheckpointTokenizer

# JSON has no infinity: the log-probability of what can't be sampled.
LEAST = -9999.0


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's bytes_to_unicode, inverted)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokens:
    """The texts and bytes of a checkpoint's tokens."""

    def __init__(self, processor: Processor):
        self._codec = processor.codec
        self._tokenizer = self._codec.tokenizer if isinstance(self._codec, CheckpointTokenizer) else None
        self._cache: dict[int, bytes] = {}

    def raw(self, id: int) -> bytes:
        """The exact bytes of a token, which may be part of a character. Those of a special token are its name's."""
        found = self._cache.get(id)
        if found is None:
            found = self._cache[id] = self._bytes(id)
        return found

    def _bytes(self, id: int) -> bytes:
        if id in self._codec.added:
            return self._codec.added[id][0].encode()
        if self._tokenizer is None:
            return self._codec.decode([id]).encode()
        text = self._tokenizer.id_to_token(id)
        if text is None:
            return b""
        try:
            return bytes(self._characters[character] for character in text)
        except KeyError:
            return self._codec.decode([id]).encode()

    @cached_property
    def _characters(self) -> Mapping[str, int]:
        return byte_of_character()

    def text(self, id: int) -> str:
        """The text of a token; bytes that are no whole character become U+FFFD."""
        return self.raw(id).decode("utf8", "replace")

    def label(self, id: int) -> str:
        """The text of a token; where it is no whole text, its bytes, so that different tokens have different labels."""
        data = self.raw(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, entry: Mapping[str, Any], top: int) -> dict[str, Any]:
        """An entry of choices[].logprobs.content of a chat completion."""
        alternatives = zip(entry["top_ids"][:top], entry["top_logprobs"])
        return {
            **self._chat(entry["id"], entry["logprob"]),
            "top_logprobs": [self._chat(id, value) for id, value in alternatives],
        }

    def _chat(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text(id), "logprob": finite(logprob), "bytes": list(self.raw(id))}

    def completions(self, entries: Iterable[Mapping[str, Any]], top: int, offset: int) -> dict[str, Any]:
        """choices[].logprobs of a completion. `offset`: where the first token's text begins.

        An entry whose `logprob` is None is the first token of an echoed prompt.
        """
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            unknown = entry["logprob"] is None
            shown["tokens"].append(self.label(entry["id"]))
            shown["token_logprobs"].append(None if unknown else finite(entry["logprob"]))
            tops = dict(zip(map(self.label, entry["top_ids"][:top]), map(finite, entry["top_logprobs"])))
            # OpenAI's engine always reports the token itself, too.
            shown["top_logprobs"].append(
                None if unknown else tops | {self.label(entry["id"]): finite(entry["logprob"])} if top else tops
            )
            shown["text_offset"].append(offset)
            offset += len(self.text(entry["id"])) if entry["id"] not in self._codec.added else 0
        return shown

    def prompt(self, entries: Iterable[Mapping[str, Any]] | None, top: int | None) -> dict[str, Any]:
        """The field prompt_logprobs as in vLLM's API: an object of ids for each token but the first; {} without it."""
        if entries is None or top is None:
            return {}
        shown: list[dict[str, Any] | None] = []
        for entry in entries:
            found = {
                str(id): {"logprob": finite(value), "rank": rank, "decoded_token": self.text(id)}
                for rank, (id, value) in enumerate(zip(entry["top_ids"][:top], entry["top_logprobs"]), start=1)
            }
            own = {"logprob": finite(entry["logprob"]), "rank": None, "decoded_token": self.text(entry["id"])}
            shown.append({str(entry["id"]): own} | found if shown else None)
        return {"prompt_logprobs": shown}


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return LEAST if logprob is None or not logprob > LEAST else logprob
