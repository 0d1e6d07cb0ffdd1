"""The step loop: a thread that owns the engine. HTTP submits and aborts through a queue and never waits for a step.

Deltas leave with one `call_soon_threadsafe` per step, whatever the number of streams, and when the next step's graph
begins: while it runs, HTTP has the interpreter. Woken at the end of a step, HTTP would take the GIL at the first of
torch's operations that releases it, and the engine would wait for all writes of the step.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from mllama_graph.core.errors import UserError
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import Request

log = logging.getLogger(__name__)

Command = Callable[[Engine], None]


class Ticket:
    """One submitted request, as HTTP sees it. Its deltas arrive in the mailbox with its index.

    Times are of time.perf_counter: of arrival, of the first step with this request, of the first and latest token.
    """

    __slots__ = ("mailbox", "index", "prompt", "images", "arrived", "begun", "first", "latest", "tokens", "done")

    def __init__(self, mailbox: "Mailbox", index: int, prompt: int, images: int, arrived: float):
        self.mailbox, self.index, self.prompt, self.images, self.arrived = mailbox, index, prompt, images, arrived
        self.begun = self.first = self.latest = 0.0
        self.tokens = 0
        self.done = False


class Mailbox:
    """The deltas of one HTTP request that its task has not taken yet. Used in the event loop's thread only.

    A client that reads slowly leaves its deltas here: at most one per token of its own answers, and no other stream
    waits. `error` ends the request instead of a result. `ended` is called for each result that arrives.
    """

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        self._ended = ended
        # Takes a delta to be sent with all others of its step, without waking the task, and returns whether it has.
        self.sink: Callable[[int, Delta], bool] | None = None
        self._deltas: list[tuple[int, Delta]] = []
        self._ready = asyncio.Event()
        self.error: Exception | None = None

    def put(self, index: int, delta: Delta) -> None:
        """Add a delta."""
        if self.sink is None or self._deltas or not self.sink(index, delta):
            self._deltas.append((index, delta))
            self._ready.set()
        if delta.result:
            self._ended()

    def fail(self, error: Exception) -> None:
        """End the request: `take` raises `error` once the deltas before it are taken."""
        self.error = self.error or error
        self._ready.set()

    async def take(self) -> list[tuple[int, Delta]]:
        """Wait for deltas, and return all (index, delta) that have arrived. Raises the error that `fail` was given."""
        await self._ready.wait()
        self._ready.clear()
        deltas, self._deltas = self._deltas, []
        if not deltas and self.error:
            raise self.error
        if self.error:
            self._ready.set()
        return deltas


class EngineLoop:
    """Runs an engine in a thread of its own: `start` it, `submit` and `abort` requests, `close` it.

    `build` makes the engine, in that thread. `deliver` is called in the event loop's thread with the deltas of each
    step, whose ids are tickets, and the time of the step's end. `ended` is called there once, with None or with what
    the engine raised.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        deliver: Callable[[list[Delta], float], None],
        ended: Callable[[BaseException | None], None],
    ):
        self._build, self._deliver, self._ended = build, deliver, ended
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._numbers: dict[Ticket, int] = {}
        # Tickets that have not been in a step yet.
        self._unbegun: dict[int, Ticket] = {}
        # The deltas that have not left yet, and when their step ended.
        self._leaving: tuple[list[Delta], float] | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Set in the thread once the engine is built.
        self.engine: Engine | None = None

    def start(self) -> None:
        """Build the engine and begin to step it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, ticket: Ticket, request: Request) -> None:
        """Queue a request. One that the engine refuses gets a failed result."""
        self._do(lambda engine: self._submit(engine, ticket, request))

    def abort(self, ticket: Ticket) -> None:
        """Drop a request and free its row and pages before the next step; without effect on one that has ended."""
        self._do(lambda engine: self._abort(engine, ticket))

    def call(self, function: Callable[[Engine], object]) -> Future[object]:
        """Call a function of the engine between two steps; the future has its result or its exception."""
        future: Future[object] = Future()

        def command(engine: Engine) -> None:
            try:
                future.set_result(function(engine))
            except Exception as error:
                future.set_exception(error)

        self._do(command)
        return future

    def close(self, seconds: float) -> bool:
        """End the thread after its current step. Returns whether it has ended within `seconds`."""
        self._closing = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _do(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            engine = self.engine = self._build()
            engine.executor.rank.on_graph = self._leave
            while not self._closing:
                if engine.idle or self._commands:
                    self._leave()
                if engine.idle and not self._commands:
                    self._wake.wait()
                # Cleared before the queue is read, so that a command that comes meanwhile wakes the loop again.
                self._wake.clear()
                while self._commands:
                    self._commands.popleft()(engine)
                if not engine.idle:
                    self._step(engine)
        except BaseException as raised:
            log.exception("the engine has ended")
            error = raised
        self._leave()
        self._post(self._ended, error)

    def _step(self, engine: Engine) -> None:
        start = time.perf_counter()
        deltas = engine.step()
        for sequence in engine.scheduler.running if self._unbegun else ():
            if ticket := self._unbegun.pop(sequence.id, None):
                ticket.begun = start
        for delta in deltas:
            if delta.result and (number := self._numbers.pop(delta.id, None)) is not None:
                # Of a request that ended in its first step.
                if self._unbegun.pop(number, None):
                    delta.id.begun = start
        # Of the step before, if this one has run no graph.
        self._leave()
        if deltas:
            self._leaving = deltas, time.perf_counter()

    def _leave(self) -> None:
        """Hand the deltas of the latest step to HTTP."""
        if self._leaving:
            leaving, self._leaving = self._leaving, None
            self._post(self._deliver, *leaving)

    def _submit(self, engine: Engine, ticket: Ticket, request: Request) -> None:
        try:
            number = engine.submit(replace(request, id=ticket))
        except UserError as error:
            self._post(self._deliver, [Delta(ticket, None, "", Result.failed(ticket, str(error)))], time.perf_counter())
            return
        self._numbers[ticket] = number
        self._unbegun[number] = ticket

    def _abort(self, engine: Engine, ticket: Ticket) -> None:
        number = self._numbers.pop(ticket, None)
        if number is not None:
            self._unbegun.pop(number, None)
            engine.abort(number)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The event loop is closed: nobody is left to tell.
            log.info("the event loop ended before the engine")
