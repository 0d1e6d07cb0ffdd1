"""Connections: uvicorn's protocol on httptools, with bounds on the head of a request and on waiting for it."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mllama_graph.server.answers import to_json
from mllama_graph.server.errors import ApiError
from mllama_graph.server.streams import STREAM

# The most bytes of a request's first line and headers, and the seconds in which they must arrive.
MOST_HEAD, HEAD_SECONDS = 64 << 10, 20.0
# Seconds that a connection may wait for its next request: longer than clients keep theirs, so that none is closed while
# a client begins to use it (httpx: 5 s, nginx: 60 s).
KEEP_ALIVE_SECONDS = 75
# Seconds in which a client may read the answer to a body that is not read to its end.
LINGER_SECONDS = 2.0


class _Lingering:
    """A transport that, when it is closed before the request's body has arrived, ends after the client has read.

    Closing at once would reset the connection, and the client would lose the answer that it has not read yet.
    """

    def __init__(self, transport: Any, connection: "Connection"):
        self._transport, self._connection = transport, connection
        # What is used for every token.
        self.write, self.is_closing = transport.write, transport.is_closing
        self.get_write_buffer_size = transport.get_write_buffer_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._connection.linger():
            self._transport.close()
        elif self._transport.can_write_eof():
            self._transport.write_eof()


class _ToTheEnd(int):
    """The length of a body that lasts until the connection ends, as uvicorn counts down what is left to send."""

    def __lt__(self, other: int) -> bool:
        return False

    def __sub__(self, other: int) -> "_ToTheEnd":
        return self


class Connection(HttpToolsProtocol):
    """One connection. Clients that send no head, a slow one or an endless one are disconnected."""

    _lingering = False
    _chunked = True
    # The socket's file number; None if what is written to it is encrypted.
    handle: int | None = None
    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.transport = cast(Any, _Lingering(transport, self))
        if transport.get_extra_info("sslcontext") is None:
            self.handle = transport.get_extra_info("socket").fileno()
        self._expect_head()

    def linger(self) -> bool:
        """Whether to wait with closing, since the client still sends a body that nobody reads. Asked once."""
        if self._lingering or self.cycle is None or not self.cycle.more_body or not self.cycle.response_complete:
            return False
        self._lingering = True
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[STREAM] = self
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        self._chunked = self.scope["http_version"] != "1.0"
        if self.cycle is not None and not self._chunked:
            # Such a client knows no chunks (RFC 9112, section 6.1).
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, _ToTheEnd(0)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
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

    def takes(self) -> bool:
        """Whether the client has read enough of what was written before."""
        return not self.flow.write_paused and not self.transport.is_closing()

    def framed(self, data: bytes) -> bytes:
        """A part of a streamed body as it is sent."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

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
