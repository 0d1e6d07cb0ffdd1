"""How many prompt tokens a step computes beside decoding sequences: as many as a bound on its measured time allows."""

from mllama_graph.engine.steps import DecodeStep, PrefillStep, Step

# The target for the time of a step with prompt tokens, as a multiple of a step that only decodes the same sequences.
# Below 2, the bound of docs/performance.md, since single steps vary.
RATIO = 1.75
# The fewest prompt tokens of a step: up to 8 rows, products take no longer than reading their weights.
LEAST = 8
# The weight of a new decode step in the moving average of their times: low, since a single step may be late.
WEIGHT = 0.2


class Pace:
    """`room`: the most prompt tokens per step beside decoding sequences. It begins at `first` and is at most `most`.

    `room` changes by factors, so that it settles within a few steps for any model, context and machine. It is compared
    with the last known time of a decode step of as many sequences, which may be from before the prompt arrived.
    """

    def __init__(self, first: int, most: int):
        self.room, self.most = first, most
        # Mean seconds of a step that only decodes, by its number of sequences.
        self._alone: dict[int, float] = {}

    def took(self, step: Step, seconds: float) -> None:
        """Learn the time of a step."""
        if isinstance(step, DecodeStep):
            rows = len(step.rows)
            mean = self._alone.get(rows, seconds)
            # Capped: a step that waited for something else says nothing about the next ones.
            self._alone[rows] = mean + WEIGHT * (min(seconds, 2 * mean) - mean)
        elif isinstance(step, PrefillStep) and (alone := self._alone.get(step.decoding)):
            new = sum(len(row.ids) for row in step.rows[step.decoding :])
            if seconds > RATIO * alone:
                # In proportion to the excess, but at most by half: one late step may have other causes.
                self.room = max(LEAST, min(self.room, int(new * max(0.5, RATIO * alone / seconds))))
            elif new >= self.room:
                self.room = min(self.most, self.room + max(1, self.room // 8))
