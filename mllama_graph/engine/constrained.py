"""Requests whose text must satisfy a grammar: which ids may come next, and when the text is complete.

The state of a grammar lives beside the scheduler, with rank 0. It follows the ids that a request has, so it needs no
rollback where a sequence is preempted: the sequence keeps its ids. Ranks get a mask with each row that samples.
"""

from collections.abc import Callable
from dataclasses import replace

from mllama_graph.engine.steps import DecodeStep, PrefillStep, Row, Step
from mllama_graph.inputs.structured import Grammar, any_allowed, reason


class Constraint:
    """The grammar of one running request. `error`: why it can't go on, or ""."""

    def __init__(self, grammar: Grammar):
        self._matcher, self._vocab = grammar.matcher(), grammar.vocab
        # Bytes of the int32 words that hold a bit for each id that has a logit.
        self._bytes = -(-grammar.vocab // 32) * 4
        self.error = ""

    def mask(self) -> bytes:
        """The ids that may come next (Row.mask); empty where there are none, with the reason in `error`."""
        mask = self._matcher.compute_bitmask()[: self._bytes]
        if self._failed():
            return b""
        if not any_allowed(mask, self._vocab):
            self.error = "the grammar allows no token that the model generates"
            return b""
        return mask

    def accept(self, id: int) -> None:
        """Go on by an id. An id that the grammar does not allow sets `error`."""
        if not self._matcher.consume_token(id):
            self.error = self.error or f"the grammar does not allow the id {id}"

    @property
    def complete(self) -> bool:
        """Whether the text is complete: nothing can follow."""
        return not self.error and self._matcher.is_stopped()

    def _failed(self) -> bool:
        if error := self._matcher.get_error():
            self.error = f"the grammar can't be followed any further: {reason(error)}"
        return bool(self.error)


def masked(step: Step, constraint_of: Callable[[int], Constraint | None]) -> Step:
    """The step with a mask in each row that samples a token of a constrained request.

    `constraint_of` gives the constraint of a sequence; None for other requests and for ids that are forced.
    """

    def with_mask(row: Row) -> Row:
        constraint = constraint_of(row.sequence)
        return row if constraint is None else replace(row, mask=constraint.mask())

    if isinstance(step, PrefillStep):
        return replace(step, row=with_mask(step.row)) if step.sample else step
    if isinstance(step, DecodeStep):
        rows = tuple(map(with_mask, step.rows))
        return step if rows == step.rows else replace(step, rows=rows)
    return step
