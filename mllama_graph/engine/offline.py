"""Offline batches: serves a requests file and writes results.jsonl, one result per request even where some fail."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import FIELDS, Request
from mllama_graph.inputs.request_file import Line

log = logging.getLogger(__name__)


class Results:
    """Writes results.jsonl: a line as each request finishes, so that an interrupt loses none; sorted at the end."""

    def __init__(self, path: Path):
        self.path = path
        # Results by their request's index in the input.
        self.by_place: dict[int, Result] = {}
        # Unknown fields, which may be misspelt.
        self.ignored: set[str] = set()
        self._file = path.open("w", encoding="utf8")

    @property
    def finished(self) -> list[Result]:
        """The results of requests that were served, in the order in which they finished."""
        return [result for result in self.by_place.values() if result.error is None]

    @property
    def errors(self) -> int:
        """The number of requests that could not be served."""
        return len(self.by_place) - len(self.finished)

    def add(self, place: int, result: Result) -> None:
        """Add and write the result of the request with index `place` in the input."""
        self.by_place[place] = result
        self._file.write(_json(result) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Rewrite the file with its lines in the order of the input."""
        self._file.close()
        aside = self.path.with_name(".results.jsonl")
        aside.write_text(
            "".join(_json(self.by_place[place]) + "\n" for place in sorted(self.by_place)), encoding="utf8"
        )
        aside.replace(self.path)


def _json(result: Result) -> str:
    return json.dumps(result.line(), ensure_ascii=False)


def serve(
    engine: Engine, requests: Iterable[tuple[int, Callable[[], Request]]], most: int
) -> Iterator[tuple[int, Delta]]:
    """Serve requests, each given by its index and a function that prepares it. Yields (index, delta).

    At most `most` requests are in the engine at a time, and each is prepared only when it is submitted, so that few
    images are in memory. A request that raises UserError gets a failed result. Closing the iterator aborts unfinished
    requests.
    """
    coming, more = iter(requests), True
    # Indices of the requests that are in the engine, by the engine's numbers.
    places: dict[int, int] = {}
    try:
        while more or places:
            while more and len(places) < most:
                entry = next(coming, None)
                if entry is None:
                    more = False
                    break
                place, prepare = entry
                try:
                    places[engine.submit(prepare())] = place
                except UserError as error:
                    yield place, Delta(place, None, "", Result.failed(place, str(error)))
            for number, delta in engine.deltas_of(list(places)) if places else ():
                yield places[number], delta
                if delta.result:
                    del places[number]
    finally:
        for number in places:
            engine.abort(number)


def serve_lines(
    engine: Engine,
    lines: list[Line],
    base: Path,
    results: Results,
    batch: int,
    alter: Callable[[Request], Request] = lambda request: request,
) -> None:
    """Serve every line of a requests file. `alter` may replace a request before it is submitted."""
    ids = [_id_of(line) for line in lines]
    seen: set[str] = set()

    def prepare(place: int) -> Request:
        _, given = lines[place]
        if isinstance(given, str):
            raise UserError(given)
        results.ignored |= given.keys() - FIELDS
        name = json.dumps(ids[place], sort_keys=True)
        if name in seen:
            raise UserError(f"id {name} is used by an earlier line; ids must differ.")
        seen.add(name)
        return alter(engine.processor.request({**given, "id": place}, base))

    coming = ((place, partial(prepare, place)) for place in range(len(lines)))
    for place, delta in serve(engine, coming, 2 * batch):
        if delta.result:
            delta.result.id = ids[place]
            if delta.result.error:
                log.info("request %s: %s", ids[place], delta.result.error)
            results.add(place, delta.result)


def _id_of(line: Line) -> Any:
    """The id that a line gives, or else its line number."""
    number, given = line
    id = given.get("id") if isinstance(given, dict) else None
    return number if id is None else id
