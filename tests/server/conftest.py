"""A server in this process: the tiny model without compilation, behind a real socket."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engines import resolved, run_of, start_run

from mllama_graph.engine.start import processor_of
from mllama_graph.server.access import AccessLog
from mllama_graph.server.app import application
from mllama_graph.server.http import listening, server_of
from mllama_graph.server.limits import Bounds
from mllama_graph.server.pictures import Pictures
from mllama_graph.server.service import READY, Service
from mllama_graph.server.warm import warm_up

TINY = Path(__file__).parents[2] / "mllama_graph" / "tiny" / "checkpoint"
KEY = "secret"
BATCH = 4


@dataclass
class Served:
    """A running server. `log`: its access log."""

    service: Service
    port: int
    log: io.StringIO

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120)

    def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        with self.http as client:
            return client.post(path, json=body)

    def raw(self, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
        """A socket on which a request is sent."""
        data = json.dumps(body).encode()
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        return client

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the engine waits between two steps, so that no request ends by itself, however slow the machine."""
        go = threading.Event()
        waiting = self.service.engine_loop.call(lambda engine: go.wait(60))
        try:
            yield
        finally:
            go.set()
            waiting.result()

    @property
    def open(self) -> int:
        """The number of requests that are admitted and not ended, as the queue counts them."""
        return self.service.admission.load.requests

    @property
    def requests(self) -> int:
        """The number of requests that run or wait."""
        return self.service.engine_loop.engine.load

    def idle(self) -> bool:
        """Whether the engine holds no request and no page, and nothing counts as open."""
        engine = self.service.engine_loop.engine
        return (
            engine.scheduler.idle
            and not engine._running
            and engine.scheduler.pool.free == engine.scheduler.pool.capacity
            and not engine.scheduler.images._used
            and not self.service.open
            and not self.service.engine_loop._numbers
            and not self.service.engine_loop._unbegun
            and vars(self.service.admission.load) == {"requests": 0, "tokens": 0, "pixels": 0}
            and self.service.admission.bodies.held == 0
        )


def wait_until(condition, seconds=30.0):
    """Wait for a condition; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.005)


BOUNDS = Bounds(
    body=1 << 20,
    body_seconds=1.0,
    requests=16,
    tokens=100_000,
    pixels=10**8,
    picture_pixels=10**6,
    pictures=4,
    seconds=120.0,
)


class Running:
    """Starts servers on one engine, each with a port of its own."""

    def __init__(self) -> None:
        # Answers that last until a test has done what it does meanwhile.
        lengths = {"max_input_length": 300, "max_output_length": 1700, "extend_context": True}
        self.run = resolved(run_of(TINY, batch=BATCH, **lengths))
        self.engine = start_run(self.run)
        self._stops: list[Any] = []

    def start(self, bounds: Bounds = BOUNDS, build=None, **keys: Any) -> Served:
        """A server, once it is ready."""
        log, started = io.StringIO(), threading.Event()
        opened = listening("127.0.0.1", 0)
        # Small, so that the system's buffers don't hold a whole answer that a client does not read.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        keys = {"pictures": Pictures(bounds), "api_key": KEY, "cors_origins": [], "prompts": False} | keys
        service = Service(
            self.run, processor_of(self.run), ["tiny"], bounds, keys["pictures"], build or (lambda: self.engine)
        )
        app = application(service, keys["api_key"], keys["cors_origins"], AccessLog(log, keys["prompts"]))
        server = server_of(app, {})

        async def serve() -> None:
            service.start()
            started.set()
            await server.serve(sockets=[opened])

        def thread() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(serve())

        runner = threading.Thread(target=thread, daemon=True)
        runner.start()
        started.wait()

        def stop() -> None:
            server.should_exit = True
            runner.join(5)
            service.close(5)
            opened.close()

        self._stops.append(stop)
        served = Served(service, opened.getsockname()[1], log)
        if build is None:
            wait_until(lambda: service.state == READY)
        return served

    def stop(self) -> None:
        """Stop the servers that were started last, so that the engine is free."""
        while self._stops:
            self._stops.pop()()


@pytest.fixture(scope="package")
def running():
    found = Running()
    warm_up(found.engine, BATCH)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def server(running):
    """A server with small bounds; it must be idle after each module."""
    served = running.start()
    yield served
    wait_until(served.idle)
    running.stop()


@pytest.fixture(scope="session")
def scene():
    """The tiny model's picture as a data: URI."""
    import base64

    return "data:image/png;base64," + base64.b64encode((TINY.parent / "scene.png").read_bytes()).decode()
