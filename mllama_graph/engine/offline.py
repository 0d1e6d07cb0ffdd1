"""Offline batches: serves a requests file and writes results.jsonl, one result per request even where some fail."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError, message_of
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.result_file import MOST_IGNORED, Results
from mllama_graph.engine.results import Delta, Result
from mllama_graph.inputs.request import FIELDS, Request
from mllama_graph.inputs.request_file import Line, has_lone_surrogate, parse, refuse_odd, too_deep

log = logging.getLogger(__name__)


def serve(
    engine: Engine, requests: Iterable[tuple[int, Callable[[], Request | None]]], most: int
) -> Iterator[tuple[int, Delta]]:
    """Serve requests, each given by its index and a function that prepares it. Yields (index, delta).

    At most `most` requests are in the engine at a time, and each is prepared only when it is submitted, so that few
    images are in memory. Whatever a request raises becomes its failed result; a request that is None is left out.
    Closing the iterator aborts unfinished requests.
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
                refused = None
                try:
                    request = prepare()
                    if request is not None:
                        places[engine.submit(request)] = place
                # The one boundary between a request and all others. A panic of tokenizers is no Exception.
                except BaseException as error:
                    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                        raise
                    if not isinstance(error, UserError):
                        log.info("request %d can't be prepared", place, exc_info=True)
                    refused = message_of(error)
                # Outside of the handler, whose traceback may hold a decoded image.
                if refused is not None:
                    yield place, Delta(place, None, "", Result.failed(place, refused))
            for number, delta in engine.deltas_of(list(places)) if places else ():
                yield places[number], delta
                if delta.result:
                    del places[number]
    finally:
        for number in places:
            engine.abort(number)


def serve_lines(
    engine: Engine,
    lines: Iterable[Line],
    base: Path,
    results: Results,
    batch: int,
    alter: Callable[[Request], Request] = lambda request: request,
) -> int:
    """Serve every line of a requests file and return their number; lines are read as they are needed.

    `alter` may replace a request before it is submitted.
    """
    # (id, hash of the line) of the lines in progress, by their index.
    known: dict[int, tuple[Any, str | None]] = {}
    count = 0

    def prepare(place: int, line: Line) -> Request | None:
        digest = line_hash(line)
        known[place] = line[0], digest
        given = parse(line)
        id = given.get("id")
        if id is None or too_deep(id) or has_lone_surrogate(line, id):
            id = line[0]
        known[place] = id, digest
        refuse_odd(line, given)
        if given.get("id") is not None and not results.claim(id):
            raise UserError(f"id {json.dumps(id)} is used by an earlier line; ids must differ.")
        if digest and results.keep(place, id, digest):
            del known[place]
            return None
        if len(results.ignored) < MOST_IGNORED:
            results.ignored |= given.keys() - FIELDS
        return alter(engine.processor.request({**given, "id": place}, base))

    def coming() -> Iterator[tuple[int, Callable[[], Request | None]]]:
        nonlocal count
        for place, line in enumerate(lines):
            count += 1
            yield place, partial(prepare, place, line)

    for place, delta in serve(engine, coming(), 2 * batch):
        if delta.result:
            delta.result.id, digest = known.pop(place)
            if delta.result.error:
                log.info("request %s: %s", str(delta.result.id)[:80], delta.result.error)
            results.add(place, delta.result, digest)
    return count


def line_hash(line: Line) -> str | None:
    """A hash of a line's bytes without surrounding blanks; None for a line that a task has changed."""
    given = line[1]
    return hashlib.blake2b(given.strip(), digest_size=8).hexdigest() if isinstance(given, bytes) else None
