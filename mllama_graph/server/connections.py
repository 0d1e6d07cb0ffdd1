"""Connections: uvicorn's protocol on httptools, with bounds on the head of a request and on waiting for it."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mllama_graph.server.answers import WRITE_NOW, to_json
from mllama_graph.server.errors import ApiError

# The most bytes of a request's first line and headers, and the seconds in which they must arrive.
MOST_HEAD, HEAD_SECONDS = 64 << 10, 20.0
# Seconds that a connection may wait for its next request: longer than clients keep theirs, so that none is closed while
# a client begins to use it (httpx: 5 s, nginx: 60 s).
KEEP_ALIVE_SECONDS = 75


class Connection(HttpToolsProtocol):
    """One connection. Clients that send no head, a slow one or an endless one are disconnected."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[WRITE_NOW] = self._write_now
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MOST_HEAD:
                self.send_400_response(f"the head of the request has more than {MOST_HEAD >> 10} KiB.")

    def send_400_response(self, msg: str) -> None:
        body = to_json(ApiError(400, msg, None, "bad_request").body())
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _write_now(self, make: Callable[..., bytes], *arguments: Any) -> bool:
        """Write a part of a streamed body that `make` makes, in the place of a task that would be woken for it.

        Returns False, and makes nothing, where the client has not read enough of what was written before.
        """
        if self.flow.write_paused or self.transport.is_closing():
            return False
        if data := make(*arguments):
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _expect_head(self) -> None:
        self._in_head, self._head = True, 0
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
