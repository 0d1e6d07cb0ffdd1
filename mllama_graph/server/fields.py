"""Fields that completions of all kinds share: reads a body into what the processor and the answer need.

Unknown fields are ignored, as OpenAI-compatible servers do; wrong types and contradictions are refused with the field.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllama_graph.inputs.request import LARGEST
from mllama_graph.model.fields import describe
from mllama_graph.server.errors import refused

MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20
MOST_STOPS, MOST_STOP_LETTERS = 16, 1024
SEEDS = 1 << 64
# Steps between the seeds of a request's choices: an odd number near 2**64 / golden ratio, so that they spread.
SEED_STEP = 0x9E3779B97F4A7C15
# Fields of the API that the processor reads, under their names there.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "ignore_eos",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "min_tokens",
    "response_format",
    "structured_outputs",
)


@dataclass(frozen=True)
class Asked:
    """What a completion asks for, apart from its prompt.

    fields: for the processor. logprobs, prompt_logprobs: the number of most likely ids to report for each token of the
    answer and of the prompt; None: none. echo: the same for the tokens of an echoed prompt. seed: of the first choice.
    """

    model: str
    fields: dict[str, Any]
    choices: int
    stream: bool
    usage: bool
    usage_always: bool
    logprobs: int | None
    seed: int
    priority: int
    prompt_logprobs: int | None = None
    echo: int | None = None

    def seed_of(self, choice: int) -> int:
        """The seed of a choice."""
        return (self.seed + choice * SEED_STEP) % SEEDS

    def of_request(self) -> dict[str, Any]:
        """The fields of the first choice's request. As in vLLM's API, a smaller priority is served first."""
        prompt = max((count for count in (self.prompt_logprobs, self.echo) if count is not None), default=None)
        reported = {"logprobs": self.logprobs, "prompt_logprobs": prompt}
        return {**self.fields, **reported, "seed": self.seed, "priority": -self.priority}


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A boolean field; null is the default. Raises ApiError for another type."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refused(f"{name} is {describe(value)}; it must be true or false.", name)
    return value


def whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    """A whole number; null is None. Raises ApiError for another type or a value out of range."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refused(f"{name} is {describe(value)}; it must be a whole number.", name, "invalid_type")
    if not least <= value <= most:
        raise refused(f"{name}={value} must be at least {least} and at most {most}.", name)
    return value


def read(
    body: Mapping[str, Any], model: str, limits: tuple[str, ...], logprobs: int | None, echo: int | None = None
) -> Asked:
    """Read the common fields. `limits`: the names of the most new tokens, which must not contradict each other.

    `echo`: the number of most likely ids to report for each token of an echoed prompt.

    Raises ApiError with the field.
    """
    fields = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    if fields.get("top_k") == -1:
        # vLLM's way to say all.
        fields["top_k"] = 0
    _check_stops(fields.get("stop"))
    given = {name: body[name] for name in limits if body.get(name) is not None}
    if len({*map(str, given.values())}) > 1:
        raise refused(f"{' and '.join(given)} contradict each other. Give one of them.", next(iter(given)))
    for name in given:
        fields["max_new_tokens"] = whole(body, name, 1, 2**31 - 1)
    stream = flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise refused(f"stream_options is {describe(options)}; it must be an object.", "stream_options")
    if options is not None and not stream:
        raise refused("stream_options is for stream=true only. Leave it out, or set stream=true.", "stream_options")
    options = options or {}
    choices = whole(body, "n", 1, MOST_CHOICES) or 1
    best_of = whole(body, "best_of", 1, MOST_CHOICES)
    if best_of is not None and best_of != choices:
        raise refused(f"best_of={best_of} is not supported. Leave it out, or ask for n={best_of} answers.", "best_of")
    seed = whole(body, "seed", -(1 << 63), SEEDS - 1)
    prompt = whole(body, "prompt_logprobs", 0, MOST_TOP_LOGPROBS)
    if prompt is not None and stream:
        raise refused("prompt_logprobs is for whole answers only. Leave it or stream=true out.", "prompt_logprobs")
    continuous = flag(options, "continuous_usage_stats")
    return Asked(
        model=model,
        fields=fields,
        choices=choices,
        stream=stream,
        usage=flag(options, "include_usage") or continuous,
        usage_always=continuous,
        logprobs=logprobs,
        priority=whole(body, "priority", -LARGEST, LARGEST) or 0,
        prompt_logprobs=prompt,
        echo=echo,
        seed=secrets.randbits(63) if seed is None else seed % SEEDS,
    )


def _check_stops(given: Any) -> None:
    """Bound stop strings, which are searched for after every token. The processor checks their types."""
    stops = given if isinstance(given, list) else [given] if isinstance(given, str) else []
    if len(stops) > MOST_STOPS or sum(len(stop) for stop in stops if isinstance(stop, str)) > MOST_STOP_LETTERS:
        raise refused(f"stop may have at most {MOST_STOPS} strings and {MOST_STOP_LETTERS} characters in all.", "stop")
