"""How many prompt tokens a step takes beside decoding sequences: as many as their latency allows, by measured times."""

from mllama_graph.engine.steps import DecodeStep, PrefillStep, Step

# A step with prompt tokens takes at most this many times one that decodes the same sequences alone. Below 2, the bound
# of docs/performance.md, as single steps vary.
RATIO = 1.75
# The least prompt tokens of a step: up to 8 rows, products take the time of reading their weights.
LEAST = 8
# A decode step's time enters the mean with this weight. Context grows slowly; a single step may be late.
WEIGHT = 0.2


class Pace:
    """The prompt tokens per step beside decoding sequences. `first`: until times are known; `most`: ever.

    Multiplicative changes find the room within a few steps, whatever the model, the context and the machine. The time
    of a step that decodes alone is kept by its number of sequences, and may be older than the prompt beside them.
    """

    def __init__(self, first: int, most: int):
        self.room, self.most = first, most
        # Mean seconds of a step that decodes alone, by its number of sequences.
        self._alone: dict[int, float] = {}

    def took(self, step: Step, seconds: float) -> None:
        """Learn the time of a step."""
        if isinstance(step, DecodeStep):
            rows = len(step.rows)
            mean = self._alone.get(rows, seconds)
            # A step that waited for something else says nothing of the next ones.
            self._alone[rows] = mean + WEIGHT * (min(seconds, 2 * mean) - mean)
        elif isinstance(step, PrefillStep) and (alone := self._alone.get(step.decoding)):
            new = sum(len(row.ids) for row in step.rows[step.decoding :])
            if seconds > RATIO * alone:
                # In proportion to the excess, but not by more than half: one late step may have other reasons.
                self.room = max(LEAST, min(self.room, int(new * max(0.5, RATIO * alone / seconds))))
            elif new >= self.room:
                self.room = min(self.most, self.room + max(1, self.room // 8))
