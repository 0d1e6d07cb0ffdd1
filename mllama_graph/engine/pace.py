"""How many prompt tokens a step computes beside decoding sequences, and in which steps, as measured times allow."""

from mllama_graph.engine.steps import DecodeStep, PrefillStep, Step, decoded

# The target for the mean time of steps while prompts are computed, as a multiple of a step that only decodes the same
# sequences and their proposals. Below 2, the bound of docs/performance.md, since single steps vary.
RATIO = 1.75
# The fewest prompt tokens of a step. Fewer would read a long prompt's keys and values for the work of too few rows.
LEAST = 4
# The weight of a new time in a moving average: low, since a single step may be late.
WEIGHT = 0.2
# Decode steps after which the time of a number of rows that none of them had is forgotten.
KEPT = 64
# The most steps with prompt tokens before one that only decodes, whose time is the measure of theirs.
MOST = 64


class Times:
    """Moving averages of the seconds of steps, by their number of rows."""

    def __init__(self) -> None:
        # The average, the number of times in it, and the step of the last one.
        self._known: dict[int, tuple[float, int, int]] = {}
        self._steps = 0

    def learn(self, rows: int, seconds: float) -> float:
        """Add a step's time, and return the average."""
        self._steps += 1
        mean, count, at = self._known.get(rows, (seconds, 0, self._steps))
        if not count or self._steps - at > KEPT:
            mean, count = seconds, 0
        elif count == 1:
            # The first step of its kind may have loaded a graph.
            mean = min(mean, seconds)
        else:
            # Capped: a step that waited for something else says nothing about the next ones.
            mean += WEIGHT * (min(seconds, 2 * mean) - mean)
        self._known[rows] = mean, count + 1, self._steps
        return mean

    def of(self, rows: int) -> float | None:
        """The average for a number of rows; None if no two steps had as many, or not for long."""
        mean, count, at = self._known.get(rows, (0.0, 0, 0))
        return mean if count > 1 and self._steps - at <= KEPT else None

    def nearest(self, rows: int) -> int | None:
        """The largest known number of rows up to `rows`, or else the smallest one; None if none is known."""
        known = [some for some in self._known if self.of(some) is not None]
        return max((some for some in known if some <= rows), default=min(known, default=None))


class Pace:
    """`room`: the most prompt tokens per step beside decoding sequences. It begins at `first` and is at most `most`.

    `room` changes by factors, so that it settles within a few steps for any model, context and machine. Where even
    LEAST tokens take more than the target, as after many earlier tokens, steps that only decode come between, so that
    the mean is the target. The measure is the time of a decode step of as many sequences and proposals.
    """

    def __init__(self, first: int, most: int):
        self.room, self.most = first, most
        self._alone, self._least = Times(), Times()
        # Seconds by which steps with prompt tokens exceeded the target, less what other steps made up for. Negative at
        # most by what one step that only decodes makes up for.
        self._debt = 0.0
        self._beside = 0

    def admits(self, decoding: int) -> bool:
        """Whether the next step may compute prompt tokens beside so many decoding sequences."""
        return self._debt <= 0 and self._beside < MOST and self._alone_of(decoding) is not None

    def took(self, step: Step, seconds: float) -> None:
        """Learn the time of a step."""
        if isinstance(step, DecodeStep):
            alone = self._alone.learn(decoded(step), seconds)
            self._owe(-(RATIO - 1) * alone, alone)
            self._beside = 0
        elif isinstance(step, PrefillStep) and step.decoding and (measure := self._alone_of(decoded(step))):
            target = RATIO * measure
            self._beside += 1
            new = sum(len(row.ids) for row in step.rows[step.decoding :])
            if seconds > target:
                # In proportion to the excess, but at most by half: one late step may have other causes.
                self.room = max(LEAST, min(self.room, int(new * max(0.5, target / seconds))))
            elif new >= self.room:
                self.room = min(self.most, self.room + max(1, self.room // 8))
            if new <= LEAST:
                self._owe(self._least.learn(decoded(step), seconds) - target, measure)

    def _owe(self, seconds: float, alone: float) -> None:
        """Add to the debt. alone: the time of a step that only decodes."""
        self._debt = max(-(RATIO - 1) * alone, self._debt + seconds)

    def _alone_of(self, rows: int) -> float | None:
        """The time of a decode step of so many token rows, or of the nearest number that is known."""
        known = self._alone.nearest(rows)
        return None if known is None else self._alone.of(known)
