"""The orders that the driver sends to the worker ranks, and the connections that carry them.

An order holds integers, ids and pixels, never a tensor of the model. Ranks exchange activations by collectives inside
the graphs, and every rank draws the same sample. A worker therefore only confirms orders to start, load a graph or
profile.
"""

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any, NoReturn

import torch.distributed as dist

from mllama_graph.core.errors import PeerGone, UserError
from mllama_graph.core.place import Place, Rendezvous
from mllama_graph.core.report import said_late
from mllama_graph.engine.hosts import Card, Digests, card, refusal
from mllama_graph.engine.steps import Step
from mllama_graph.model.tree import Pixels
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedRun

# Ranks may be late at the rendezvous: each imports torch first, and hosts start at different times.
MEETING_SECONDS = 300
# A rank that waits longer than this says for whom.
LATE_SECONDS = 10.0
# Keep-alive orders that the driver sends per timeout.
ALIVE_PER_TIMEOUT = 4
# Seconds in which who connects must prove to know the secret.
PROOF_SECONDS = 10


@dataclass(frozen=True)
class Start:
    """The run of a rank. `weights`: digests to compare with, for ranks on hosts other than rank 0's.

    Where they are given, a worker confirms, and builds its rank after Build.
    """

    run: ResolvedRun
    pixels: Pixels
    weights: Digests | None = None


@dataclass(frozen=True)
class Build:
    """Build the rank: the weights of all hosts agree."""


@dataclass(frozen=True)
class End:
    """The driver ends. Without it, a closed connection means that the driver or its host has died."""


@dataclass(frozen=True)
class Compile:
    """Start compiling a graph that will be needed, since hosts other than the driver's have their own stores."""

    bucket: Bucket


@dataclass(frozen=True)
class Load:
    """Load a bucket's graph, and confirm."""

    bucket: Bucket


# A step's tokens are taken at once; or at Finish, and the step after it may take their ids on the device.
AT_ONCE, LAUNCHED, LAUNCHED_FEEDING = range(3)


@dataclass(frozen=True)
class Execute:
    """Run a step in a bucket, with the compiled graph or uncompiled. how: see AT_ONCE."""

    step: Step
    bucket: Bucket
    compiled: bool
    how: int = AT_ONCE


@dataclass(frozen=True)
class Finish:
    """Take the tokens of the first step that was launched."""


@dataclass(frozen=True)
class Profile:
    """Start profiling the rank, or stop and write the profile; then confirm."""

    begin: bool


# What a worker says that the driver has left before the run began.
NOT_STARTED = "rank 0 has ended before the run began; its own output says why"
# None is a keep-alive: it only shows that the driver is alive. A text is why the run is refused.
Order = Start | Build | Compile | Load | Execute | Finish | Profile | End | str | None


def said_when_late(line: Callable[[], str]) -> AbstractContextManager[None]:
    """Say whom a rank waits for, where it waits longer than usual."""
    return said_late(lambda: f"{line()}, for at most {MEETING_SECONDS} s", LATE_SECONDS)


def meet(place: Place, rendezvous: Rendezvous) -> dist.Store:
    """The torch.distributed store through which the ranks of a run find each other.

    Raises PeerGone where none is reached at the rendezvous.
    """
    address = f"{rendezvous.address}:{rendezvous.port}"
    try:
        with said_when_late(lambda: f"rank {place.rank} waits for rank 0 at {address}"):
            store = dist.TCPStore(
                rendezvous.address,
                rendezvous.port,
                place.world,
                place.rank == 0 and not rendezvous.held_by_agent,
                timeout=timedelta(seconds=MEETING_SECONDS),
                wait_for_workers=False,
                master_listen_fd=rendezvous.listening if place.rank == 0 else None,
            )
    except dist.DistError as error:
        raise PeerGone(
            f"no rank 0 at {address} within {MEETING_SECONDS} s. MASTER_ADDR must be an "
            "address of rank 0's host that all hosts reach, and MASTER_PORT a free port there"
        ) from error
    return dist.PrefixStore(f"mllama_graph/{rendezvous.restarts}", store)


def _set_options(connection: Connection, options: Mapping[tuple[int, int], int | bytes]) -> None:
    """Set options of the socket below a connection: (level, name) -> value."""
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        for (level, name), value in options.items():
            shared.setsockopt(level, name, value)


def _without_delay(connection: Connection) -> Connection:
    """The same connection, with small messages sent at once."""
    _set_options(connection, {(socket.IPPROTO_TCP, socket.TCP_NODELAY): 1})
    return connection


def _limit_silence(connection: Connection, seconds: float) -> None:
    """Let a connection fail when data stays unacknowledged for this long, as after a cut link (Linux)."""
    _set_options(connection, {(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): max(1, round(seconds * 1e3))})


def _introduced(accepted: socket.socket, secret: bytes) -> tuple[Connection, Card] | None:
    """The connection to a worker that has proved to know the secret, and its card; the counterpart of Driver.

    None where it has not done that in time: anything on the network may connect.
    """
    accepted.setblocking(True)
    connection = Connection(accepted.detach())
    waiting = (socket.SOL_SOCKET, socket.SO_RCVTIMEO)
    try:
        _set_options(connection, {waiting: struct.pack("ll", PROOF_SECONDS, 0)})
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
        found: Card = connection.recv()
        _set_options(connection, {waiting: struct.pack("ll", 0, 0)})
        return _without_delay(connection), found
    except (AuthenticationError, EOFError, OSError):
        connection.close()
        return None


class Workers:
    """The driver's connections to the worker ranks; a run with one rank has none.

    `check` is called every second until all workers have connected; it raises where a worker has ended. Raises
    UserError where the ranks of several hosts don't fit together, or PeerGone where one does not come.
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
        self._lock, self._closed, self._timeout = threading.Lock(), threading.Event(), timeout
        # The host of each rank that is not on this one.
        self._elsewhere: dict[int, str] = {}
        if store is None or rendezvous is None:
            return
        secret = secrets.token_bytes(16)
        mine, cards, until = card(place), dict[int, Card](), time.monotonic() + MEETING_SECONDS
        local = rendezvous.address in ("127.0.0.1", "localhost")
        with socket.create_server(("127.0.0.1" if local else "", 0), backlog=place.world) as listener:
            listener.settimeout(1.0)
            store.set("driver", json.dumps([rendezvous.address, listener.getsockname()[1], secret.hex()]))

            def missing() -> str:
                return ", ".join(str(rank) for rank in range(1, place.world) if rank not in cards)

            with said_when_late(lambda: f"rank 0 waits for rank {missing()}"):
                while len(cards) < place.world - 1:
                    try:
                        accepted, _ = listener.accept()
                    except TimeoutError:
                        check()
                        if time.monotonic() > until:
                            text = f"rank {missing()} has not come within {MEETING_SECONDS} s"
                            raise PeerGone(text) from None
                        continue
                    if introduced := _introduced(accepted, secret):
                        connection, found = introduced
                        cards[found["rank"]], self._connections[found["rank"]] = found, connection
        if reason := refusal(mine, list(cards.values())):
            self.refuse(reason)
        self._elsewhere = {rank: one["host"] for rank, one in cards.items() if one["machine"] != mine["machine"]}
        for connection in self._connections.values():
            _limit_silence(connection, timeout)
        threading.Thread(target=self._keep_alive, args=(timeout / ALIVE_PER_TIMEOUT,), daemon=True).start()

    def send(self, order: Order) -> None:
        """Send an order to all workers. Raises PeerGone where a connection is closed."""
        with self._lock:
            for rank, connection in self._connections.items():
                try:
                    connection.send(order)
                except OSError as error:
                    raise PeerGone(self.gone(rank)) from error

    @property
    def elsewhere(self) -> bool:
        """Whether a worker runs on another host."""
        return bool(self._elsewhere)

    def gone(self, rank: int) -> str:
        """The message about a worker that has ended."""
        host = f" on host {self._elsewhere[rank]}" if rank in self._elsewhere else ""
        return f"rank {rank}{host} is gone"

    def refuse(self, reason: str) -> NoReturn:
        """Tell all workers why the run is refused, and raise UserError."""
        with contextlib.suppress(PeerGone):
            self.send(reason)
        raise UserError(reason)

    def confirmed(self) -> None:
        """Wait until all workers have confirmed the last order.

        Raises PeerGone where a connection is closed, or UserError where a worker answers with a reason to refuse.
        """
        answers = []
        for rank, connection in self._connections.items():
            try:
                answers.append(connection.recv())
            except (EOFError, OSError) as error:
                raise PeerGone(self.gone(rank)) from error
        if reasons := [answer for answer in answers if answer]:
            self.refuse(reasons[0])

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

    def wait_for_lost(self) -> int | None:
        """A worker whose connection closes within the time in which a dead one's does, or None.

        A process that dies closes one connection after another. A cut link is noticed `timeout` after a keep-alive.
        """
        until = time.monotonic() + 2 * self._timeout / ALIVE_PER_TIMEOUT
        while (rank := self.lost()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return rank

    def close(self) -> None:
        """End the workers and close the connections."""
        self._closed.set()
        with contextlib.suppress(PeerGone, ValueError):
            self.send(End())
        for connection in self._connections.values():
            connection.close()

    def _keep_alive(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.send(None)
            except (PeerGone, ValueError):
                return


class Driver:
    """A worker's connection to the driver. Raises PeerGone where the driver has ended before."""

    def __init__(self, place: Place, store: dist.Store):
        try:
            with said_when_late(lambda: f"rank {place.rank} waits for rank 0 to begin"):
                address, port, secret = json.loads(store.get("driver"))
            self._connection = _without_delay(Client((address, port), authkey=bytes.fromhex(secret)))
            self._connection.send(card(place))
        except (dist.DistError, EOFError, OSError) as error:
            raise PeerGone(NOT_STARTED) from error

    def first(self) -> Any:
        """Wait for the next order that is not a keep-alive: Start, or Build. Raises UserError if the run is refused."""
        try:
            while (order := self._connection.recv()) is None:
                pass
        except (EOFError, OSError) as error:
            raise PeerGone(NOT_STARTED) from error
        if isinstance(order, str):
            raise UserError(order)
        return order

    def next(self, timeout: float) -> tuple[Order, bool]:
        """The next order, and whether the driver has closed the connection without one.

        Raises PeerGone after `timeout` seconds without an order.
        """
        try:
            if not self._connection.poll(timeout):
                raise PeerGone(f"rank 0 has sent nothing for {timeout:g} s")
            return self._connection.recv(), False
        except (EOFError, OSError):
            return None, True

    def confirm(self, reason: str = "") -> None:
        """Tell the driver that the last order is done, or why the run must be refused."""
        self._connection.send(reason)
