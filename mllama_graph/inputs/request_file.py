"""Reads files of requests: one JSON object per line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError

# One line of a requests file: its number, counted from 1, and its object or the reason why it can't be read.
Line = tuple[int, dict[str, Any] | str]


def read_lines(path: Path) -> Iterator[Line]:
    """Read the lines of a JSON-lines file; blank lines are skipped.

    Raises UserError where the file can't be read.
    """
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"requests={path} can't be read: {error.strerror}.") from error
    if not content.strip():
        raise UserError(f"requests={path} is empty. Put one JSON object on each line.")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line.decode())
            # JSON can encode a lone surrogate, which neither a tokenizer nor a UTF-8 file accepts.
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeError as error:
            yield number, f"line {number} is not valid UTF-8 text: {error}."
            continue
        except ValueError as error:
            yield number, f"line {number} is not valid JSON: {error}."
            continue
        yield number, given if isinstance(given, dict) else f"line {number} is not a JSON object."


def most_images(lines: Iterable[Line]) -> int:
    """The most images on one line, rounded up to a power of two and counted without opening any image."""

    def count(given: dict[str, Any] | str) -> int:
        if isinstance(given, str):
            return 0
        images, messages = given.get("images"), given.get("messages")
        contents = (
            [message.get("content") for message in messages if isinstance(message, dict)]
            if isinstance(messages, list)
            else []
        )
        parts = [part for content in contents if isinstance(content, list) for part in content]
        beside = len(images) if isinstance(images, list) else 0
        return beside + sum(isinstance(part, dict) and part.get("type") != "text" for part in parts)

    most = max((count(given) for _, given in lines), default=0)
    return 1 << max(most - 1, 0).bit_length()
