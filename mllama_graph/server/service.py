"""The service behind the routes: one engine in its thread, a pool that prepares requests, and the state of both."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Delta
from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.request import Request
from mllama_graph.plan.resolve import ResolvedRun
from mllama_graph.server.errors import ApiError, grammar_field, of_request, too_long
from mllama_graph.server.limits import Admission, Bounds, Load
from mllama_graph.server.loop import EngineLoop, Mailbox, Ticket
from mllama_graph.server.metrics import Metrics
from mllama_graph.server.pictures import Pictures
from mllama_graph.server.streams import Outbox, sender
from mllama_graph.server.tokens import Tokens

log = logging.getLogger(__name__)

# States of a service.
STARTING, READY, DRAINING, FAILED = "starting", "ready", "draining", "failed"
# Threads that tokenize and decode pictures; more where they wait for other hosts.
PREPARERS, WAITING_PREPARERS = 2, 8

# More characters than any token of a vocabulary has (Llama 3: 128).
CHARACTERS_PER_TOKEN = 256


class Service:
    """All that routes need. `names`: the names of the model, the first of which is the default.

    `build` makes the engine and warms it up, in the engine's thread. `on_end` is called when the engine has ended, by
    `error` if it is not None. Used in the event loop's thread.
    """

    def __init__(
        self,
        run: ResolvedRun,
        processor: Processor,
        names: list[str],
        bounds: Bounds,
        pictures: Pictures,
        build: Callable[[], Engine],
        vllm_names: bool = False,
    ):
        self.run, self.processor, self.names = run, processor, names
        self.created = int(time.time())
        self.bounds, self.pictures = bounds, pictures
        self.admission = Admission(bounds, run.limits.batch)
        self.tokens = Tokens(processor)
        self.state = STARTING
        self.error: BaseException | None = None
        self.open: set[Generation] = set()
        self.outbox = Outbox()
        self.engine_loop = EngineLoop(lambda: self._built(build), self._deliver, self._engine_ended)
        self.metrics = Metrics(self, vllm_names)
        self._pool = ThreadPoolExecutor(
            WAITING_PREPARERS if pictures.waits else PREPARERS, thread_name_prefix="prepare"
        )
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to build the engine. Must be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine_loop.start()

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the pool that prepares requests."""
        return await self._loop.run_in_executor(self._pool, function, *arguments)

    def model(self, body: Mapping[str, Any]) -> str:
        """The name under which a request's model answers. Raises ApiError (404) for a model that is not served."""
        given = body.get("model")
        if given is None or given == "":
            return self.names[0]
        if given not in self.names:
            text = f"the model {str(given)[:100]!r} does not exist. This server has {', '.join(self.names)}."
            raise ApiError(404, text, "model", "model_not_found")
        return str(given)

    def check_ready(self) -> None:
        """Raises ApiError (503) where no request can be served now."""
        if self.state == READY:
            return
        why = {
            STARTING: "the model is being loaded",
            DRAINING: "the server is shutting down",
            FAILED: "the engine has failed",
        }[self.state]
        raise ApiError(503, f"{why}.", None, self.state, {"retry-after": "5"})

    async def generate(
        self, body: Mapping[str, Any], count: int, prepare: Callable[[], list[Request]], arrived: float
    ) -> "Generation":
        """Prepare requests in another thread, check them and submit them. `count`: of the requests.

        Raises ApiError for requests that can't be served.
        """
        self.check_ready()
        self.admission.check(count)

        def prepared() -> list[Request]:
            requests = prepare()
            for request in requests:
                self.run.plan.check(len(request.ids), request.max_new, len(request.images))
            return requests

        try:
            requests = await self.in_thread(prepared)
        # The one boundary between a request and all others. A panic of tokenizers is no Exception.
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit, asyncio.CancelledError)):
                raise
            raise of_request(error, body) from None
        self.check_ready()
        return Generation(self, requests, arrived, self.admission.admit(requests), grammar_field(body))

    def check_text(self, characters: int, field: str) -> None:
        """Raises ApiError for a text that is too long for any prompt, before the time to tokenize it is spent."""
        most = CHARACTERS_PER_TOKEN * self.run.limits.max_input
        if characters > most:
            taken = self.run.limits.max_input
            raise too_long(f"the prompt has {characters} characters, at most {taken} tokens are taken.", field)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        if self.state in (STARTING, READY):
            self.state = DRAINING

    def end_all(self, error: ApiError) -> None:
        """End every open request with an error."""
        for generation in list(self.open):
            generation.mailbox.fail(error)

    def fail(self, error: BaseException) -> None:
        """End every open request, and the service: the engine has failed."""
        if self.state != FAILED:
            self.state, self.error = FAILED, error
            self.end_all(ApiError(500, "the engine has failed; the server ends.", None, "engine_failed"))
            self.on_end()

    def close(self, seconds: float) -> bool:
        """End the engine's thread and the pool. Returns whether the thread has ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return self.engine_loop.close(seconds)

    def _built(self, build: Callable[[], Engine]) -> Engine:
        engine = build()
        self.outbox.send = sender(engine.executor.graphs.store.libraries, log.warning)
        self._loop.call_soon_threadsafe(self._ready)
        return engine

    def _ready(self) -> None:
        if self.state == STARTING:
            self.state = READY
            self.on_ready()

    def _deliver(self, deltas: list[Delta], now: float) -> None:
        for delta in deltas:
            ticket: Ticket = delta.id
            if not ticket.done:
                self.metrics.token(ticket, delta, now)
                ticket.done = delta.result is not None
                ticket.mailbox.put(ticket.index, delta)
        self.outbox.flush()

    def _engine_ended(self, error: BaseException | None) -> None:
        if error is not None:
            self.fail(error)
        self.on_end()


class Generation:
    """The running requests of one HTTP request: take deltas from its mailbox, and `close` it in any case.

    grammar: the field of its body that constrains the answers.
    """

    def __init__(self, service: Service, requests: list[Request], arrived: float, load: Load, grammar: str | None):
        self.requests, self.arrived, self.mailbox = requests, arrived, Mailbox(self._ended)
        self.grammar = grammar
        self.outbox = service.outbox
        self._service = service
        self._load: Load | None = load
        self._left = len(requests)
        self.tickets = [
            Ticket(self.mailbox, n, len(request.ids), len(request.images), arrived)
            for n, request in enumerate(requests)
        ]
        service.open.add(self)
        for ticket, request in zip(self.tickets, requests):
            service.engine_loop.submit(ticket, request)

    def new_tokens(self) -> int:
        """The number of new tokens so far."""
        return sum(ticket.tokens for ticket in self.tickets)

    def close(self) -> None:
        """Abort what has not ended, so that its rows and pages are free before the next step."""
        if self not in self._service.open:
            return
        self._service.open.discard(self)
        for ticket in self.tickets:
            if not ticket.done:
                ticket.done = True
                self._service.metrics.aborted(ticket)
                self._service.engine_loop.abort(ticket)
        self._release()

    def _ended(self) -> None:
        """Note that one of the requests has ended. The last one makes room in the queue, even if its client reads
        slowly."""
        self._left -= 1
        if not self._left:
            self._release()

    def _release(self) -> None:
        if self._load is not None:
            self._service.admission.release(self._load, time.perf_counter() - self.arrived)
            self._load = None
