"""Prepared requests and their sampling options, and the checks of the options that users give."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.images import TiledImage

if TYPE_CHECKING:
    from mllama_graph.inputs.structured import Grammar


@dataclass(frozen=True)
class Sampling:
    """Sampling options of one request. `logprobs`: the number of most likely ids to report; None reports none."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None
    min_p: float = 0.0


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
_NUMBERS: dict[str, tuple[type, int | None, float]] = {
    "max_new_tokens": (int, 1, LARGEST),
    "temperature": (float, 0, 1e6),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, LARGEST),
    "min_p": (float, 0, 1),
    "seed": (int, None, 2**64 - 1),
    "logprobs": (int, 0, LARGEST),
    "priority": (int, -LARGEST, LARGEST),
}


@dataclass(frozen=True)
class Options:
    """The options of a request, with the run's defaults filled in."""

    max_new: int
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    priority: int


def read_options(given: Mapping[str, Any], max_new: int, defaults: Sampling) -> Options:
    """Read and check the options of a request. Raises UserError for a value of the wrong type or out of range."""
    top_p = _number(given, "top_p", defaults.top_p)
    if top_p == 0:
        raise UserError("top_p=0 keeps no token; it must be above 0 and at most 1.")
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
    )
    priority = _number(given, "priority", 0)
    return Options(_number(given, "max_new_tokens", max_new), sampling, tuple(stop), ignore_eos, priority)


def _number(given: Mapping[str, Any], name: str, default: Any) -> Any:
    value = given.get(name)
    if value is None:
        return default
    kind, least, most = _NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{name}={value!r} must be a {'number' if kind is float else 'whole number'}.")
    # `not (lo <= x <= hi)` also rejects NaN.
    if not (-math.inf if least is None else least) <= value <= most:
        raise UserError(
            f"{name}={value} must be at least {least} and at most {most}."
            if least is not None
            else f"{name}={value} must be at most {most}."
        )
    return kind(value)
