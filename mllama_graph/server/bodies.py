"""Reads the bodies of requests: bounded in bytes and in time, JSON by its standard, one object."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.request_file import DEPTH, has_lone_surrogate, parse, too_deep
from mllama_graph.server.errors import ApiError, refused
from mllama_graph.server.limits import Bounds

# Larger bodies are parsed in another thread.
SMALL = 1 << 16
# The rest of a refused body is not read: the connection ends with the answer.
CLOSE = {"connection": "close"}

InThread = Callable[..., Awaitable[Any]]


async def read_object(
    request: Request, bounds: Bounds, count: Callable[[int], None], in_thread: InThread
) -> dict[str, Any]:
    """The JSON object in a request's body. `count` counts its bytes; `in_thread` calls a function in another thread.

    Raises ApiError, or ClientDisconnect where the client leaves meanwhile.
    """
    try:
        async with asyncio.timeout(bounds.body_seconds):
            data = await _read(request, bounds.body, count)
    except TimeoutError:
        text = f"the body did not arrive within {bounds.body_seconds:g} s."
        raise ApiError(408, text, None, "body_timeout", CLOSE) from None
    if len(data) <= SMALL:
        return _object(data)
    found: dict[str, Any] = await in_thread(_object, data)
    return found


async def _read(request: Request, most: int, count: Callable[[int], None]) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        count(len(part))
        parts.append(part)
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    text = f"the body has more than {most / (1 << 20):g} MiB. Send fewer or smaller pictures."
    return ApiError(413, text, None, "body_too_large", CLOSE)


def _object(data: bytes) -> dict[str, Any]:
    if not data.strip():
        raise refused("the body is empty; it must be a JSON object.", code="invalid_json")
    line = (1, data)
    try:
        found = parse(line)
    except UserError as error:
        raise refused(str(error).replace("line 1", "the body", 1), code="invalid_json") from None
    except RecursionError:
        raise refused(f"the body is nested more than {DEPTH} levels deep.", code="invalid_json") from None
    if too_deep(found):
        raise refused(f"the body is nested more than {DEPTH} levels deep.", code="invalid_json")
    if has_lone_surrogate(line, found):
        raise refused("the body holds a lone surrogate, such as \\ud800 without its second half.", code="invalid_json")
    return found
