"""Prepared requests and their sampling options, and the checks of the options that users give."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.images import TiledImage
from mllama_graph.model.fields import describe

if TYPE_CHECKING:
    from mllama_graph.inputs.structured import Grammar


@dataclass(frozen=True)
class Sampling:
    """Sampling options of one request. `logprobs`: the number of most likely ids to report; None reports none.

    `prompt_logprobs`: the same for each token of the prompt. `logit_bias`: id -> what is added to its logit.
    `min_tokens`: the text does not end before it has as many.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    prompt_logprobs: int | None = None

    @property
    def edits(self) -> bool:
        """Whether logits are changed before a token is drawn."""
        penalised = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(penalised or self.logit_bias or self.min_tokens)


@dataclass(frozen=True)
class Request:
    """A request that is ready for the engine.

    `positions`: the positions of its image tokens, one per image. `forced`: ids that take the place of the sampled
    ones, so that log-probabilities are those after given tokens. `grammar`: what the text must satisfy. `priority`:
    requests with higher ones are served first, those with equal ones in order of arrival.
    """

    id: Any
    ids: tuple[int, ...]
    images: tuple[TiledImage, ...]
    positions: tuple[int, ...]
    max_new: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    forced: tuple[int, ...] = ()
    grammar: "Grammar | None" = None
    priority: int = 0


# All known fields of a request, including those that only tasks read.
FIELDS = frozenset(
    {
        "id",
        "messages",
        "prompt",
        "input_ids",
        "images",
        "tools",
        "documents",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "min_tokens",
        "prompt_logprobs",
        "seed",
        "stop",
        "ignore_eos",
        "logprobs",
        "response_format",
        "structured_outputs",
        "priority",
        "answer",
        "kind",
    }
)
LARGEST = 2**31 - 1
# Numeric field of a request -> (type, minimum or None, maximum).
_NUMBERS: dict[str, tuple[type, float | None, float]] = {
    "max_new_tokens": (int, 1, LARGEST),
    "temperature": (float, 0, 1_000_000),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, LARGEST),
    "min_p": (float, 0, 1),
    "seed": (int, None, 2**64 - 1),
    "logprobs": (int, 0, LARGEST),
    "priority": (int, -LARGEST, LARGEST),
    # Nearer to 0, a logit might leave fp32.
    "repetition_penalty": (float, 0.01, 100),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "min_tokens": (int, 0, LARGEST),
    "prompt_logprobs": (int, 0, LARGEST),
}
# The largest bias, as in OpenAI's API, and the most ids that have one.
MOST_BIAS, MOST_BIASES = 100, 1024


@dataclass(frozen=True)
class Options:
    """The options of a request, with the run's defaults filled in."""

    max_new: int
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    priority: int


def read_options(given: Mapping[str, Any], max_new: int, defaults: Sampling, vocab: int) -> Options:
    """Read and check the options of a request. `vocab`: the number of ids that have a logit.

    Raises UserError for a value of the wrong type or out of range.
    """
    top_p = _number(given, "top_p", defaults.top_p)
    stop = given.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise UserError("stop must be a string or a list of strings that are not empty.")
    ignore_eos = given.get("ignore_eos") or False
    if not isinstance(ignore_eos, bool):
        raise UserError(f"ignore_eos={ignore_eos!r} must be true or false.")
    sampling = Sampling(
        _number(given, "temperature", defaults.temperature),
        top_p,
        _number(given, "top_k", defaults.top_k),
        _number(given, "seed", defaults.seed),
        _number(given, "logprobs", None),
        _number(given, "min_p", defaults.min_p),
        _number(given, "repetition_penalty", defaults.repetition_penalty),
        _number(given, "frequency_penalty", defaults.frequency_penalty),
        _number(given, "presence_penalty", defaults.presence_penalty),
        _biases(given.get("logit_bias"), vocab),
        _number(given, "min_tokens", defaults.min_tokens),
        _number(given, "prompt_logprobs", None),
    )
    max_new = _number(given, "max_new_tokens", max_new)
    if sampling.min_tokens > max_new:
        raise UserError(f"min_tokens={sampling.min_tokens} is more than the {max_new} tokens that may be generated.")
    priority = _number(given, "priority", 0)
    return Options(max_new, sampling, tuple(stop), ignore_eos, priority)


def _biases(given: Any, vocab: int) -> dict[int, float]:
    """The biases of ids, which may be written as texts: JSON has no other keys."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"logit_bias is {describe(given)}; it must be an object of ids and numbers.")
    if len(given) > MOST_BIASES:
        raise UserError(f"logit_bias has {len(given)} ids; at most {MOST_BIASES} may have a bias.")
    found = {}
    for key, value in given.items():
        text = str(key)
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"logit_bias holds {describe(key)}, which is no id: ids are numbers from 0 to {vocab - 1}.")
        if not (len(text) < 10 and int(text) < vocab):
            raise UserError(f"logit_bias holds the id {describe(key)}; ids run from 0 to {vocab - 1}.")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not -MOST_BIAS <= value <= MOST_BIAS:
            raise UserError(f"logit_bias of {text} is {describe(value)}; it must be from -{MOST_BIAS} to {MOST_BIAS}.")
        found[int(text)] = float(value)
    return found


def _number(given: Mapping[str, Any], name: str, default: Any) -> Any:
    value = given.get(name)
    if value is None:
        return default
    kind, least, most = _NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{name}={value!r} must be a {'number' if kind is float else 'whole number'}.")
    if name == "top_p" and not 0 < value <= 1:
        raise UserError(f"top_p={value} must be above 0 and at most 1.")
    # `not (lo <= x <= hi)` also rejects NaN.
    if not (-math.inf if least is None else least) <= value <= most:
        raise UserError(
            f"{name}={value} must be at least {least} and at most {most}."
            if least is not None
            else f"{name}={value} must be at most {most}."
        )
    return kind(value)
