"""Errors of the API, in the nested form of OpenAI's: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping
from typing import Any

from mllama_graph.core.errors import TooLong, message_of

# The type of an error by its status code; other 4xx codes are invalid requests.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The fields of prompts.
TEXTS = ("messages", "prompt", "input")
# Fields of a requests file that clients of the API know under another name: the first one that is in the body.
RENAMED = {
    "max_new_tokens": ("max_completion_tokens", "max_tokens", "max_output_tokens"),
    "input_ids": ("prompt",),
    "response_format": ("response_format", "text"),
    # The grammar of tools.
    "structured_outputs": ("structured_outputs", "tools"),
}
SHOWN = {"text": "text.format"}
# Fields that constrain an answer.
GRAMMARS = ("structured_outputs", "response_format", "text", "tools")


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
    text = next((name for name in TEXTS if name in body), None)
    if isinstance(error, ApiError):
        if error.param in TEXTS and error.param not in body:
            error.param = text
        return error
    if isinstance(error, TooLong):
        return _of_length(error, body, text)
    message = message_of(error)
    if isinstance(error, MemoryError):
        return ApiError(503, message, code="out_of_memory", headers={"retry-after": "10"})
    word = re.match(r"[a-z_]+", message)
    name = word[0] if word else ""
    if (field := _field(name, body)) is not None and field != name:
        message, name = message.replace(name, field, 1), field
    if message.startswith("picture") or "image" in message.partition(" in one request")[0][:12]:
        return refused(message, text, "invalid_image")
    return refused(message, name if field is not None else text)


def of_result(message: str, grammar: str | None) -> ApiError:
    """The error of a request that failed in the engine. `grammar`: the field of its grammar (`grammar_field`)."""
    if "not finite" in message:
        return ApiError(500, message, None, "not_finite")
    return refused(message, grammar if message.startswith("the grammar") else None)


def grammar_field(body: Mapping[str, Any]) -> str | None:
    """The field of the body that constrains its answers, as errors call it; None where they are free."""
    found = next((name for name in GRAMMARS if body.get(name) is not None), None)
    return SHOWN.get(found or "", found)


def _field(name: str, body: Mapping[str, Any]) -> str | None:
    """The field of the body that the processor knows as `name`; None where the body has none."""
    found = next((given for given in RENAMED.get(name, (name,)) if body.get(given) is not None), None)
    return SHOWN.get(found or "", found)


def _of_length(error: TooLong, body: Mapping[str, Any], text: str | None) -> ApiError:
    """Names fields that the client can change, where TooLong's own message names keys of the server."""
    field = _field("max_new_tokens", body)
    if error.new is None or error.prompt >= error.most:
        most = error.most if error.new is None else error.most - 1
        return too_long(f"the prompt has {error.prompt} tokens, at most {most} are taken. Shorten it.", text)
    said = f"{field or 'the limit of new tokens'}={error.new} and a prompt of {error.prompt} tokens are more than"
    remedy = f"Lower {field}, or shorten the prompt" if field else "Shorten the prompt"
    return too_long(f"{said} {error.most} tokens. {remedy}.", field or text)
