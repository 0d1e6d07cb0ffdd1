"""Offline batches: lines of requests in, results.jsonl out, one result per line whatever happens to the others."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import FIELDS, Request
from mllama_graph.inputs.request_file import Line

log = logging.getLogger(__name__)


class Results:
    """results.jsonl: a line is written as each request finishes, so that an interrupt loses none; sorted at the end."""

    def __init__(self, path: Path):
        self.path = path
        # Results by their place in the input.
        self.by_place: dict[int, Result] = {}
        # Fields without a meaning, which may be misspelt.
        self.ignored: set[str] = set()
        self._file = path.open("w", encoding="utf8")

    @property
    def finished(self) -> list[Result]:
        """Results of requests that were served, in the order in which they finished."""
        return [result for result in self.by_place.values() if result.error is None]

    @property
    def errors(self) -> int:
        """The number of requests that could not be served."""
        return len(self.by_place) - len(self.finished)

    def add(self, place: int, result: Result) -> None:
        """The result of the request at `place` of the input."""
        self.by_place[place] = result
        self._file.write(_json(result) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Put the lines in the order of the input."""
        self._file.close()
        aside = self.path.with_name(".results.jsonl")
        aside.write_text("".join(_json(self.by_place[place]) + "\n" for place in sorted(self.by_place)), encoding="utf8")
        aside.replace(self.path)


def _json(result: Result) -> str:
    return json.dumps(result.line(), ensure_ascii=False)


def serve_lines(engine: Engine, lines: list[Line], base: Path, results: Results, batch: int,
                alter: Callable[[Request], Request] = lambda request: request) -> None:
    """Serve every line. Requests are prepared a batch ahead of being served, so that images don't pile up.

    `alter` may change a request before it is submitted.
    """
    ids: dict[int, Any] = {}
    seen: set[str] = set()
    coming = iter(enumerate(lines))

    def submit_next() -> bool:
        place, line = next(coming, (None, None))
        if place is None or line is None:
            return False
        number, given = line
        id = given.get("id") if isinstance(given, dict) else None
        ids[place] = number if id is None else id
        try:
            if isinstance(given, str):
                raise UserError(given)
            results.ignored |= given.keys() - FIELDS
            name = json.dumps(ids[place], sort_keys=True)
            if name in seen:
                raise UserError(f"id {name} is used by an earlier line; ids must differ.")
            seen.add(name)
            engine.submit(alter(engine.processor.request({**given, "id": place}, base)))
        except UserError as error:
            log.info("request %s: %s", ids[place], error)
            results.add(place, Result.failed(ids[place], str(error)))
        return True

    def keep(delta: Delta) -> None:
        if delta.result:
            place = delta.result.id
            delta.result.id = ids[place]
            results.add(place, delta.result)

    more = True
    while more or not engine.idle:
        while more and engine.load < 2 * batch:
            more = submit_next()
        for delta in engine.step():
            keep(delta)
