"""The command itself: SIGTERM drains, a second SIGINT ends at once, a rank's death ends every stream with an error."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def started(folder, *keys, until="ready"):
    """(process, port, lines of stderr) of a server that is ready, or that has shown another line."""
    command = [
        sys.executable,
        "run.py",
        "task=serve",
        "port=0",
        "extend_context=true",
        "backend=eager",
        "backend.kernels=plain",
        f"hydra.run.dir={folder}",
        *keys,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        for line in process.stderr:
            said.append(line.strip())
            if line.startswith(until):
                break
        assert said[-1].startswith(until), said
        threading.Thread(target=lambda: said.extend(map(str.strip, process.stderr)), daemon=True).start()
        [port] = [int(found[1]) for line in said if (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line))]
        yield process, port, said
    finally:
        process.kill()
        process.wait()


def streaming(port, tokens, key="none"):
    """A socket on which a stream has begun."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": tokens, "ignore_eos": True}
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    expect(client, b'"role":"assistant"')
    return client


def expect(client, what):
    """Read from a socket until `what` has come."""
    read = b""
    while what not in read:
        more = client.recv(4096)
        assert more, read
        read += more


def rest(client):
    """What is sent until the end of the stream."""
    read = b""
    with client:
        while not read.endswith(b"0\r\n\r\n") and (more := client.recv(1 << 16)):
            read += more
    return read


def test_sigterm_finishes_open_streams_refuses_new_requests_and_exits_0(tmp_path):
    with started(tmp_path, "api_key=never-written") as (process, port, said):
        client = streaming(port, 300, "never-written")
        process.send_signal(signal.SIGTERM)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as late:
            late.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            expect(late, b'"draining"')
            # The key is missing, and the body is not waited for.
            late.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
            expect(late, b"invalid_api_key")
        read = rest(client)
        assert b'"finish_reason":"length"' in read and b"[DONE]" in read
        assert process.wait(30) == 0 and said[-1] == "ended"
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["new_tokens"] == 300
    for name in ("result.json", "run.log", "access.jsonl"):
        assert "never-written" not in (tmp_path / name).read_text()


def test_sigterm_right_after_the_address_is_shown_exits_0(tmp_path):
    with started(tmp_path, until="serving") as (process, _, said):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and "interrupted" not in " ".join(said)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with started(tmp_path) as (process, port, _), streaming(port, 2000):
        process.send_signal(signal.SIGINT)
        # Only then has the first one been handled.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            expect(client, b'"draining"')
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


def test_a_rank_that_dies_ends_every_stream_with_an_error_and_exit_code_1(tmp_path):
    with started(tmp_path, "tp=2") as (process, port, said):
        client = streaming(port, 2000)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(child) for child in children if b"launch.child" in Path(f"/proc/{child}/cmdline").read_bytes()]
        os.kill(ranks[-1], signal.SIGKILL)
        assert b'"code":"engine_failed"' in rest(client)
        assert process.wait(30) == 1 and "rank 1 was killed by SIGKILL" in said[-1]


@pytest.mark.parametrize(
    "keys, rule",
    [
        (["port=70000"], "port=70000 must be at least 0 and at most 65535"),
        (["host=203.0.113.1", "port=0"], "host=203.0.113.1 port=0 can't be used"),
        (["prompt=hi"], "task=serve answers requests over HTTP"),
        (["task=warmup", "port=1"], "only task=serve is a server"),
        (["files_below=/nowhere"], "files_below=/nowhere is no folder"),
        (["port=0", "task.ssl_certfile=LICENSE"], "task.ssl_certfile=LICENSE can't be used: "),
    ],
    ids=str,
)
def test_keys_that_can_not_be_served_with_are_refused(keys, rule, tmp_path, monkeypatch, capsys):
    from mllama_graph import cli

    monkeypatch.setattr(sys, "argv", ["run.py", "task=serve", *keys, f"hydra.run.dir={tmp_path}"])
    monkeypatch.setattr(cli, "failures", [])
    monkeypatch.chdir(ROOT)
    assert cli.main() == 2 and rule in capsys.readouterr().err
