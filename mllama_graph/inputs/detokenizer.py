"""Converts generated ids to text incrementally, and detects stop strings."""

from collections.abc import Callable, Sequence


class StopStrings:
    """Finds the first stop string in text that arrives in pieces. Holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._text, self._sent = "", 0
        self.stopped = False

    def add(self, piece: str, may_stop: bool = True) -> str:
        """Add a piece and return the text that is now final. Sets `stopped` once a stop string is complete.

        Unless the text may stop, all of it is final: no stop string is looked for in it.
        """
        self._text += piece
        if not may_stop:
            return self._send(len(self._text))
        # Text that was returned before can't be part of a stop string.
        found = [at for stop in self._stops if (at := self._text.find(stop, self._sent)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]
            return self._send(len(self._text))
        held = max((n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
        return self._send(len(self._text) - held)

    def flush(self, rest: str) -> str:
        """The text held back and `rest`, after the last piece."""
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
    """Converts one request's ids to text as they arrive, up to a stop string.

    `step` returns the text that one more id completes, or None for an incomplete character (tokenizers' DecodeStream).
    `decode` returns the text of a whole list of ids.
    """

    def __init__(self, step: Callable[[int], str | None], decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self._step, self._decode, self._stops = step, decode, StopStrings(stops)
        self._ids: list[int] = []
        self._taken = 0
        self._whole = True

    def add(self, id: int, may_stop: bool = True) -> str:
        """Add an id and return the text that is now final. Sets `stopped` once a stop string is complete.

        `may_stop`: see StopStrings.
        """
        self._ids.append(id)
        try:
            piece = (self._step(id) or "") if self._whole else ""
        except Exception:  # tokenizers raises bare Exception
            # These ids can't be decoded one by one; `flush` decodes them as a whole.
            self._whole, piece = False, ""
        self._taken += len(piece)
        return self._stops.add(piece, may_stop)

    def flush(self) -> str:
        """The text held back, after the last id."""
        return self._stops.flush(self._decode(self._ids)[self._taken :])

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text so far, without the stop string; complete after `flush`."""
        return self._stops.text
