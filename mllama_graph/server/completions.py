"""POST /v1/completions: plain prompts, without a chat template."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.request import Request
from mllama_graph.model.fields import describe
from mllama_graph.server import fields
from mllama_graph.server.answers import DONE, event
from mllama_graph.server.errors import ApiError, refused
from mllama_graph.server.fields import Asked
from mllama_graph.server.jobs import Job, choices_of
from mllama_graph.server.service import Service
from mllama_graph.server.usage import usage_of

# OpenAI's default of max_tokens.
NEW_TOKENS = 16
MOST_PROMPTS = 256

Prompt = str | list[int]


def job(service: Service, body: Mapping[str, Any]) -> Job:
    """The job of a completion. Raises ApiError with the field."""
    prompts = prompts_of(body.get("prompt"))
    if body.get("suffix"):
        raise refused("suffix is not supported: the model completes texts at their end.", "suffix")
    echo = fields.flag(body, "echo")
    top = fields.whole(body, "logprobs", 0, fields.MOST_TOP_LOGPROBS)
    if body.get("max_tokens") == 0 and echo:
        # The engine generates one token at least; `Completions` leaves it out.
        body, empty = {**body, "max_tokens": 1}, True
    else:
        empty = False
    asked = fields.read(body, service.model(body), ("max_tokens", "max_completion_tokens"), top, top if echo else None)
    asked.fields.setdefault("max_new_tokens", NEW_TOKENS)

    def prepare() -> list[Request]:
        found = []
        for prompt in prompts:
            service.check_text(len(prompt) if isinstance(prompt, str) else 0, "prompt")
            given = {**asked.of_request(), "input_ids": ids_of(service.processor, prompt)}
            found += choices_of(service.processor.request(given), asked)
        return found

    count = len(prompts) * asked.choices
    return Job(asked, count, prepare, lambda requests: Completions(service, asked, requests, prompts, echo, empty))


def prompts_of(given: Any) -> list[Prompt]:
    """The prompts of a body: a text, ids, or a list of either. Raises ApiError for anything else."""
    if given is None:
        raise refused("prompt is missing: give a text, a list of texts, or ids.", "prompt", "missing_field")
    prompts = given if isinstance(given, list) and not (given and _is_id(given[0])) else [given]
    if not prompts:
        raise refused("prompt is an empty list.", "prompt")
    if len(prompts) > MOST_PROMPTS:
        raise refused(f"prompt has {len(prompts)} prompts; at most {MOST_PROMPTS} are taken.", "prompt")
    for prompt in prompts:
        ids = isinstance(prompt, list) and bool(prompt) and all(map(_is_id, prompt))
        if not isinstance(prompt, str) and not ids:
            raise refused(f"prompt holds {describe(prompt)}; it must be a text or a list of ids.", "prompt")
    return prompts


def ids_of(processor: Processor, prompt: Prompt, special: bool = True) -> list[int]:
    """The ids of a prompt: given ones, or those of a text after the token that begins texts (`special`)."""
    if isinstance(prompt, list):
        return prompt
    ids = processor.codec.encode(prompt)
    if special and processor.bos is not None and ids[:1] != [processor.bos]:
        ids = [processor.bos, *ids]
    return ids


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Completions:
    """The form of completions. `echo`: the prompt precedes the text. `empty`: no token was asked for."""

    def __init__(
        self,
        service: Service,
        asked: Asked,
        requests: list[Request],
        prompts: Sequence[Prompt],
        echo: bool,
        empty: bool,
    ):
        self._service, self._asked, self._requests, self._empty = service, asked, requests, empty
        self._echo = echo
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        shown = [service.processor.text(prompt) if isinstance(prompt, list) else prompt for prompt in prompts]
        self._prompts = [shown[n // asked.choices] if echo else "" for n in range(len(requests))]
        self._offsets = [len(prompt) for prompt in self._prompts]
        self._tokens = 0
        self._results: list[Result] = []

    def begin(self) -> bytes:
        """The prompts, where they are echoed; those with log-probabilities come with the first token."""
        if self._asked.logprobs is not None:
            return b""
        return b"".join(self._chunk(n, prompt) for n, prompt in enumerate(self._prompts) if prompt)

    def delta(self, index: int, delta: Delta) -> bytes:
        """The chunk of one token, which has the finish reason at the end."""
        self._tokens += delta.token is not None and not self._empty
        if delta.result:
            self._results.append(self._kept(delta.result))
        prompt = b""
        if delta.prompt_logprobs is not None:
            prompt = self._chunk(index, self._prompts[index], self._shown(delta.prompt_logprobs, 0))
        text = "" if self._empty else delta.text
        entries = [] if delta.logprobs is None or self._empty else self._entries([delta.logprobs])
        # A token without text has a chunk, too, as in chats.
        if delta.token is None and not entries and not delta.result:
            return prompt
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = self._shown(entries, self._offsets[index])
            self._offsets[index] += sum(len(token) for token in logprobs["tokens"])
        return prompt + self._chunk(index, text, logprobs, delta.result.finish_reason if delta.result else None)

    def end(self) -> bytes:
        if not self._asked.usage:
            return DONE
        return event(self._head | {"choices": [], "usage": self._usage(self._results)}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """A completion."""
        choices = []
        for index, (result, prompt) in enumerate(zip(map(self._kept, results), self._prompts)):
            logprobs = None
            if result.logprobs is not None and self._asked.logprobs is not None:
                logprobs = self._shown([] if self._empty else self._entries(result.logprobs), len(prompt))
                if self._echo:
                    echoed = self._shown(result.prompt_logprobs or [], 0)
                    logprobs = {name: echoed[name] + values for name, values in logprobs.items()}
            choices.append(
                {
                    "index": index,
                    "text": prompt + result.text,
                    "logprobs": logprobs,
                    "finish_reason": result.finish_reason,
                    **self._service.tokens.prompt(result.prompt_logprobs, self._asked.prompt_logprobs),
                }
            )
        return self._head | {"choices": choices, "usage": self._usage([*map(self._kept, results)])}

    def _usage(self, results: list[Result], new: int | None = None) -> dict[str, Any]:
        return usage_of(self._requests, results, self._asked.choices, new)

    def _kept(self, result: Result) -> Result:
        return replace(result, token_ids=[], text="", finish_reason="length") if self._empty else result

    def _entries(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of the tokens that are text; beside an echoed prompt of all, so that places can be counted."""
        ends = self._service.processor.eos
        ends = frozenset() if self._echo or self._asked.fields.get("ignore_eos") else ends
        return [entry for entry in entries if entry["id"] not in ends]

    def _shown(self, entries: list[dict[str, Any]], offset: int) -> dict[str, Any]:
        return self._service.tokens.completions(entries, self._asked.logprobs or 0, offset)

    def _chunk(self, index: int, text: str, logprobs: Any = None, reason: str | None = None) -> bytes:
        chunk = self._head | {
            "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]
        }
        if self._asked.usage_always:
            chunk["usage"] = self._usage([], self._tokens)
        elif self._asked.usage:
            chunk["usage"] = None
        return event(chunk)
