"""From generated ids to text as it becomes certain, and stop strings in it."""

from collections.abc import Callable, Sequence


class StopStrings:
    """Finds the first stop string in text that comes in pieces. Holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._text, self._sent = "", 0
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that became certain with this piece. Sets `stopped` once a stop string is complete."""
        self._text += piece
        # What was sent can't be part of a stop string.
        found = [at for stop in self._stops if (at := self._text.find(stop, self._sent)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]
            return self._send(len(self._text))
        held = max((n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
        return self._send(len(self._text) - held)

    def flush(self, rest: str) -> str:
        """What was held back, and `rest`, once no piece will follow."""
        if not self.stopped:
            self._text += rest
        return self._send(len(self._text))

    @property
    def text(self) -> str:
        """All text so far, up to the stop string."""
        return self._text

    def _send(self, upto: int) -> str:
        delta = self._text[self._sent : upto]
        self._sent = max(self._sent, upto)
        return delta


class Detokenizer:
    """Turns one request's ids into text as they come, and ends it at a stop string.

    `step` gives the text that one more id makes certain, or None for an unfinished character (tokenizers' DecodeStream);
    `decode` gives the text of a whole list of ids.
    """

    def __init__(self, step: Callable[[int], str | None], decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self._step, self._decode, self._stops = step, decode, StopStrings(stops)
        self._ids: list[int] = []
        self._taken = 0
        self._whole = True

    def add(self, id: int) -> str:
        """The text that became certain with this id. Sets `stopped` once a stop string is complete."""
        self._ids.append(id)
        try:
            piece = (self._step(id) or "") if self._whole else ""
        except Exception:  # tokenizers raises bare Exception
            # The ids make no text piece by piece; `flush` gives it as a whole.
            self._whole, piece = False, ""
        self._taken += len(piece)
        return self._stops.add(piece)

    def flush(self) -> str:
        """The text that was held back, once no id will follow."""
        return self._stops.flush(self._decode(self._ids)[self._taken :])

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text so far, without the stop string; complete after `flush`."""
        return self._stops.text
