"""Metrics of the server, in Prometheus' text format, under the names that dashboards of vLLM know."""

from typing import TYPE_CHECKING

from mllama_graph.engine.results import Delta
from mllama_graph.server.loop import Ticket

if TYPE_CHECKING:
    from mllama_graph.server.service import Service


class Metrics:
    """Counts of what was served."""

    def __init__(self, service: "Service"):
        self._service = service

    def token(self, ticket: Ticket, delta: Delta, now: float) -> None:
        """Count a delta of a request at the end of its step."""

    def summary(self) -> dict[str, float]:
        """Sums for result.json."""
        return {}

    def aborted(self, ticket: Ticket) -> None:
        """Count a request that its client left."""
