"""The page at `/`: one file, without requests to other hosts, under a policy that runs no other script than its own."""

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


def page() -> Callable[[Request], Awaitable[Response]]:
    """The endpoint that answers with the page. It holds no key and nothing of the model, and needs no key."""
    text = FILE.read_text(encoding="utf8")
    headers = {
        "content-security-policy": policy(text),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }

    async def answer(request: Request) -> Response:
        return Response(text, media_type="text/html", headers=headers)

    return answer


def policy(text: str) -> str:
    """The Content-Security-Policy of a page: its own script and style by their hashes, requests to its own origin."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(text, 'script')}",
            f"style-src {_hashes(text, 'style')}",
            "img-src data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # The browser then refuses any text as HTML, too.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _hashes(text: str, kind: str) -> str:
    """The sources that allow the elements of a kind."""
    found = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'" for part in found)
