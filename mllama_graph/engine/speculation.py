"""How many ids are proposed for each decoding sequence, and who proposes them.

At every position, a token is sampled with that position's random draw (engine/sampler.py), which depends on neither the
batch nor the proposals. A proposal is accepted if it equals the token sampled at its position, so the tokens are the
same as without proposals, whatever is proposed. For a proposal that does not depend on the draw, this is rejection
sampling: it is accepted with the model's probability of it, and a token that replaces it follows the distribution
without it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mllama_graph.engine.pace import Times
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import DecodeStep, Step, decoded
from mllama_graph.plan.buckets import Plan

# The share of accepted proposals is a moving average: the least weight of a new outcome, and the share at first.
WEIGHT, FIRST = 0.1, 0.5
# Steps before a single proposal is tried for a sequence whose proposals are not expected to pay, at first and at most.
# Each trial doubles them, until a proposal is accepted.
FIRST_WAIT, LONGEST_WAIT = 16, 128
# The least expected speed-up of a step by proposals: below it, an estimate that is too high would cost more.
LEAST_GAIN = 1.05

# From the sequences that decode to the proposed ids of each, by the sequence's id.
Propose = Callable[[list[Sequence]], Mapping[int, tuple[int, ...]]]


def no_proposals(sequences: list[Sequence]) -> Mapping[int, tuple[int, ...]]:
    """The `Propose` of a run without speculation."""
    return {}


class Proposer(Protocol):
    """Proposes ids that may follow the last id of sequences."""

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[int, tuple[int, ...]]:
        """Proposed ids by the sequence's id. `wanted`: the most for each sequence."""

    def forget(self, id: int) -> None:
        """Forget a sequence that has ended."""

    def close(self) -> None:
        """Release what it holds."""


@dataclass
class Acceptance:
    """What is known of a sequence's proposals. share: the expected share of accepted ones, after `judged` of them.

    waited: steps since the last proposal; one is tried after `wait` of them.
    """

    share: float = FIRST
    judged: int = 0
    wait: int = FIRST_WAIT
    waited: int = 0

    def learn(self, proposed: int, accepted: int) -> None:
        """Add a step's outcome. Proposals after the first rejected one were not judged."""
        for outcome in (1,) * accepted + (0,) * (accepted < proposed):
            # The mean of the first outcomes, and FIRST as if it were one of them.
            self.share += max(WEIGHT, 1 / (self.judged + 2)) * (outcome - self.share)
            self.judged += 1
        if accepted:
            self.wait = FIRST_WAIT


class Speculation:
    """Proposals for decoding sequences. `most`: the most per sequence and step. `cost`: the time that a further row
    adds to a step, as a share of the time of a step with one row, until steps of as many rows were measured.
    """

    def __init__(self, proposer: Proposer, plan: Plan, cost: float):
        self.proposer, self.cost, self.most = proposer, cost, plan.row_tokens - 1
        # The most token rows of a step. Where all sequences are padded to `row_tokens`, this does not limit proposals.
        self._rows = plan.decode_batch[-1] if plan.lengths_are_free else plan.decode_tokens
        self._known: dict[int, Acceptance] = {}
        # Of decode steps by their token rows, and of proposing one id, under 1.
        self._times, self._proposing = Times(), Times()

    def propose(self, rooms: Mapping[Sequence, int]) -> dict[int, tuple[int, ...]]:
        """Proposals for decoding sequences, by their ids; `rooms`: the most ids for each."""
        wanted = self._wanted(rooms)
        if not wanted:
            return {}
        start = time.perf_counter()
        found = {id: ids for id, ids in self.proposer.propose(wanted).items() if ids}
        self._proposing.learn(1, (time.perf_counter() - start) / sum(wanted.values()))
        return found

    def took(self, step: Step, seconds: float) -> None:
        """Learn the time of a step."""
        if isinstance(step, DecodeStep):
            self._times.learn(decoded(step), seconds)

    def learn(self, id: int, proposed: int, accepted: int) -> None:
        """Take note of how many proposals for a sequence were accepted."""
        self._of(id).learn(proposed, accepted)

    def forget(self, id: int) -> None:
        """Forget a sequence that has ended."""
        self._known.pop(id, None)
        self.proposer.forget(id)

    def _wanted(self, rooms: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """How many ids to propose for each sequence, so that the step gives the most tokens per time.

        A further proposal adds a token with the probability that it and all before it are accepted.
        """
        rows = len(rooms)
        tokens, counts, best = float(rows), dict.fromkeys(rooms, 0), dict.fromkeys(rooms, 0)
        most = LEAST_GAIN * tokens / self._seconds(rows, 0)
        able = [sequence for sequence, room in rooms.items() if min(room, self.most) > 0]
        gains = {sequence: self._of(sequence.id).share for sequence in able}
        for proposed in range(1, self._rows - rows + 1):
            if not gains:
                break
            sequence = max(gains, key=gains.__getitem__)
            counts[sequence] += 1
            tokens += gains[sequence]
            gains[sequence] *= self._of(sequence.id).share
            if counts[sequence] == min(self.most, rooms[sequence]):
                del gains[sequence]
            if (rate := tokens / self._seconds(rows + proposed, proposed)) > most:
                most, best = rate, dict(counts)
        rows += sum(best.values())
        for sequence in able:
            known = self._of(sequence.id)
            known.waited = 0 if best[sequence] else known.waited + 1
            if known.waited >= known.wait and rows < self._rows:
                best[sequence], rows, known.waited = 1, rows + 1, 0
                known.wait = min(2 * known.wait, LONGEST_WAIT)
        return {sequence: count for sequence, count in best.items() if count}

    def _seconds(self, rows: int, proposed: int) -> float:
        """The expected time of a step of so many rows and of its proposals; that of a row is 1 if none is known."""
        known = self._times.nearest(rows)
        if known is None:
            return 1 + self.cost * (rows - 1)
        seconds, each = self._times.of(known) or 0.0, self._proposing.of(1) or 0.0
        return seconds * (1 + self.cost * (rows - 1)) / (1 + self.cost * (known - 1)) + each * proposed

    def _of(self, id: int) -> Acceptance:
        return self._known.setdefault(id, Acceptance())
