"""The field `usage` of answers."""

from collections.abc import Sequence
from typing import Any

from mllama_graph.engine.results import Result
from mllama_graph.inputs.request import Request


def usage_of(
    requests: Sequence[Request], results: Sequence[Result], choices: int, new: int | None = None
) -> dict[str, Any]:
    """Tokens of prompts and answers. A prompt counts once for all its `choices`, as in OpenAI's answers.

    `new`: the number of new tokens so far, where there are no results yet.
    """
    prompt = sum(len(request.ids) for request in requests[::choices])
    new = sum(len(result.token_ids) for result in results) if new is None else new
    # Of each prompt's choices, the one that found most.
    found: dict[int, int] = {}
    for result in results:
        at = result.id.index // choices
        found[at] = max(found.get(at, 0), result.cached_tokens)
    cached = sum(found.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
