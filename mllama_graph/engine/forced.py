"""Log-probabilities of two models at the same tokens: one generates them, the other is given them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllama_graph.engine.engine import Engine
from mllama_graph.engine.offline import serve
from mllama_graph.engine.results import Result
from mllama_graph.inputs.request import Request
from mllama_graph.inputs.request_file import Line, parse
from mllama_graph.measure.agreement import Agreement


@dataclass
class Reference:
    """The tokens that a model generated for each line, by the line's index, and their log-probabilities in files.

    A file holds fp32 (N, V): V log-probabilities for each of N tokens.
    """

    folder: Path
    tokens: dict[int, tuple[int, ...]]

    def path(self, place: int) -> Path:
        """The file of a line's log-probabilities."""
        return self.folder / f"{place}.npy"


def record(engine: Engine, lines: Sequence[Line], base: Path, folder: Path) -> Reference:
    """Serve every line, and keep its tokens and all log-probabilities. A line that can't be served is left out."""
    found, vocab = Reference(folder, {}), engine.executor.run.shape.text.vocab
    for place, result in served(engine, lines, base, range(len(lines)), lambda place, request: whole(request, vocab)):
        found.tokens[place] = tuple(result.token_ids)
        np.save(found.path(place), _all(result, vocab))
    return found


def compare(engine: Engine, lines: Sequence[Line], base: Path, reference: Reference) -> Agreement:
    """Give an engine the reference's tokens, and compare log-probabilities at each."""
    agreement, vocab = Agreement(), engine.executor.run.shape.text.vocab

    def forced(place: int, request: Request) -> Request:
        tokens = reference.tokens[place]
        return replace(whole(request, vocab), forced=tokens, max_new=len(tokens), stop=(), ignore_eos=True)

    for place, result in served(engine, lines, base, sorted(reference.tokens), forced):
        agreement.add(np.load(reference.path(place)), _all(result, vocab))
    return agreement


def whole(request: Request, vocab: int) -> Request:
    """The request with all log-probabilities in its result."""
    return replace(request, sampling=replace(request.sampling, logprobs=vocab))


def served(
    engine: Engine,
    lines: Sequence[Line],
    base: Path,
    places: Sequence[int],
    alter: Callable[[int, Request], Request] = lambda place, request: request,
) -> Iterator[tuple[int, Result]]:
    """(index, result) of those of the lines at `places` that can be served. `alter` may replace a request."""

    def prepare(place: int) -> Callable[[], Request]:
        def request() -> Request:
            return alter(place, engine.processor.request({**parse(lines[place]), "id": place}, base))

        return request

    coming = ((place, prepare(place)) for place in places)
    for place, delta in serve(engine, coming, engine.executor.run.limits.batch):
        if delta.result and delta.result.error is None:
            yield place, delta.result


def _all(result: Result, vocab: int) -> NDArray[np.float32]:
    """The log-probabilities of every id at every token: fp32 (N, V)."""
    steps: list[dict[str, Any]] = result.logprobs or []
    rows_NV = np.full((len(steps), vocab), -np.inf, np.float32)
    for row_V, step in zip(rows_NV, steps, strict=True):
        row_V[step["top_ids"]] = step["top_logprobs"]
    return rows_NV
