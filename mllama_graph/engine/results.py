"""Outputs of a request: the delta of each step, and the finished result."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    """The result of a finished request. If it could not be served, finish_reason is "error" and `error` says why.

    cached_tokens: prompt tokens whose K/V were found from earlier requests. The time to the first token counts from
    submission. Both times are in milliseconds.
    """

    id: Any
    token_ids: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    time_to_first_token_ms: float = 0.0
    time_per_output_token_ms: float | None = None
    logprobs: list[dict[str, Any]] | None = None
    error: str | None = None
    prompt_logprobs: list[dict[str, Any]] | None = None

    def line(self) -> dict[str, Any]:
        """The result as a line of results.jsonl."""
        if self.error is not None:
            return {
                "id": self.id,
                "token_ids": [],
                "text": "",
                "finish_reason": self.finish_reason,
                "error": self.error,
            }
        fields = dict(self.__dict__)
        del fields["error"]
        for name in ("logprobs", "prompt_logprobs"):
            if fields[name] is None:
                del fields[name]
        return fields

    @staticmethod
    def failed(id: Any, error: str) -> "Result":
        """The result of a request that could not be served."""
        return Result(id, [], "", "error", error=error)


@dataclass(frozen=True)
class Delta:
    """The output of one step for one request: its token, its new text, and the result if the request finished.

    A request that could not be served gets one Delta without a token, whose result holds the error. `logprobs`: the
    token's entry of the result's `logprobs`, where the request has them. `prompt_logprobs`: in the first delta, those
    of the result.
    """

    id: Any
    token: int | None
    text: str
    result: Result | None = None
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[dict[str, Any]] | None = None
