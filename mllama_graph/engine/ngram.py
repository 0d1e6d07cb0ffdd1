"""Proposals from a sequence's own ids: what followed the last occurrence of its last few ids (prompt lookup)."""

from array import array
from collections.abc import Mapping

from mllama_graph.engine.sequence import Sequence

# The numbers of last ids that are searched for, the first that occurs earlier is taken.
LENGTHS = (4, 3, 2)


class Ngram:
    """Proposes the ids that followed the last earlier occurrence of a sequence's last ids, in its prompt or output.

    Where they reach the sequence's end, they go on with the proposal itself, as in a text that repeats.
    """

    def __init__(self) -> None:
        # The ids of each sequence in 4 bytes each: a search in 100,000 ids takes a fraction of a millisecond.
        self._ids: dict[int, bytearray] = {}

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[int, tuple[int, ...]]:
        """At most as many ids as are wanted for each sequence, by its id."""
        return {sequence.id: self._next(sequence, count) for sequence, count in wanted.items()}

    def forget(self, id: int) -> None:
        """Forget a sequence that has ended."""
        self._ids.pop(id, None)

    def close(self) -> None:
        pass

    def _next(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        held = self._ids.setdefault(sequence.id, bytearray())
        held += array("i", sequence.ids(len(held) // 4, sequence.length)).tobytes()
        end = len(held)
        for length in LENGTHS:
            if 4 * length >= end:
                continue
            key, at = held[end - 4 * length :], end - 4
            # The end of an occurrence is before that of the sequence. A match between two ids is none.
            while (at := held.rfind(key, 0, at)) >= 0 and at % 4:
                at += 4 * length - 1
            if at >= 0:
                follows = array("i", bytes(held[at + 4 * length : at + 4 * length + 4 * count])).tolist()
                return tuple(follows[n % len(follows)] for n in range(count))
        return ()
