"""Offline batches: a file of requests in, results.jsonl out, one line a request whatever happens to the others."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllama_graph.core.config import UserError
from mllama_graph.engine.engine import Delta, Engine, Result
from mllama_graph.inputs.processor import FIELDS, Request

log = logging.getLogger(__name__)

# One line of a requests file: its number from 1, and its object or what is wrong with it.
Line = tuple[int, dict[str, Any] | str]


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a JSON-lines file; blank lines are passed over.

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
            # JSON can spell half a character (a lone surrogate), which no tokenizer and no file takes.
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeError as error:
            yield number, f"line {number} is not valid UTF-8 text: {error}."
            continue
        except ValueError as error:
            yield number, f"line {number} is not valid JSON: {error}."
            continue
        yield number, given if isinstance(given, dict) else f"line {number} is not a JSON object."


def most_images(lines: list[Line]) -> int:
    """A power of two that holds the images of every line, as far as they can be counted before they are read."""

    def count(given: dict[str, Any] | str) -> int:
        if isinstance(given, str):
            return 0
        images, messages = given.get("images"), given.get("messages")
        parts = [part for message in messages or () if isinstance(message, dict)
                 for part in (message.get("content") or ()) if isinstance(part, dict) and part.get("type") != "text"
                 ] if isinstance(messages, list) else []
        return (len(images) if isinstance(images, list) else 0) + len(parts)

    most = max((count(given) for _, given in lines), default=0)
    return 1 << max(most - 1, 0).bit_length()


class Results:
    """results.jsonl: a line as each request finishes, so that an interrupt loses none; in input order at the end."""

    def __init__(self, path: Path, expected: int):
        self.path, self.expected = path, expected
        self.finished: list[Result] = []
        self.by_place: dict[int, Result] = {}
        self.errors = 0
        # Fields that mean nothing, perhaps misspelt.
        self.ignored: set[str] = set()
        self._lines: dict[int, str] = {}
        self._file = path.open("w", encoding="utf8")

    def add(self, place: int, line: dict[str, Any]) -> None:
        """The result of the request at `place` of the input."""
        text = json.dumps(line, ensure_ascii=False)
        self._lines[place] = text
        self._file.write(text + "\n")
        self._file.flush()

    def fail(self, place: int, id: Any, error: str) -> None:
        """The error of the request at `place`."""
        self.errors += 1
        self.add(place, {"id": id, "token_ids": [], "text": "", "finish_reason": "error", "error": error})

    def close(self) -> None:
        """Put the lines in the order of the input."""
        self._file.close()
        aside = self.path.with_name(".results.jsonl")
        aside.write_text("".join(self._lines[place] + "\n" for place in sorted(self._lines)), encoding="utf8")
        aside.replace(self.path)


def serve_lines(engine: Engine, lines: list[Line], base: Path, results: Results, batch: int,
                alter: Callable[[Request], Request] = lambda request: request) -> None:
    """Every line to its result or its error. Requests are prepared a batch ahead, so that images don't pile up.

    `alter` may change a request before it is submitted.
    """
    places: dict[int, int] = {}
    seen: set[str] = set()
    coming = iter(enumerate(lines))

    def submit_next() -> bool:
        place, (number, given) = next(coming, (None, (None, None)))
        if place is None:
            return False
        id = given.get("id") if isinstance(given, dict) else None
        id = number if id is None else id
        try:
            if isinstance(given, str):
                raise UserError(given)
            results.ignored |= given.keys() - FIELDS
            name = json.dumps(id, sort_keys=True)
            if name in seen:
                raise UserError(f"id {name} is used by an earlier line; ids must differ.")
            seen.add(name)
            engine.submit(alter(engine.processor.request({**given, "id": place}, base)))
            places[place] = id
        except UserError as error:
            log.info("request %s: %s", id, error)
            results.fail(place, id, str(error))
        return True

    def keep(delta: Delta) -> None:
        if delta.result:
            place = delta.result.id
            delta.result.id = places.pop(place)
            results.finished.append(delta.result)
            results.by_place[place] = delta.result
            results.add(place, delta.result.line())

    more = True
    while more or not engine.idle:
        while more and engine.load < 2 * batch:
            more = submit_next()
        for delta in engine.step():
            keep(delta)
