"""Sums over the steps of a run, and the metrics computed from them."""

from dataclasses import asdict, dataclass
from typing import Any

from mllama_graph.engine.results import Result
from mllama_graph.engine.steps import DecodeStep, PrefillStep, Step, VisionStep
from mllama_graph.model.formats import Storage
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.cost import step_bytes


@dataclass
class Totals:
    """Sums over the requests that were served. Times are in milliseconds; `timed`: requests with a time per token."""

    requests: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    first_token_ms: float = 0.0
    per_token_ms: float = 0.0
    timed: int = 0

    def add(self, result: Result) -> None:
        """Add the result of a request that was served."""
        self.requests += 1
        self.prompt_tokens += result.prompt_tokens
        self.image_tokens += result.image_tokens
        self.cached_tokens += result.cached_tokens
        self.new_tokens += len(result.token_ids)
        self.proposed_tokens += result.proposed_tokens or 0
        self.accepted_tokens += result.accepted_tokens or 0
        self.first_token_ms += result.time_to_first_token_ms
        if result.time_per_output_token_ms is not None:
            self.per_token_ms, self.timed = self.per_token_ms + result.time_per_output_token_ms, self.timed + 1


@dataclass
class HostSeconds:
    """Seconds of the host's work in all steps. graph: in graphs, on an asynchronous device only their launch. sample:
    there with waiting for the device.
    """

    schedule: float = 0.0
    inputs: float = 0.0
    graph: float = 0.0
    sample: float = 0.0
    text: float = 0.0

    def per_step(self, steps: int) -> dict[str, float]:
        """Means in microseconds."""
        return {name: round(1e6 * seconds / max(1, steps), 1) for name, seconds in asdict(self).items()}


@dataclass
class Stats:
    """Counts and seconds of each kind of step. `decode_bytes`: bytes that decode steps read, modelled from shapes.

    decode_tokens: those that decode steps gave, proposals that were accepted included.
    """

    vision_steps: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    decode_tokens: int = 0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    # Seconds from the start of the process to its first token; None before that.
    start_to_first_token: float | None = None

    @property
    def steps(self) -> int:
        """The number of steps of every kind."""
        return self.vision_steps + self.prefill_steps + self.decode_steps

    def count(
        self, step: Step, seconds: float, tokens: int, image_tokens: int, shape: ModelShape, storage: Storage
    ) -> None:
        """Add a step that gave `tokens`. `image_tokens`: attended to by all rows. `storage`: of weights and pages."""
        if isinstance(step, VisionStep):
            self.vision_steps, self.vision_seconds = self.vision_steps + 1, self.vision_seconds + seconds
        elif isinstance(step, PrefillStep):
            self.prefill_steps, self.prefill_seconds = self.prefill_steps + 1, self.prefill_seconds + seconds
        elif isinstance(step, DecodeStep):
            self.decode_steps += 1
            self.decode_rows += len(step.rows)
            self.decode_tokens += tokens
            self.decode_seconds += seconds
            keys = sum(row.start + len(row.ids) for row in step.rows)
            self.decode_bytes += step_bytes(shape, image_tokens > 0, keys, image_tokens, storage)

    def metrics(self, finished: Totals, preemptions: int) -> dict[str, Any]:
        """The metrics for result.json: sums over requests, means over steps. Bytes are modelled, times measured."""
        steps = self.decode_steps
        return {
            "requests": finished.requests,
            "prompt_tokens": finished.prompt_tokens,
            "image_tokens": finished.image_tokens,
            "cached_tokens": finished.cached_tokens,
            "new_tokens": finished.new_tokens,
            "start_to_first_token_s": self.start_to_first_token and round(self.start_to_first_token, 2),
            "time_to_first_token_ms": _mean(finished.first_token_ms, finished.requests),
            "time_per_output_token_ms": _mean(finished.per_token_ms, finished.timed),
            "tokens_per_second": round(self.decode_tokens / self.decode_seconds, 3) if steps else None,
            "bytes_per_step": round(self.decode_bytes / steps) if steps else None,
            "gb_per_second": round(self.decode_bytes / self.decode_seconds / 1e9, 3) if steps else None,
            "vision_steps": self.vision_steps,
            "prefill_steps": self.prefill_steps,
            "decode_steps": steps,
            "vision_seconds": round(self.vision_seconds, 4),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "proposed_tokens": finished.proposed_tokens,
            "accepted_tokens": finished.accepted_tokens,
            "preemptions": preemptions,
        }


def _mean(total: float, count: int) -> float | None:
    return round(total / count, 3) if count else None
