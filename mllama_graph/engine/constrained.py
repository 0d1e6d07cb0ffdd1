"""Requests whose text must satisfy a grammar: which ids may come next, and when the text is complete.

The state of a grammar lives beside the scheduler, with rank 0. It follows the ids that a request has, so it needs no
rollback where a sequence is preempted: the sequence keeps its ids. Ranks get a mask with each row that samples.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from mllama_graph.engine.steps import DecodeStep, PrefillStep, Row, Step, sampled
from mllama_graph.inputs.structured import Grammar, any_allowed, reason

# The most ids to look ahead, which takes about 6 ms with 128k ids.
MOST_LOOKED = 128


class Constraint:
    """The grammar of one running request, which ends after `limit` ids. `error`: why it can't go on, or "".

    As the limit nears, what is open is closed: where a string, an object or a list may end, it must. The answer then
    is complete at the limit, where it would otherwise be cut off. What the model must still choose, it chooses.

    Where the grammar waits for a text that begins in a certain way, such as a tool call, any id is allowed before, and
    for ever if the text begins otherwise.
    """

    def __init__(self, grammar: Grammar, limit: int):
        self._grammar, self._matcher, self._left = grammar, grammar.matcher(), limit
        # Bytes of the int32 words that hold a bit for each id that has a logit.
        self._bytes = -(-grammar.vocab // 32) * 4
        # Whether to close, and with how many ids left to think of it again; 0 for never.
        self._closing, self._think = False, limit
        self.error = ""
        # The ids so far, while it is open whether the text begins as the grammar's texts do; None afterwards.
        self._before: tuple[int, ...] | None = () if grammar.waits else None
        self._free = False

    def mask(self) -> bytes:
        """The ids that may come next (Row.mask): empty for all, or for none, with the reason in `error`."""
        if self._free or self._before is not None:
            return b""
        mask = self._matcher.compute_bitmask()[: self._bytes]
        if error := self._matcher.get_error():
            self.error = f"the grammar can't be followed any further: {reason(error)}"
            return b""
        if not any_allowed(mask, self._grammar.vocab):
            self.error = "the grammar allows no token that the model generates"
            return b""
        if self._left <= self._think and not self._closing:
            self._look_ahead()
        if self._closing:
            return self._grammar.closers.among(int.from_bytes(mask, "little")).to_bytes(self._bytes, "little")
        return mask

    def after(self, ids: Sequence[int]) -> list["Constraint"]:
        """What constrains the token after each of some ids: copies, as they would be if these ids came one by one.

        They end before the first id that the grammar does not allow, or that completes the text.
        """
        found, last = [], self
        for id in ids:
            # Taking a mask may decide to close what is open.
            last.mask()
            last = copy(last)
            last._matcher = last._matcher.deep_copy()
            last.accept(id)
            if last.error or last.complete:
                break
            found.append(last)
        return found

    def accept(self, id: int) -> None:
        """Go on by an id. An id that the grammar does not allow sets `error`."""
        self._left -= 1
        if self._free:
            return
        if self._before is not None:
            self._wait(id)
        elif not self._matcher.consume_token(id):
            self.error = self.error or f"the grammar does not allow the id {id}"

    @property
    def complete(self) -> bool:
        """Whether the text is complete: nothing can follow."""
        return not self.error and self._matcher.is_stopped()

    def _wait(self, id: int) -> None:
        """Take note of an id before the text is known to be the grammar's."""
        assert self._before is not None
        self._before = (*self._before, id)
        begun = self._grammar.begun(self._before)
        if begun is None:
            return
        ids, self._before = self._grammar.plain(self._before), None
        # A call in a form that the grammar does not have stays free, too.
        self._free = not begun or self._matcher.try_consume_tokens(ids) < len(ids)

    def _look_ahead(self) -> None:
        """Decide whether it is time to close. The more ids are left beyond those needed, the later the next look."""
        needed = closing_ids(self._matcher.deep_copy(), self._grammar, min(self._left, MOST_LOOKED))
        if needed is None:
            # Not found: the shortest text may be too long for the limit.
            self._think = self._left // 2
            return
        # What the model chooses meanwhile, and what it opens by one id, may need more.
        spare = self._left - needed - needed // 2 - 8
        self._closing = spare <= 0
        self._think = self._left - max(1, spare // 3)


def closing_ids(matcher: Any, grammar: Grammar, most: int) -> int | None:
    """The number of ids with which a text can be closed, or a little more; None if that is above `most`.

    Moves the matcher on. Where the model would choose, the lowest id is taken, but not twice in a row: -0.000 may need
    another digit.
    """
    known, last = (1 << grammar.vocab) - 1, -1
    for count in range(most + 1):
        if matcher.is_stopped():
            return count
        found = grammar.closers.among(int.from_bytes(matcher.compute_bitmask(), "little") & known)
        id = (found & -found).bit_length() - 1
        last = id if id != last else found.bit_length() - 1
        if not found or not matcher.consume_token(last):
            return None
    return None


def masked(step: Step, constraints_of: Callable[[int], Sequence[Constraint]]) -> Step:
    """The step with masks in each row that samples tokens of a constrained request.

    `constraints_of` gives the constraint of a sequence and those after its proposed ids; none for other requests and
    for ids that are forced.
    """

    def with_mask(row: Row, most: int) -> Row:
        masks = tuple(constraint.mask() for constraint in constraints_of(row.sequence)[:most])
        return replace(row, mask=masks[0], later_masks=masks[1:]) if masks else row

    if not isinstance(step, (PrefillStep, DecodeStep)):
        return step
    # The rows that sample are first.
    first = sampled(step)
    new = [len(row.ids) for row in step.rows[: step.decoding]] + [1] * (first - step.decoding)
    rows = (*map(with_mask, step.rows, new), *step.rows[first:])
    return step if rows == step.rows else replace(step, rows=rows)
