"""Limits of what clients may send and of what waits: bodies, requests, tokens and pixels."""

import math
from dataclasses import dataclass

from mllama_graph.inputs.request import Request
from mllama_graph.server.errors import ApiError


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
