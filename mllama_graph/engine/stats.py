"""Sums over the steps of a run, and the metrics computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllama_graph.engine.results import Result
from mllama_graph.engine.steps import DecodeStep, PrefillStep, Step, VisionStep
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.cost import step_bytes


@dataclass
class Stats:
    """Counts and seconds of each kind of step. `decode_bytes`: bytes that decode steps read, modelled from shapes."""

    vision_steps: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    # Seconds from the start of the process to its first token; None before that.
    start_to_first_token: float | None = None

    def count(self, step: Step, seconds: float, image_tokens: int, shape: ModelShape, widths: tuple[int, int]) -> None:
        """Add a step. `image_tokens`: attended to, summed over rows. `widths`: bytes per weight and per activation."""
        if isinstance(step, VisionStep):
            self.vision_steps, self.vision_seconds = self.vision_steps + 1, self.vision_seconds + seconds
        elif isinstance(step, PrefillStep):
            self.prefill_steps, self.prefill_seconds = self.prefill_steps + 1, self.prefill_seconds + seconds
        elif isinstance(step, DecodeStep):
            self.decode_steps += 1
            self.decode_rows += len(step.rows)
            self.decode_seconds += seconds
            tokens = sum(row.start + 1 for row in step.rows)
            self.decode_bytes += step_bytes(shape, image_tokens > 0, tokens, image_tokens, *widths)

    def metrics(self, finished: Sequence[Result], preemptions: int) -> dict[str, Any]:
        """The metrics for result.json: sums over requests, means over steps. Bytes are modelled, times measured."""
        steps = self.decode_steps
        per_token = [r.time_per_output_token_ms for r in finished if r.time_per_output_token_ms is not None]
        return {
            "requests": len(finished),
            "prompt_tokens": sum(r.prompt_tokens for r in finished),
            "image_tokens": sum(r.image_tokens for r in finished),
            "new_tokens": sum(len(r.token_ids) for r in finished),
            "start_to_first_token_s": self.start_to_first_token and round(self.start_to_first_token, 2),
            "time_to_first_token_ms": _mean([result.time_to_first_token_ms for result in finished]),
            "time_per_output_token_ms": _mean(per_token),
            "tokens_per_second": round(self.decode_rows / self.decode_seconds, 3) if steps else None,
            "bytes_per_step": round(self.decode_bytes / steps) if steps else None,
            "gb_per_second": round(self.decode_bytes / self.decode_seconds / 1e9, 3) if steps else None,
            "vision_steps": self.vision_steps,
            "prefill_steps": self.prefill_steps,
            "decode_steps": steps,
            "vision_seconds": round(self.vision_seconds, 4),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "preemptions": preemptions,
        }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None
