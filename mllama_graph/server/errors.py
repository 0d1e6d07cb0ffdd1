"""Errors of the API, in the nested form of OpenAI's: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping
from typing import Any

from mllama_graph.core.errors import message_of

# The type of an error by its status code; other 4xx codes are invalid requests.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# Fields of a requests file that clients of the API know under another name.
RENAMED = {"max_new_tokens": ("max_completion_tokens", "max_tokens", "max_output_tokens"), "input_ids": ("prompt",)}


class ApiError(Exception):
    """An answer with an error. `param`: the field of the request that is at fault; `code`: a stable word for programs.

    `headers`: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the request's fields: 400."""
    return ApiError(400, message, param, code or "invalid_value")


def too_long(message: str, field: str | None) -> ApiError:
    """The error of a prompt that is too long. Clients such as litellm know it by the beginning of OpenAI's sentence."""
    return refused(f"{message} This model's maximum context length is exceeded.", field, "context_length_exceeded")


def of_request(error: BaseException, body: Mapping[str, Any]) -> ApiError:
    """The error of a request that can't be prepared. Our messages begin with the field at fault, if there is one."""
    if isinstance(error, ApiError):
        return error
    message = message_of(error)
    if isinstance(error, MemoryError):
        return ApiError(503, message, code="out_of_memory", headers={"retry-after": "10"})
    word = re.match(r"[a-z_]+", message)
    param = word[0] if word else None
    for name in RENAMED.get(param or "", ()):
        if body.get(name) is not None:
            message, param = message.replace(param or "", name, 1), name
            break
    text = next((name for name in ("messages", "prompt", "input") if name in body), None)
    if "max_input_length" in message:
        return too_long(message, text)
    if message.startswith("picture") or "image" in message.partition(" in one request")[0][:12]:
        return refused(message, text, "invalid_image")
    return refused(message, param if param in body else text)
