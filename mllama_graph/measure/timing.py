"""The cases that task=bench measures, and their times."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """Requests measured together: `batch` requests of `length` ids and `images` images, with `new` tokens timed.

    cached: the first ids of each, about as many, are found in pages of random K/V instead of being computed.
    """

    batch: int
    length: int
    images: int
    new: int
    cached: int = 0


@dataclass
class Timing:
    """Seconds of one case: one value per repetition, in `steps` one per decode step. `who`: the engine's name.

    `others`: cores that other processes took meanwhile.
    """

    who: str
    image: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    # Sampling the first tokens, which is part of prefill.
    sample: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    # The first token of requests whose images are cached.
    again: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
