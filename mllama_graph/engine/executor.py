"""The ranks of a run in lock-step: rank 0 drives; the others follow the orders that it sends them.

An order holds integers, ids and pixels, never a tensor of the model. What a step computes is exchanged by collectives
inside the graphs; every rank draws the same sample, so that nothing comes back but a word when a graph is loaded.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Optional, Union

import numpy as np
import torch
import torch.distributed as dist

from mllama_graph.engine import batch
from mllama_graph.plan.buckets import Bucket, Plan
from mllama_graph.model.checkpoint import Checkpoint, Pixels, model_of
from mllama_graph.core.config import PeerGone, Run
from mllama_graph.graphs.dispatch import Graphs
from mllama_graph.core.place import Place, place_from
from mllama_graph.plan.resolve import memory_of, require_on_host
from mllama_graph.engine.rank import Rank, Token, free_npu_memory, pick_device
from mllama_graph.core.report import Progress
from mllama_graph.plan.cost import Memory, bucket_cost, require
from mllama_graph.engine.scheduler import AnyStep, VisionStep
from mllama_graph.model.shape import ModelShape

# Ranks may come late to the first meeting: each imports torch first, and hosts start when they do.
MEETING_SECONDS = 300
# How often an idle driver tells that it is there, as a part of the timeout.
ALIVE = 4


@dataclass(frozen=True)
class Start:
    """Build a rank: the run, its plan and its normalisation of pixels. `segment` names the ranks' shared memory."""

    run: Run
    plan: Plan
    pixels: Pixels
    segment: str


@dataclass(frozen=True)
class Compile:
    """A bucket's graph will be wanted: hosts other than the driver's have stores of their own to fill."""

    bucket: Bucket


@dataclass(frozen=True)
class Load:
    """Load a bucket's graph, and say when it is done."""

    bucket: Bucket


@dataclass(frozen=True)
class Execute:
    """Run a step through a bucket, compiled or not."""

    step: AnyStep
    bucket: Bucket
    compiled: bool
    pixels: Optional[np.ndarray]


@dataclass(frozen=True)
class Profile:
    """Begin to record what the rank does, or, without its planned memory, end it and say when all is written."""

    planned: Optional[Memory]


# None says only that the driver is there.
Order = Union[Start, Compile, Load, Execute, Profile, None]


def meet(place: Place) -> dist.Store:
    """The store in which ranks find each other, at MASTER_ADDR and MASTER_PORT."""
    environment = os.environ
    # torchrun holds the store itself and counts its restarts; `launch` hands rank 0 a port that it has bound.
    held = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    bound = environment.get("MLLAMA_GRAPH_MASTER_FD")
    store = dist.TCPStore(
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), place.world, place.rank == 0 and not held,
        timeout=timedelta(seconds=MEETING_SECONDS), wait_for_workers=False,
        master_listen_fd=int(bound) if bound and place.rank == 0 else None)
    return dist.PrefixStore(f"mllama_graph/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _prompt(connection: Connection) -> Connection:
    """The same connection, which sends small messages at once."""
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Followers:
    """The driver's connections to the other ranks."""

    def __init__(self, place: Place, store: Optional[dist.Store], timeout: float):
        self._connections: dict[int, Connection] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        if store is None:
            return
        key = secrets.token_bytes(16)
        address = "127.0.0.1" if place.one_host else ""
        with Listener((address, 0), backlog=place.world, authkey=key) as listener:
            reached = "127.0.0.1" if place.one_host else os.environ["MASTER_ADDR"]
            store.set("driver", json.dumps([reached, listener.address[1], key.hex()]))
            while len(self._connections) < place.world - 1:
                connection = _prompt(listener.accept())
                self._connections[connection.recv()] = connection
        threading.Thread(target=self._keep_alive, args=(timeout / ALIVE,), daemon=True).start()

    def send(self, order: Order) -> None:
        """An order to all. Raises PeerGone."""
        with self._lock:
            for rank, connection in self._connections.items():
                try:
                    connection.send(order)
                except OSError as error:
                    raise PeerGone(f"rank {rank} is gone") from error

    def confirmed(self) -> None:
        """Wait until all say that they have done the last order. Raises PeerGone."""
        for rank, connection in self._connections.items():
            try:
                connection.recv()
            except (EOFError, OSError) as error:
                raise PeerGone(f"rank {rank} is gone") from error

    def close(self) -> None:
        """Let the others end."""
        self._closed.set()
        for connection in self._connections.values():
            connection.close()

    def _keep_alive(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.send(None)
            except (PeerGone, ValueError):
                return


class Ranks:
    """All ranks as their driver sees them, itself the first.

    Raises UserError before anything is allocated where the memory does not suffice.
    """

    def __init__(self, run: Run, shape: ModelShape, plan: Plan, pixels: Pixels, checkpoint: Optional[Checkpoint],
                 progress: Progress):
        self.run, self.shape, self.plan = run, shape, plan
        self.place = place = place_from(os.environ) or Place()
        device = pick_device(run)
        self.memory = memory_of(run, shape, plan, device, checkpoint.stored if checkpoint else "bf16")
        if device in ("cpu", "npu-sim"):
            require_on_host(self.memory, run, place.local_world)
        elif device == "npu":
            require(self.memory, free_npu_memory(place.local_rank), "free on the NPU")
        else:
            require(self.memory, torch.cuda.mem_get_info()[0], "free on the CUDA device")
        if checkpoint:
            checkpoint.verify()
        store = meet(place) if place.world > 1 else None
        self._followers = Followers(place, store, run.timeout)
        segment = f"mllama_graph-{os.getppid()}-{secrets.token_hex(4)}"
        self._followers.send(Start(run, plan, pixels, segment))
        self.rank = Rank(run, shape, plan, pixels, checkpoint, place, store, segment, progress)
        self._followers.confirmed()
        self.graphs = Graphs(
            self.rank.spec, self.rank.graphs.store, plan.buckets(),
            cost=lambda bucket: bucket_cost(shape, plan.page_size, bucket, self.rank.precision.store.itemsize),
            reuse=1.0 if run.deterministic else run.plan.reuse,
            mode="wait" if run.deterministic and run.plan.compile == "background" else run.plan.compile,
            say=progress.say, compile=lambda bucket: self._followers.send(Compile(bucket)), load=self._load)

    def execute(self, step: AnyStep, pixels: Optional[np.ndarray] = None) -> list[Token]:
        """Run one step on all ranks; a token for each row that is due one. `pixels` are the real tiles of a VisionStep."""
        need = self.plan.vision() if isinstance(step, VisionStep) else batch.needs(self.plan, step)
        bucket, compiled = self.graphs.serve(need)
        self._followers.send(Execute(step, bucket, compiled, pixels))
        return self.rank.execute(step, bucket, compiled, pixels)

    def profile(self, begin: bool) -> None:
        """Have every rank begin to record what it does, or end and write it down."""
        planned = self.memory if begin else None
        self._followers.send(Profile(planned))
        self.rank.profile(planned)
        self._followers.confirmed()

    def close(self) -> None:
        """Let the other ranks end. Nothing can be executed any more."""
        self._followers.close()

    def _load(self, bucket: Bucket) -> None:
        self._followers.send(Load(bucket))
        self.rank.graphs.load(bucket)
        self._followers.confirmed()


def follow(place: Place, begun: Callable[[Run], None]) -> None:
    """Be a rank other than 0 until the driver ends. `begun` is called with the run as soon as it is known.

    Raises PeerGone where the driver is silent for longer than the run's timeout.
    """
    store = meet(place)
    address, port, key = json.loads(store.get("driver"))
    connection = _prompt(Client((address, port), authkey=bytes.fromhex(key)))
    connection.send(place.rank)
    while (start := connection.recv()) is None:
        pass
    run = start.run
    begun(run)
    shape, checkpoint = model_of(run)
    rank = Rank(run, shape, start.plan, start.pixels, checkpoint, place, store, start.segment, Progress())
    connection.send(None)
    while (order := _next(connection, run.timeout)) is not EOFError:
        if isinstance(order, Compile) and place.local_rank == 0:
            rank.graphs.compile(order.bucket)
        elif isinstance(order, Load):
            rank.graphs.load(order.bucket)
            connection.send(None)
        elif isinstance(order, Profile):
            rank.profile(order.planned)
            connection.send(None)
        elif isinstance(order, Execute):
            rank.execute(order.step, order.bucket, order.compiled, order.pixels)


def _next(connection: Connection, timeout: float) -> Any:
    """The next order, or EOFError when the driver has ended."""
    try:
        if not connection.poll(timeout):
            raise PeerGone(f"rank 0 has sent nothing for {timeout:g} s")
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return EOFError
