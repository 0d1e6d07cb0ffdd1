"""The orders that the driver sends to the worker ranks, and the connections that carry them.

An order holds integers, ids and pixels, never a tensor of the model. Ranks exchange activations by collectives inside
the graphs, and every rank draws the same sample. A worker therefore only confirms orders to start, load a graph or
profile.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge

import torch.distributed as dist

from mllama_graph.core.errors import PeerGone
from mllama_graph.core.place import Place, Rendezvous
from mllama_graph.engine.steps import Step
from mllama_graph.model.tree import Pixels
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedRun

# Ranks may be late at the rendezvous: each imports torch first, and hosts start at different times.
MEETING_SECONDS = 300
# Keep-alive orders that the driver sends per timeout.
ALIVE_PER_TIMEOUT = 4


@dataclass(frozen=True)
class Start:
    """Build a rank."""

    run: ResolvedRun
    pixels: Pixels


@dataclass(frozen=True)
class Compile:
    """Start compiling a graph that will be needed, since hosts other than the driver's have their own stores."""

    bucket: Bucket


@dataclass(frozen=True)
class Load:
    """Load a bucket's graph, and confirm."""

    bucket: Bucket


@dataclass(frozen=True)
class Execute:
    """Run a step in a bucket, with the compiled graph or uncompiled."""

    step: Step
    bucket: Bucket
    compiled: bool


@dataclass(frozen=True)
class Profile:
    """Start profiling the rank, or stop and write the profile; then confirm."""

    begin: bool


# None is a keep-alive: it only shows that the driver is alive.
Order = Start | Compile | Load | Execute | Profile | None


def meet(place: Place, rendezvous: Rendezvous) -> dist.Store:
    """The torch.distributed store through which the ranks of a run find each other."""
    store = dist.TCPStore(
        rendezvous.address,
        rendezvous.port,
        place.world,
        place.rank == 0 and not rendezvous.held_by_agent,
        timeout=timedelta(seconds=MEETING_SECONDS),
        wait_for_workers=False,
        master_listen_fd=rendezvous.listening if place.rank == 0 else None,
    )
    return dist.PrefixStore(f"mllama_graph/{rendezvous.restarts}", store)


def _without_delay(connection: Connection) -> Connection:
    """The same connection, with small messages sent at once (TCP_NODELAY)."""
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _authenticated(accepted: socket.socket, secret: bytes) -> Connection:
    """The connection to a worker that has proved to know the secret; the counterpart of multiprocessing's Client."""
    accepted.setblocking(True)
    connection = Connection(accepted.detach())
    deliver_challenge(connection, secret)
    answer_challenge(connection, secret)
    return _without_delay(connection)


class Workers:
    """The driver's connections to the worker ranks; a run with one rank has none.

    `check` is called every second until all workers have connected; it raises where a worker has ended.
    """

    def __init__(
        self,
        place: Place,
        rendezvous: Rendezvous | None,
        store: dist.Store | None,
        timeout: float,
        check: Callable[[], None],
    ):
        self._connections: dict[int, Connection] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        if store is None or rendezvous is None:
            return
        secret = secrets.token_bytes(16)
        address = "127.0.0.1" if place.one_host else ""
        with socket.create_server((address, 0), backlog=place.world) as listener:
            listener.settimeout(1.0)
            reached = "127.0.0.1" if place.one_host else rendezvous.address
            store.set("driver", json.dumps([reached, listener.getsockname()[1], secret.hex()]))
            while len(self._connections) < place.world - 1:
                try:
                    accepted, _ = listener.accept()
                except TimeoutError:
                    check()
                    continue
                connection = _authenticated(accepted, secret)
                self._connections[connection.recv()] = connection
        threading.Thread(target=self._keep_alive, args=(timeout / ALIVE_PER_TIMEOUT,), daemon=True).start()

    def send(self, order: Order) -> None:
        """Send an order to all workers. Raises PeerGone where a connection is closed."""
        with self._lock:
            for rank, connection in self._connections.items():
                try:
                    connection.send(order)
                except OSError as error:
                    raise PeerGone(f"rank {rank} is gone") from error

    def confirmed(self) -> None:
        """Wait until all workers have confirmed the last order. Raises PeerGone where a connection is closed."""
        for rank, connection in self._connections.items():
            try:
                connection.recv()
            except (EOFError, OSError) as error:
                raise PeerGone(f"rank {rank} is gone") from error

    def lost(self) -> int | None:
        """A worker whose connection is closed, or None. Any thread may ask."""
        for rank, connection in self._connections.items():
            try:
                with socket.socket(fileno=os.dup(connection.fileno())) as shared:
                    if not shared.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        return rank
            except BlockingIOError:
                continue
            except OSError:
                return None if self._closed.is_set() else rank
        return None

    def close(self) -> None:
        """Close the connections; the workers then end."""
        self._closed.set()
        for connection in self._connections.values():
            connection.close()

    def _keep_alive(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.send(None)
            except (PeerGone, ValueError):
                return


class Driver:
    """A worker's connection to the driver."""

    def __init__(self, place: Place, store: dist.Store):
        address, port, secret = json.loads(store.get("driver"))
        self._connection = _without_delay(Client((address, port), authkey=bytes.fromhex(secret)))
        self._connection.send(place.rank)

    def first(self) -> Start:
        """Wait for the order to start."""
        while (start := self._connection.recv()) is None:
            pass
        assert isinstance(start, Start)
        return start

    def next(self, timeout: float) -> tuple[Order, bool]:
        """The next order, and whether the driver has ended. Raises PeerGone after `timeout` seconds without one."""
        try:
            if not self._connection.poll(timeout):
                raise PeerGone(f"rank 0 has sent nothing for {timeout:g} s")
            return self._connection.recv(), False
        except (EOFError, ConnectionResetError):
            return None, True

    def confirm(self) -> None:
        """Tell the driver that the last order is done."""
        self._connection.send(None)
