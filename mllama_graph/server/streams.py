"""Writes a step's events to all streams at once.

Each write to a socket takes some microseconds, and a write that releases the interpreter lock may wait for the engine
to give it back. So all of a step's events are sent by one call that does not hold it.
"""

import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import CDLL, c_char_p, c_int64, c_void_p
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mllama_graph import native

# The key of a request's scope under which a connection gives itself.
STREAM = "mllama.stream"

# Sends each part to the socket with this file number, and returns how many bytes each one has taken.
Send = Callable[[Sequence[int], Sequence[bytes]], Sequence[int]]


class Stream(Protocol):
    """A connection that streams an answer."""

    # The socket's file number; None if what is written to it is encrypted.
    handle: int | None
    # Where bytes go that the socket does not take at once.
    transport: Any

    def takes(self) -> bool:
        """Whether the client has read enough of what was written before."""

    def framed(self, data: bytes) -> bytes:
        """A part of a body as it is sent."""


class Outbox:
    """The events of a step, on their way to their streams. Used in the event loop's thread only."""

    def __init__(self) -> None:
        self._parts: dict[Stream, bytes] = {}
        self.send: Send = send_each

    def add(self, stream: Stream, data: bytes) -> None:
        """Add bytes to a stream. They leave with `flush`."""
        self._parts[stream] = self._parts.get(stream, b"") + data

    def flush(self) -> None:
        """Send all bytes. What a socket does not take, or a transport must encrypt, goes to the transport's buffer."""
        parts, self._parts = self._parts, {}
        handles, direct = [], []
        for stream, data in parts.items():
            if stream.handle is None or stream.transport.get_write_buffer_size():
                stream.transport.write(data)
            else:
                handles.append(stream.handle)
                direct.append(stream)
        if not direct:
            return
        sent = self.send(handles, [parts[stream] for stream in direct])
        for stream, count in zip(direct, sent, strict=True):
            if count < len(parts[stream]):
                # If the client has left, the transport finds out.
                stream.transport.write(parts[stream][count:])


def send_each(handles: Sequence[int], parts: Sequence[bytes]) -> list[int]:
    """Send each part by a call of its own, where the library can't be built."""
    sent = [0] * len(parts)
    for n, (handle, part) in enumerate(zip(handles, parts, strict=True)):
        with suppress(OSError):
            sent[n] = os.write(handle, part)
    return sent


def sender(folder: Path, say: Callable[[str], None]) -> Send:
    """What sends a step's events by one call. `folder` holds native libraries; the call is built if it does not."""
    try:
        call = CDLL(str(native.build("streams", folder))).send_all
    except native.BuildError as error:
        say(f"each stream is written to by itself, which is slower: {error}")
        return send_each
    call.argtypes, call.restype = (c_int64, c_void_p, c_void_p, c_char_p, c_void_p), None

    def send(handles: Sequence[int], parts: Sequence[bytes]) -> Sequence[int]:
        to, ends = array("i", handles), array("q", accumulate(map(len, parts)))
        sent = array("q", bytes(8 * len(parts)))
        call(len(parts), to.buffer_info()[0], ends.buffer_info()[0], b"".join(parts), sent.buffer_info()[0])
        return sent

    return send
