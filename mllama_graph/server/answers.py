"""Answers: the whole result as JSON, or a stream of server-sent events, raced against the client's leaving."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mllama_graph.core.errors import UserError
from mllama_graph.engine.results import Delta, Result
from mllama_graph.server.errors import ApiError, of_result
from mllama_graph.server.service import Generation
from mllama_graph.server.streams import STREAM, Stream

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would otherwise collect events before it passes them on.
    (b"x-accel-buffering", b"no"),
]


class Left(Exception):
    """The client has closed its connection: nobody reads an answer."""


class Format(Protocol):
    """How an endpoint shows deltas and results. `index` counts the requests of a Generation."""

    def begin(self) -> bytes:
        """The events before the first token."""

    def delta(self, index: int, delta: Delta) -> bytes:
        """The events of one delta; b"" where it shows nothing."""

    def end(self) -> bytes:
        """The events after the last delta."""

    def failed(self, error: ApiError) -> bytes:
        """The event of an error after which the stream ends."""

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. Values hold no NaN: log-probabilities are made finite."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf8", "replace")


def event(value: Any) -> bytes:
    """A server-sent event with JSON data."""
    return b"data: " + to_json(value) + b"\n\n"


def text_json(text: str) -> bytes:
    """A text as JSON."""
    return quoted(text).encode()


class Answer(Response):
    """A JSON answer."""

    media_type = "application/json"

    def __init__(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(to_json(body), status, headers)


def error_answer(error: ApiError) -> Answer:
    """The answer with an error."""
    return Answer(error.body(), error.status, error.headers)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work` while the client is there. Raises Left, after `work` is cancelled, where the client leaves first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Left
    finally:
        for one in (task, gone):
            one.cancel()
        # Its exception would otherwise be reported as never retrieved.
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(generation: Generation, seconds: float) -> list[Result]:
    """Wait for all results. Raises ApiError where a request fails or takes longer than `seconds`."""
    results: dict[int, Result] = {}
    try:
        async with asyncio.timeout(seconds):
            while len(results) < len(generation.tickets):
                for index, delta in await generation.mailbox.take():
                    if delta.result:
                        results[index] = _good(delta.result, generation)
    except TimeoutError:
        raise deadline(seconds) from None
    return [results[index] for index in sorted(results)]


def _good(result: Result, generation: Generation) -> Result:
    if result.error is not None:
        raise of_result(result.error, generation.grammar)
    return result


class Events(Response):
    """A stream of server-sent events. It ends its generation in any case.

    After an error it sends the error as an event and [DONE], since the status is sent already. `log` is called with
    the reason why a stream ended early.
    """

    def __init__(self, generation: Generation, form: Format, seconds: float, log: Callable[[str], None]):
        self.status_code, self.background, self.body = 200, None, b""
        self.raw_headers = list(STREAM_HEADERS)
        self._generation, self._form, self._seconds, self._log = generation, form, seconds, log
        self._stream: Stream | None = None
        # Whether the task is writing deltas that it took: those that follow must wait for it.
        self._writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stream = scope.get(STREAM)
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                self._log("client left")
        finally:
            self._generation.close()
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds):
                await self._events(send)
        except ApiError as error:
            self._log(error.message)
            await self._fail(send, error)
        except TimeoutError:
            self._log("deadline")
            await self._fail(send, deadline(self._seconds))
        except Exception as error:
            self._log(f"{type(error).__name__}")
            await self._fail(send, ApiError(500, "internal error.", None, "internal_error"))

    async def _events(self, send: Send) -> None:
        generation, form, left = self._generation, self._form, len(self._generation.tickets)
        if first := form.begin():
            await _send(send, first)
        if self._stream is not None:
            generation.mailbox.sink = self._take
        while left:
            parts, self._writing = [], False
            deltas = await generation.mailbox.take()
            self._writing = True
            for index, delta in deltas:
                if delta.result:
                    _good(delta.result, generation)
                    left -= 1
                parts.append(form.delta(index, delta))
            if data := b"".join(parts):
                await _send(send, data)
        await _send(send, form.end(), more=False)

    def _take(self, index: int, delta: Delta) -> bool:
        """Send a delta that is not the last one of its request with its step's others, unless the client is slow."""
        stream = self._stream
        if stream is None or self._writing or delta.result is not None or not stream.takes():
            return False
        if data := self._form.delta(index, delta):
            self._generation.outbox.add(stream, stream.framed(data))
        return True

    async def _fail(self, send: Send, error: ApiError) -> None:
        self._generation.close()
        self._generation.mailbox.sink = None
        # Where the client reads nothing, this would wait for it: the connection is closed instead.
        try:
            async with asyncio.timeout(1.0):
                await _send(send, self._form.failed(error), more=False)
        except (TimeoutError, UserError):
            return


async def _send(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def deadline(seconds: float) -> ApiError:
    """The error of a request that took too long."""
    return ApiError(504, f"the answer was not finished within {seconds:g} s.", None, "deadline_exceeded")
