"""A step's events on their way to many sockets: full, closed and encrypted ones get what they get alone."""

import socket
from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest

from mllama_graph import native
from mllama_graph.server.streams import Outbox, send_each, sender


@dataclass
class Transport:
    """Keeps what is written to it."""

    written: bytes = b""
    waiting: int = 0

    def write(self, data):
        self.written += data

    def get_write_buffer_size(self):
        return self.waiting


@dataclass(eq=False)
class Stream:
    """A stream with the file number of a socket."""

    handle: int | None
    transport: Transport = field(default_factory=Transport)


@pytest.fixture(params=["one call", "a call each"])
def send(request, cache_home):
    said = []
    found = sender(cache_home, said.append) if request.param == "one call" else send_each
    assert not said
    return found


@pytest.fixture
def pair():
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


def test_each_socket_gets_its_own_part(send):
    pairs = [socket.socketpair() for _ in range(40)]
    parts = [b"%d\0" % n * n for n in range(40)]
    assert [*send([ours.fileno() for ours, _ in pairs], parts)] == [*map(len, parts)]
    for (ours, theirs), part in zip(pairs, parts):
        ours.close()
        with theirs, theirs.makefile("rb") as read:
            assert read.read() == part


def test_what_a_full_socket_does_not_take_follows_through_its_transport(send, pair):
    outbox, data = Outbox(), bytes(range(256)) * 40_000
    outbox.send, stream = send, Stream(pair[0].fileno())
    outbox.add(stream, data[:100])
    outbox.add(stream, data[100:])
    outbox.flush()
    read = b""
    while len(read) + len(stream.transport.written) < len(data):
        read += pair[1].recv(1 << 20)
    assert 0 < len(read) < len(data) and read + stream.transport.written == data


def test_a_transport_that_has_bytes_waiting_or_encrypts_gets_all(send, pair):
    outbox, encrypted, behind = Outbox(), Stream(None), Stream(pair[0].fileno(), Transport(waiting=1))
    outbox.send = send
    for stream in (encrypted, behind):
        outbox.add(stream, b"event")
    outbox.flush()
    outbox.flush()
    assert encrypted.transport.written == behind.transport.written == b"event"
    with pytest.raises(BlockingIOError):
        pair[1].recv(1)


def test_a_client_that_has_left_costs_the_others_nothing(send, pair):
    gone, theirs = socket.socketpair()
    theirs.close()
    outbox, left, there = Outbox(), Stream(gone.fileno()), Stream(pair[0].fileno())
    outbox.send = send
    for stream in (left, there):
        outbox.add(stream, b"event")
    outbox.flush()
    # Its transport finds out.
    assert left.transport.written == b"event" and pair[1].recv(10) == b"event"
    gone.close()


def test_without_a_compiler_each_stream_is_written_to_by_itself(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(native, "build", Mock(side_effect=native.BuildError("no compiler")))
    assert sender(tmp_path, said.append) is send_each
    assert said == ["each stream is written to by itself, which is slower: no compiler"]
