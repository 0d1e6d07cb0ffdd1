"""States of a server: starting, failed, with other options. Each test starts its own, on the shared engine."""

import threading
from pathlib import Path

import httpx
from conftest import wait_until

from mllama_graph.server.access import AccessLog
from mllama_graph.server.metrics import Metrics
from mllama_graph.tasks.serve import access_log
from mllama_graph.tasks.serve_options import ServeOptions

ASK = [{"role": "user", "content": "What can you do?"}]
LONG = {"messages": ASK, "max_tokens": 1500, "ignore_eos": True}


def test_metrics_count_what_happened(running):
    server = running.start()
    try:
        server.post({"messages": ASK})
        with server.raw(LONG):
            line = 'mllama_graph:num_requests_running{model_name="tiny"} 1.0'
            wait_until(lambda: line in server.http.get("/metrics").text)
        wait_until(server.idle)
        text = server.http.get("/metrics").text
        for line in (
            'requests_aborted_total{model_name="tiny"} 1.0',
            'request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
            'time_to_first_token_seconds_count{model_name="tiny"} 2.0',
            'e2e_request_latency_seconds_bucket{le="+Inf",model_name="tiny"} 1.0',
            'num_requests_running{model_name="tiny"} 0.0',
            'kv_cache_usage_perc{model_name="tiny"} 0.0',
        ):
            assert f"mllama_graph:{line}\n" in text, line
        aliases = Metrics(server.service, vllm_names=True).text().decode()
        assert "\nvllm:num_requests_running{" in aliases and "\nvllm:time_to_first_token_seconds_bucket{" in aliases
    finally:
        running.stop()


def test_a_failing_engine_ends_every_stream_with_an_error(running):
    """What a rank's death raises ends the open requests, and later ones are refused."""
    server = running.start()
    engine = server.service.engine_loop.engine
    step = engine.step
    try:
        client = server.raw(LONG | {"stream": True})
        wait_until(lambda: server.requests == 1)

        def fail():
            raise RuntimeError("rank 1 is gone")

        engine.step = fail
        with client, client.makefile("rb") as stream:
            read = b""
            while b"[DONE]" not in read[-100:]:
                read += stream.read1(1 << 16)
        assert b'"code":"engine_failed"' in read
        assert server.post({"messages": ASK}).status_code == 503 == server.http.get("/health").status_code
        assert str(server.service.error) == "rank 1 is gone"
    finally:
        engine.step = step
        for number in list(engine._running):
            engine.abort(number)
        running.stop()


def test_a_server_that_loads_its_model_is_alive_but_not_healthy(running):
    go = threading.Event()

    def build():
        go.wait()
        return running.engine

    server = running.start(build=build)
    try:
        assert (server.http.get("/live").status_code, server.http.get("/health").status_code) == (200, 503)
        assert server.post({"messages": ASK}).json()["error"]["code"] == "starting"
        go.set()
        wait_until(lambda: server.http.get("/health").status_code == 200)
    finally:
        go.set()
        running.stop()


def test_pages_of_other_origins_may_use_the_server_only_if_they_are_named(running):
    server = running.start(cors_origins=["https://mine.example"], prompts=True)
    try:
        ask = {"origin": "https://mine.example", "access-control-request-method": "POST"}
        allowed = server.http.options("/v1/chat/completions", headers=ask)
        other = server.http.options("/v1/chat/completions", headers=ask | {"origin": "https://other.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://mine.example"
        assert "access-control-allow-origin" not in other.headers
        # Without the key, and in a way that a page can read.
        refused = httpx.post(f"{server.url}/v1/chat/completions", headers={"origin": "https://mine.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://mine.example")
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        server.post({"messages": ASK})
        assert "What can you do?" in server.log.getvalue(), "log_prompts=true"
    finally:
        running.stop()


def test_a_full_disk_ends_the_access_log_and_nothing_else():
    with access_log(Path("/dev"), ServeOptions(access_log="full")) as stream:
        access = AccessLog(stream)
        for _ in range(2):
            access.write({"method": "GET", "path": "/live"}, {}, 0.1)
