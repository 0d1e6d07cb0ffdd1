"""The access log: one JSON line per request, without prompts and pictures unless the operator asks for them."""

import json
import time
from collections.abc import Mapping
from typing import Any, TextIO

from starlette.types import Scope

# Characters of a body that log_prompts=true writes.
MOST_LOGGED = 4000


class AccessLog:
    """Writes one line per request to `stream`. `prompts`: write the bodies of requests, too."""

    def __init__(self, stream: TextIO | None, prompts: bool = False):
        self._stream, self._prompts = stream, prompts

    def body(self, scope: Scope, body: Mapping[str, Any]) -> None:
        """Note a request's body, of which only the model and what was asked for are logged."""
        note = scope["mllama.note"]
        note["model"] = str(body.get("model"))[:100]
        note["stream"] = body.get("stream") is True
        if self._prompts:
            note["body"] = json.dumps(body, ensure_ascii=False)[:MOST_LOGGED]

    def write(self, scope: Scope, note: dict[str, Any], seconds: float) -> None:
        """Write the line of a request that took `seconds`."""
        if self._stream is None:
            return
        if callable(tokens := note.get("tokens")):
            note["tokens"] = tokens()
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            **note,
            "ms": round(seconds * 1e3, 3),
        }
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # A full disk or a closed pipe must not end requests.
            self._stream = None
