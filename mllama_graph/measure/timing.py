"""What task=bench measures: cases, and the times of each."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """Requests that are measured together: `batch` of `length` text ids and `images` images each, `new` tokens timed."""

    batch: int
    length: int
    images: int
    new: int


@dataclass
class Timing:
    """Seconds of one case: one value per repetition; `steps`: one per decode step. `who`: this engine, or another."""

    who: str
    image: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    # Sampling the first tokens, which is part of prefill.
    sample: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    # The first token of requests whose images are known already.
    again: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
