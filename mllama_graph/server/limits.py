"""Limits of what clients may send and of what waits: bodies, requests, tokens and pixels."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mllama_graph.inputs.request import Request
from mllama_graph.server.errors import ApiError

# Bodies that may be held at a time, as a multiple of the largest one.
BODIES = 4
# Headers of an answer to a body of which the rest is not read.
BUSY = {"retry-after": "2", "connection": "close"}


@dataclass(frozen=True)
class Bounds:
    """The largest values that are accepted.

    body: bytes of a body, and body_seconds the time that it may take to arrive. requests, tokens, pixels: what may be
    open at a time, summed over requests that run or wait (tokens: of prompts and of the most new ones; pixels: of
    decoded pictures). picture_pixels, pictures: of one picture, and pictures in one request. seconds: from a request's
    arrival to its end.
    """

    body: int
    body_seconds: float
    requests: int
    tokens: int
    pixels: int
    picture_pixels: int
    pictures: int
    seconds: float


class Bodies:
    """Bytes of bodies that are read or prepared at present, all together."""

    def __init__(self, most: int):
        self._most, self.held = most, 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes until the context ends. It raises ApiError (429) beyond the bound."""
        own = 0

        def add(count: int) -> None:
            nonlocal own
            if own and self.held + count > self._most and self.held > own:
                raise ApiError(429, "too many large requests at a time. Try again later.", None, "queue_full", BUSY)
            own, self.held = own + count, self.held + count

        try:
            yield add
        finally:
            self.held -= own


@dataclass
class Load:
    """What is open at present, and what has been refused."""

    requests: int = 0
    tokens: int = 0
    pixels: int = 0


class Admission:
    """Admits requests within the bounds. Used in the event loop's thread only."""

    def __init__(self, bounds: Bounds, rows: int):
        self.bounds, self.load, self._rows = bounds, Load(), rows
        self.bodies = Bodies(BODIES * bounds.body)
        # Seconds that a request has taken lately, for Retry-After.
        self._usual = 1.0

    def check(self, count: int) -> None:
        """Raises ApiError (429) where `count` more requests don't fit, before anything is prepared for them."""
        if self.load.requests + count > self.bounds.requests:
            raise self._full(f"{self.load.requests} requests are open, at most {self.bounds.requests} may be")

    def admit(self, requests: list[Request]) -> Load:
        """Count prepared requests as open, and return what `release` takes. Raises ApiError (429) beyond a bound."""
        self.check(len(requests))
        more = Load(len(requests), sum(len(r.ids) + r.max_new for r in requests), pixels_of(requests))
        load, bounds = self.load, self.bounds
        # A single request that is larger than a bound runs alone: other limits have admitted it.
        if load.requests and load.tokens + more.tokens > bounds.tokens:
            raise self._full(f"{load.tokens} tokens are queued, at most {bounds.tokens} may be")
        if load.requests and load.pixels + more.pixels > bounds.pixels:
            raise self._full(f"pictures of {load.pixels} pixels are queued, at most {bounds.pixels} may be")
        load.requests, load.tokens, load.pixels = (
            load.requests + more.requests,
            load.tokens + more.tokens,
            load.pixels + more.pixels,
        )
        return more

    def release(self, more: Load, seconds: float) -> None:
        """Undo `admit` for requests that took `seconds`."""
        self.load.requests -= more.requests
        self.load.tokens -= more.tokens
        self.load.pixels -= more.pixels
        self._usual += 0.1 * (seconds - self._usual)

    def _full(self, why: str) -> ApiError:
        wait = max(1, min(60, math.ceil(self._usual * self.load.requests / max(self._rows, 1))))
        return ApiError(
            429, f"the queue is full: {why}. Try again later.", None, "queue_full", {"retry-after": str(wait)}
        )


def pixels_of(requests: list[Request]) -> int:
    """Pixels of the tiles that some requests hold; a tile that several of them share counts once."""
    images = {image.key: image.data.size // 3 for request in requests for image in request.images}
    return sum(images.values())
