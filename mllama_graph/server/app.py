"""The routes, and what every request passes: its id, the API key, the access log, and the form of errors."""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import versions
from mllama_graph.server import chat, completions, responses, texts
from mllama_graph.server.access import AccessLog
from mllama_graph.server.answers import Answer, Events, Format, Left, collect, error_answer, while_connected
from mllama_graph.server.bodies import CLOSE, read_object
from mllama_graph.server.errors import ApiError, of_request
from mllama_graph.server.jobs import Job
from mllama_graph.server.metrics import METRICS
from mllama_graph.server.page import page
from mllama_graph.server.service import READY, Generation, Service

log = logging.getLogger(__name__)

# The longest request id that is taken over from a client.
MOST_ID = 128
# What a client that has left would get; nobody reads it (nginx's code).
LEFT = 499
# Paths that need no API key.
OPEN = ("/", "/health", "/live", "/ping", "/version", "/metrics")

Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints of one service."""

    def __init__(self, service: Service, access: AccessLog):
        self._service, self._access = service, access

    def routes(self) -> list[Route]:
        """All routes."""
        posts: dict[str, Endpoint] = {
            "/v1/chat/completions": self._generating(chat.job),
            "/v1/completions": self._generating(completions.job),
            "/v1/responses": self._generating(responses.job),
            "/tokenize": self._in_thread(texts.tokenize),
            "/detokenize": self._in_thread(texts.detokenize),
        }
        gets: dict[str, Endpoint] = {
            "/v1/models": self.models,
            "/v1/models/{id:path}": self.one_model,
            "/health": self.health,
            "/live": self.live,
            "/ping": self.health,
            "/version": self.version,
            "/metrics": self.metrics,
            "/": page(),
        }
        return [
            *(Route(path, self._guarded(endpoint), methods=["POST"]) for path, endpoint in posts.items()),
            *(Route(path, self._guarded(endpoint), methods=["GET"]) for path, endpoint in gets.items()),
        ]

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return Answer({"object": "list", "data": [self._model(name) for name in self._service.names]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        return Answer(self._model(self._service.model({"model": request.path_params["id"]})))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 once requests are served without waiting for a model or a compiler."""
        state = self._service.state
        return Answer({"status": state}, 200 if state == READY else 503)

    async def live(self, request: Request) -> Response:
        """GET /live: 200 as long as the process answers."""
        return Answer({"status": "live"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, in Prometheus' text format."""
        return Response(self._service.metrics.text(), media_type=METRICS)

    async def version(self, request: Request) -> Response:
        """GET /version."""
        # Imported by name: the package's face imports this room.
        found = import_module("mllama_graph").__version__
        return Answer({"version": found, "packages": versions()})

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "mllama_graph",
            "root": service.names[0],
            "parent": None,
            "max_model_len": service.run.plan.max_length,
        }

    async def _body(self, request: Request, count: Callable[[int], None]) -> dict[str, Any]:
        body = await read_object(request, self._service.bounds, count, self._service.in_thread)
        self._access.body(request.scope, body)
        return body

    def _generating(self, job_of: Callable[[Service, dict[str, Any]], Job]) -> Endpoint:
        """The endpoint that runs the jobs of `job_of`. A job ends where its client leaves, also before a token."""

        async def generating(request: Request) -> Response:
            seconds, note = self._service.bounds.seconds, request.scope["mllama.note"]
            generation, form, stream = await self._begun(request, job_of)
            if stream:
                return Events(generation, form, seconds, lambda why: note.update(ended=why))
            try:
                return Answer(form.whole(await while_connected(request, collect(generation, seconds))))
            finally:
                generation.close()

        return generating

    async def _begun(
        self, request: Request, job_of: Callable[[Service, dict[str, Any]], Job]
    ) -> tuple[Generation, Format, bool]:
        """A submitted job: its generation, the form of its answer, and whether it is streamed.

        Nothing of the body is kept beyond this call: it may hold large pictures.
        """
        service, note, arrived = self._service, request.scope["mllama.note"], time.perf_counter()
        # Before a large body is read for nothing.
        service.check_ready()
        service.admission.check(1)
        with service.admission.bodies.hold() as count:
            body = await self._body(request, count)
            try:
                job = job_of(service, body)
            except UserError as error:
                raise of_request(error, body) from None
            beginning = service.generate(body, job.count, job.prepare, arrived)
            generation = await while_connected(request, beginning)
        note["tokens"] = generation.new_tokens
        note["prompt_tokens"] = sum(ticket.prompt for ticket in generation.tickets[:: job.asked.choices])
        try:
            return generation, job.form(generation.requests), job.asked.stream
        except BaseException:
            generation.close()
            raise

    def _in_thread(self, function: Callable[[Service, dict[str, Any]], dict[str, Any]]) -> Endpoint:
        """The endpoint that answers with what a function of the body returns."""

        async def answering(request: Request) -> Response:
            with self._service.admission.bodies.hold() as count:
                body = await self._body(request, count)
                try:
                    return Answer(await self._service.in_thread(function, self._service, body))
                except UserError as error:
                    raise of_request(error, body) from None

        return answering

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ApiError as error:
                return error_answer(error)
            except (Left, ClientDisconnect):
                request.scope["mllama.note"]["ended"] = "client left"
                return Response(status_code=LEFT)

        return guarded


class Front:
    """Wraps the application: request ids, and one line of the access log per request."""

    def __init__(self, app: ASGIApp, service: Service, access: AccessLog):
        self._app, self._metrics, self._access = app, service.metrics, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        id = _request_id(dict(scope["headers"]).get(b"x-request-id"))
        note = scope["mllama.note"] = {"id": id, "status": None}

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                note["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:
            log.exception("request %s: internal error", id)
            if note["status"] is None:
                await error_answer(ApiError(500, "internal error.", None, "internal_error"))(scope, receive, sent)
        finally:
            self._metrics.answered(note["status"])
            self._access.write(scope, note, time.perf_counter() - start)


class Keyed:
    """Wraps an application that needs an API key, on all paths but those in OPEN."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._refuses(scope):
            text = "the API key is missing or wrong. Send it as Authorization: Bearer KEY."
            error = ApiError(401, text, None, "invalid_api_key", {"www-authenticate": "Bearer", **CLOSE})
            await error_answer(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuses(self, scope: Scope) -> bool:
        """Whether the API key is missing or wrong. Compares bytes in constant time, whatever characters they hold."""
        if scope["path"] in OPEN:
            return False
        kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return not secrets.compare_digest(given.strip() if kind.lower() == b"bearer" else b"", self._key)


def _request_id(given: bytes | None) -> str:
    """A client's request id if it is short and printable, else a new one."""
    text = (given or b"").decode("latin-1")
    if text and len(text) <= MOST_ID and text.isascii() and text.isprintable():
        return text
    return f"req-{secrets.token_hex(12)}"


async def _of_routing(request: Request, error: Exception) -> Response:
    """Errors of the router: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:100], request.method
    text = f"there is no {path}." if error.status_code == 404 else f"{path} does not take {method}."
    code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
    return error_answer(ApiError(error.status_code, text, None, code, error.headers))


def application(service: Service, api_key: str | None, cors_origins: list[str], access: AccessLog) -> ASGIApp:
    """The whole application."""
    app: ASGIApp = Starlette(routes=Api(service, access).routes(), exception_handlers={HTTPException: _of_routing})
    if api_key:
        app = Keyed(app, api_key)
    if cors_origins:
        # Around the key: a browser asks without one before it sends one, and hides an answer without these headers.
        app = CORSMiddleware(app, cors_origins, ["*"], ["*"], expose_headers=["x-request-id", "retry-after"])
    return Front(app, service, access)
