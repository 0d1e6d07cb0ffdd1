"""Clients that leave, read slowly, send slowly or too much, and a full queue: nobody else waits, nothing is kept."""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import BATCH, BOUNDS, wait_until

from mllama_graph.server import connections

ASK = [{"role": "user", "content": "What can you do?"}]
ANSWER = "I can describe simple shapes, count them and read numbers."
LONG = {"messages": ASK, "max_tokens": 1500, "ignore_eos": True}


@contextmanager
def bounded(server, **changes):
    """The server with other bounds."""
    service = server.service
    service.bounds = service.admission.bounds = replace(BOUNDS, **changes)
    try:
        yield
    finally:
        service.bounds = service.admission.bounds = BOUNDS


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows_and_pages(stream, server):
    with server.raw(LONG | {"stream": stream, "n": 2}):
        wait_until(lambda: server.requests == 2)
    wait_until(server.idle, 3.0)


def test_a_client_that_leaves_while_it_waits_frees_its_place(server):
    running = [server.raw(LONG | {"stream": True}) for _ in range(BATCH)]
    wait_until(lambda: server.requests == BATCH)
    waiting = server.raw(LONG)
    wait_until(lambda: server.requests == BATCH + 1)
    waiting.close()
    wait_until(lambda: server.requests == BATCH, 3.0)
    for client in running:
        client.close()
    wait_until(server.idle, 3.0)


def test_a_slow_reader_stalls_nobody_and_makes_room_in_the_queue(server):
    client = socket.socket()
    # A small window, so that the stream does not fit into the system's buffers.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    ask = LONG | {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 300}
    body = json.dumps(ask).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\ncontent-length: {len(body)}"
    )
    client.sendall(f"{head}\r\n\r\n".encode() + body)
    wait_until(lambda: server.requests == 1)
    assert server.post({"messages": ASK}).json()["choices"][0]["message"]["content"] == ANSWER
    wait_until(lambda: server.requests == 0, 60)
    wait_until(lambda: server.service.admission.load.requests == 0, 3.0)
    assert server.service.open, "the answer is not read yet"
    with client, client.makefile("rb") as stream:
        read = b""
        while b"[DONE]" not in read[-200:]:
            read += stream.read1(1 << 16)
    assert read.count(b'"finish_reason":"length"') == 1 and read.count(b'"top_logprobs":[') == 300


def test_a_smaller_priority_is_served_first_and_equal_ones_in_order(server):
    running = [server.raw(LONG) for _ in range(BATCH)]
    wait_until(lambda: server.requests == BATCH)
    with ThreadPoolExecutor(4) as pool:
        for n, priority in enumerate((1, 1, 0, -5)):
            # The number of tokens tells the requests apart in the log.
            pool.submit(server.post, {"messages": ASK, "max_tokens": n + 1, "priority": priority})
            wait_until(lambda n=n: server.requests == BATCH + n + 1)
        # One row becomes free, so that they are served one after the other.
        running.pop().close()
    lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    assert [line["tokens"] for line in lines if line["status"] == 200 and line["tokens"] <= 4][-4:] == [4, 3, 1, 2]
    for client in running:
        client.close()
    wait_until(server.idle)


def test_a_full_queue_is_refused_with_the_time_to_wait(server):
    with bounded(server, requests=2):
        with server.held(), server.raw(LONG), server.raw(LONG):
            wait_until(lambda: server.open == 2)
            answer = server.post({"messages": ASK})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
            assert server.post({"messages": ASK, "n": 3}).status_code == 429
        wait_until(server.idle)
        assert server.post({"messages": ASK}).status_code == 200


@pytest.mark.parametrize("bound", [{"tokens": 2000}, {"pixels": 1000}])
def test_tokens_and_pixels_in_the_queue_are_bounded(bound, server, scene):
    with bounded(server, **bound):
        picture = {"type": "image_url", "image_url": {"url": scene}}
        ask = LONG | {"messages": [{"role": "user", "content": [picture]}]}
        with server.held(), server.raw(ask):
            wait_until(lambda: server.open == 1)
            assert server.post(ask).json()["error"]["code"] == "queue_full"
        wait_until(server.idle)


def test_a_request_that_takes_too_long_ends_with_an_error(server):
    with bounded(server, seconds=0.2):
        answer = server.post(LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        events = server.post(LONG | {"stream": True}).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert events[-2] == "data: [DONE]"
        wait_until(server.idle, 3.0)


def answered(client):
    """The status line and the rest of an answer, up to the end of the connection."""
    with client, client.makefile("rb") as stream:
        return stream.readline().split()[1].decode(), stream.read()


def test_bodies_that_are_slow_or_too_large_end_their_connection(server):
    address = ("127.0.0.1", server.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
    slow = socket.create_connection(address, timeout=10)
    slow.sendall(head + b"content-length: 100\r\n\r\n{")
    large = socket.create_connection(address, timeout=10)
    large.sendall(head + b"content-length: 99999999999\r\n\r\n{")
    chunked = socket.create_connection(address, timeout=10)
    chunked.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(18):
        chunked.sendall(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
    assert answered(large)[0] == "413" and answered(chunked)[0] == "413" and answered(slow)[0] == "408"


def test_heads_that_are_wrong_endless_or_missing_end_their_connection(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    address = ("127.0.0.1", server.port)
    wrong, endless, silent, partial = (socket.create_connection(address, timeout=10) for _ in range(4))
    wrong.sendall(b"nonsense\r\n\r\n")
    partial.sendall(b"GET /health HTTP/1.1\r\nx: ")
    status, rest = answered(wrong)
    assert status == "400" and b'"code":"bad_request"' in rest
    endless.sendall(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20000)
    with endless:
        assert b"400 Bad Request" in endless.recv(1 << 16)
    for client in (silent, partial):
        with client:
            assert client.recv(100) == b""


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(server):
    body = json.dumps({"messages": ASK, "stream": True}).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.0\r\nauthorization: Bearer secret\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    status, rest = answered(client)
    headers, _, events = rest.partition(b"\r\n\r\n")
    assert status == "200" and b"transfer-encoding" not in headers and events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n") and b"\r\n" not in events


def test_many_clients_at_once_get_the_answers_they_get_alone(server, scene):
    """Half with a picture; some leave, and some send nonsense in between."""
    picture = {"type": "image_url", "image_url": {"url": scene}}

    def ask(n):
        text = f"How many shapes are there? {n % 5}"
        content = [picture, {"type": "text", "text": text}] if n % 2 else text
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 12}

    def content(answer):
        return answer.json()["choices"][0]["message"]["content"]

    alone = [content(server.post(ask(n))) for n in range(10)]
    handles = len(os.listdir("/proc/self/fd"))

    def serve(n):
        if n % 7 == 3:
            server.raw(ask(n)).close()
        elif n % 7 == 5:
            assert server.post({"messages": "nonsense"}).status_code == 400
        else:
            assert content(server.post(ask(n))) == alone[n % 10]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, range(24)))
    wait_until(server.idle)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= handles + 2)
