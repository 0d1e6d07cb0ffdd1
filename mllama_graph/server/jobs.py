"""What an endpoint makes of a body: the requests to run, and the form of their answer."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mllama_graph.inputs.request import Request
from mllama_graph.server.answers import Format
from mllama_graph.server.fields import Asked


@dataclass(frozen=True)
class Job:
    """A checked body. `count`: of its requests. `prepare` makes them, which may take long: another thread calls it.

    `form` makes the form of the answer from the prepared requests.
    """

    asked: Asked
    count: int
    prepare: Callable[[], list[Request]]
    form: Callable[[list[Request]], Format]


def choices_of(request: Request, asked: Asked) -> list[Request]:
    """The request once per choice. Choices differ by their seeds."""
    return [replace(request, sampling=replace(request.sampling, seed=asked.seed_of(n))) for n in range(asked.choices)]
