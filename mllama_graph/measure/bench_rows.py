"""The rows of bench.csv, one per case and engine: measured times beside their floors."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllama_graph.measure.limits import Limits
from mllama_graph.measure.timing import Case, Timing
from mllama_graph.model.formats import FLOAT, Storage
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.buckets import Plan
from mllama_graph.plan.cost import kv_bytes, sizes, step_work, work

# The columns that MindIE's example writes, in its order.
SEED_COLUMNS = (
    "batch",
    "input_len",
    "output_len",
    "embedding_len",
    "first_token_time(ms)",
    "non_first_token_time(ms)",
    "ResponseTime(ms)",
    "E2E Throughput Average(Tokens/s)",
)
OURS = "mllama_graph"
# Precedes the number of busy processes in the name of an engine's turns beside them.
BESIDE = ", busy neighbours: "
MS = 1e3
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The model under measurement. storage: what weights and pages are stored in. planned: modelled bytes of a rank.

    most: returns the measured peak of rank 0's process in bytes.
    """

    shape: ModelShape
    plan: Plan
    storage: Storage
    planned: int
    most: Callable[[], int]

    def floor(self, moved: float, flops: float, limits: Limits, part: str = "text.") -> float:
        """Seconds for bytes or operations of a part, whichever take longer.

        Bytes alone count where it rounds activations: such products are faster than those in fp32, whose rate is the
        one that is measured.
        """
        rounds = any(form.activations != FLOAT and path.startswith(part) for path, form in self.storage.formats)
        return max(moved / limits.bytes_per_second, 0.0 if rounds else flops / limits.flops)


def middle(ceilings: Sequence[Limits]) -> Limits:
    """The medians of several measurements of the limits."""
    return Limits(statistics.median(c.bytes_per_second for c in ceilings), statistics.median(c.flops for c in ceilings))


def row_of(on: Measured, case: Case, timing: Timing, ceilings: Sequence[Limits]) -> Row:
    """A row of bench.csv. `ceilings`: the limits measured around each repetition's decode steps.

    The floor's share of a step is the median over repetitions, each with its own limits.
    """
    image_tokens = case.images * on.shape.vision.max_tiles * on.shape.vision.tokens
    keys, image_keys = case.batch * (case.length + case.new // 2), case.batch * image_tokens
    moved, flops = step_work(
        on.shape, case.images > 0, case.batch, keys, image_keys, (keys, image_keys), case.batch, on.storage
    )
    ceiling, steps = middle(ceilings), _median_steps(timing, len(ceilings))
    whole, first, step = statistics.median(timing.whole), _median_ms(timing.first), _median_ms(timing.steps)

    def share(bound: Callable[[Limits], float]) -> float:
        return round(statistics.median(bound(c) / s for c, s in zip(ceilings, steps)), 4)

    first_floor = _first_floor(on, case, image_tokens, ceiling)
    self_kv, image_kv = kv_bytes(on.shape, keys, image_keys, on.storage)
    ours = timing.who.startswith(OURS)
    seed = (
        case.batch,
        case.length,
        case.new,
        image_tokens,
        first,
        step,
        _ms(whole),
        round(case.batch * case.new / whole, 3),
    )
    return dict(zip(SEED_COLUMNS, seed)) | {
        "engine": timing.who,
        "images": case.images,
        "image_ms": _median_ms(timing.image),
        "vision_ms": _median_ms(timing.vision),
        "prefill_ms": _median_ms(timing.prefill),
        "first_sample_ms": _median_ms(timing.sample),
        "first_token_ms_least": _ms(min(timing.first)),
        "first_token_ms_most": _ms(max(timing.first)),
        "first_token_again_ms": _median_ms(timing.again),
        "decode_ms_least": _ms(min(timing.steps)),
        "decode_ms_99th": _ms(_99th(timing.steps)),
        "decode_ms_most": _ms(max(timing.steps)),
        "decode_tokens_per_s": round(case.batch * MS / step, 3),
        "decode_floor_ms": _ms(on.floor(moved, flops, ceiling)),
        "decode_of_floor": share(lambda limits: on.floor(moved, flops, limits)),
        "first_token_floor_ms": _ms(first_floor),
        "first_token_of_floor": round(first_floor * MS / first, 4),
        "read_of_limit": share(lambda limits: moved / limits.bytes_per_second),
        "flops_of_limit": share(lambda limits: flops / limits.flops),
        "decode_bytes": round(moved),
        "decode_flops": round(flops),
        "weight_bytes": sizes(on.shape, on.storage).total,
        "self_kv_bytes": self_kv,
        "image_kv_bytes": image_kv,
        "planned_bytes": on.planned if ours else "",
        "most_bytes": on.most() if ours else "",
        "others_cores": round(max(timing.others), 2) if timing.others else "",
        "read_gb_per_s": round(ceiling.bytes_per_second / 1e9, 3),
        "product_gflop_per_s": round(ceiling.flops / 1e9, 3),
    }


def _ms(seconds: float) -> float:
    return round(seconds * MS, 3)


def _median_ms(seconds: Sequence[float]) -> Any:
    """The median in milliseconds; "" where nothing was measured."""
    return _ms(statistics.median(seconds)) if seconds else ""


def _99th(seconds: Sequence[float]) -> float:
    """The step that 99 % of the steps do not exceed."""
    return sorted(seconds)[-(len(seconds) // 100) - 1]


def _median_steps(timing: Timing, repetitions: int) -> list[float]:
    """The median decode step of each repetition, in seconds."""
    each = len(timing.steps) // repetitions
    return [statistics.median(timing.steps[at * each : (at + 1) * each]) for at in range(repetitions)]


def _first_floor(on: Measured, case: Case, image_tokens: int, ceiling: Limits) -> float:
    """The floor of a batch's first tokens in seconds: the prefill of each prompt and the encoding of each image."""
    new = case.length - case.cached
    seen = new * (case.cached + new / 2), new * image_tokens
    moved, flops = step_work(on.shape, case.images > 0, new, case.length, image_tokens, seen, 1, on.storage)
    encode = work(on.shape, on.plan.page_size, on.plan.vision(on.shape.vision.max_tiles), on.storage)
    return case.batch * (on.floor(moved, flops, ceiling) + case.images * on.floor(*encode, ceiling, "vision."))
