"""Runs the application on uvicorn: sockets, signals, draining and shutdown."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from mllama_graph.core.errors import UserError
from mllama_graph.server.connections import KEEP_ALIVE_SECONDS, Connection
from mllama_graph.server.errors import ApiError
from mllama_graph.server.service import FAILED, Service

BACKLOG = 2048
# Seconds to send the errors that end unfinished answers at shutdown.
LAST_WORDS = 1.0
# Seconds between checks of the worker ranks.
WATCH = 0.5


def listening(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free port. Raises UserError if the address is in use or not this host's."""
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(kind[0], kind[1])
    except OSError as error:
        raise UserError(f"host={host} is no address of this machine: {error.strerror}.") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(kind[4])
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        other = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise UserError(f"host={host} port={port} can't be used: {error.strerror}. Choose another {other}=.") from error
    opened.setblocking(False)
    return opened


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which raise signals again and print stack traces."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(app: ASGIApp, tls: Mapping[str, Any]) -> _Server:
    """uvicorn with our `Connection`. `tls`: uvicorn's options for a certificate. Raises UserError for a wrong one."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
        **tls,
    )
    try:
        config.load()
    except OSError as error:
        files = " ".join(f"task.{name}={path}" for name, path in tls.items() if path)
        text = f"{files} can't be used: {error}. Give a certificate in PEM form and its key, in one file or in two."
        raise UserError(text) from error
    return _Server(config)


def serve(
    app: ASGIApp,
    service: Service,
    opened: socket.socket,
    drain_seconds: float,
    tls: Mapping[str, Any],
    watch: Callable[[], Exception | None],
    say: Callable[[str], None],
    begun: Callable[[], None],
) -> None:
    """Serve until a signal or the engine ends it. `begun` is called once signals drain.

    SIGTERM and SIGINT drain: new requests are refused, open ones finish within `drain_seconds`. A second SIGINT ends
    the process at once. `watch` returns why a worker rank has ended, or None. Raises the error that ended the engine,
    or UserError for a certificate that can't be used.
    """
    server = server_of(app, tls)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(server, service, opened, drain_seconds, watch, say, begun))
    if service.error is not None:
        raise service.error


async def _serve(
    server: _Server,
    service: Service,
    opened: socket.socket,
    drain_seconds: float,
    watch: Callable[[], Exception | None],
    say: Callable[[str], None],
    begun: Callable[[], None],
) -> None:
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    interrupts = 0

    def interrupted(number: int) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            say("ended at once")
            os._exit(130)
        if not ending.is_set():
            left = f"{len(service.open)} open request{'s' * (len(service.open) != 1)}"
            say(f"finishing {left}, at most {drain_seconds:g} s; Ctrl-C twice ends at once")
        service.drain()
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, interrupted, number)
    begun()
    service.on_end = ending.set
    service.start()
    watching = asyncio.ensure_future(_watch(service, watch))
    serving = asyncio.ensure_future(server.serve(sockets=[opened]))
    # Where it fails, nobody would answer.
    serving.add_done_callback(lambda _: ending.set())
    await ending.wait()
    until = time.monotonic() + drain_seconds
    while service.open and service.state != FAILED and time.monotonic() < until:
        await asyncio.sleep(0.02)
    if service.state != FAILED:
        service.end_all(ApiError(503, "the server has shut down before the answer was finished.", None, "draining"))
    until = time.monotonic() + LAST_WORDS
    while service.open and time.monotonic() < until:
        await asyncio.sleep(0.02)
    watching.cancel()
    server.should_exit = True
    await serving


async def _watch(service: Service, watch: Callable[[], Exception | None]) -> None:
    """End the service when a worker rank has ended: the engine itself might wait long before it notices."""
    while True:
        await asyncio.sleep(WATCH)
        if error := watch():
            service.fail(error)
            return
