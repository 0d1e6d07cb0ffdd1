"""Metrics of the server, in Prometheus' text format, under the names that dashboards of vLLM know."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mllama_graph.engine.results import Delta
from mllama_graph.server.loop import Ticket

if TYPE_CHECKING:
    from mllama_graph.server.service import Service

METRICS = "text/plain; version=0.0.4; charset=utf-8"
OWN, VLLM = "mllama_graph:", "vllm:"
# Upper ends of buckets, in seconds and in tokens.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of values by bucket. Lighter than prometheus_client's own, since it counts every token."""

    def __init__(self, ends: tuple[float, ...]):
        self._ends, self._counts, self._sum = ends, [0] * (len(ends) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._ends, value)] += 1
        self._sum += value

    def family(self, name: str, text: str, labels: dict[str, str]) -> Metric:
        """The histogram as Prometheus' client writes it."""
        total, buckets = 0, []
        for end, count in zip((*map(str, self._ends), "+Inf"), self._counts):
            total += count
            buckets.append((end, total))
        found = HistogramMetricFamily(name, text, labels=[*labels])
        found.add_metric([*labels.values()], buckets, self._sum)
        return found


class Metrics(Collector):
    """Counts of what was served. Used in the event loop's thread only; `service` gives the rest."""

    def __init__(self, service: "Service", vllm_names: bool = False):
        self._service, self._prefixes = service, (OWN, VLLM) if vllm_names else (OWN,)
        self._sums: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._image_hits = 0
        self._histograms = {
            "time_to_first_token_seconds": (Histogram(SHORT + (20, 40, 80, 160)), "From arrival to the first token."),
            "inter_token_latency_seconds": (Histogram(SHORT), "Between two tokens of a request."),
            "e2e_request_latency_seconds": (Histogram(LONG), "From arrival to the last token."),
            "request_queue_time_seconds": (Histogram(LONG), "From arrival to the first step."),
            "request_prompt_tokens": (Histogram(SIZES), "Tokens of a prompt."),
            "request_generation_tokens": (Histogram(SIZES), "New tokens of a request."),
        }
        self._first, self._between, self._whole, self._queued, self._prompts, self._new = (
            histogram for histogram, _ in self._histograms.values()
        )
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def token(self, ticket: Ticket, delta: Delta, now: float) -> None:
        """Count a delta of a request at the end of its step."""
        if delta.token is not None:
            if ticket.tokens:
                self._between.add(now - ticket.latest)
            else:
                ticket.first = now
                self._first.add(now - ticket.arrived)
                self._queued.add(max(0.0, ticket.begun - ticket.arrived))
                self._prompts.add(ticket.prompt)
                self._sums["prompt_tokens"] += ticket.prompt
                self._sums["images"] += ticket.images
            ticket.tokens, ticket.latest = ticket.tokens + 1, now
            self._sums["generation_tokens"] += 1
        if result := delta.result:
            self._ends[result.finish_reason] += 1
            self._sums["cached_tokens"] += result.cached_tokens
            self._whole.add(now - ticket.arrived)
            self._new.add(ticket.tokens)

    def aborted(self, ticket: Ticket) -> None:
        """Count a request that its client left, or that took too long."""
        self._ends["abort"] += 1

    def answered(self, status: int | None) -> None:
        """Count an HTTP answer."""
        self._statuses[status or 499] += 1

    def summary(self) -> dict[str, Any]:
        """Sums for result.json."""
        return {
            "requests": sum(count for reason, count in self._ends.items() if reason in ("stop", "length")),
            "aborted": self._ends["abort"],
            "prompt_tokens": self._sums["prompt_tokens"],
            "new_tokens": self._sums["generation_tokens"],
        }

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics of prometheus_client's collectors."""
        labels = {"model_name": self._service.names[0]}
        for prefix in self._prefixes:
            for name, value, text in self._gauges():
                gauge = GaugeMetricFamily(prefix + name, text, labels=[*labels])
                gauge.add_metric([*labels.values()], value)
                yield gauge
            for name, value, text in self._counters():
                counter = CounterMetricFamily(prefix + name, text, labels=[*labels])
                counter.add_metric([*labels.values()], value)
                yield counter
            success = CounterMetricFamily(
                f"{prefix}request_success", "Requests that ended, by reason.", labels=[*labels, "finished_reason"]
            )
            for reason in ("stop", "length", "abort", "error"):
                success.add_metric([*labels.values(), reason], self._ends[reason])
            yield success
            for name, (histogram, text) in self._histograms.items():
                yield histogram.family(prefix + name, text, labels)
        answers = CounterMetricFamily(f"{OWN}http_requests", "HTTP answers, by status code.", labels=["status"])
        for status, count in sorted(self._statuses.items()):
            answers.add_metric([str(status)], count)
        yield answers

    def _gauges(self) -> Iterator[tuple[str, float, str]]:
        engine, load = self._service.engine_loop.engine, self._service.admission.load
        running = waiting = 0
        pages = image_pages = 0.0
        if engine is not None:
            scheduler = engine.scheduler
            running = len(scheduler.running)
            waiting = len(scheduler.waiting)
            pages = 1 - scheduler.pool.free / max(1, scheduler.pool.capacity)
            pool = scheduler.images.pool
            image_pages = 1 - pool.free / max(1, pool.capacity)
        yield "num_requests_running", running, "Requests in the batch."
        yield "num_requests_waiting", waiting, "Requests that wait for a row or for pages."
        yield "num_requests_open", load.requests, "Requests that run, wait or are being answered."
        yield "kv_cache_usage_perc", pages, "K/V pages in use; 1 is all."
        yield "image_cache_usage_perc", image_pages, "Image K/V pages in use or kept for reuse; 1 is all."

    def _counters(self) -> Iterator[tuple[str, float, str]]:
        engine, sums = self._service.engine_loop.engine, self._sums
        preemptions = compiled = encoded = 0
        if engine is not None:
            preemptions, encoded = engine.scheduler.preemptions, engine.stats.vision_steps
            compiled = sum(record["source"] == "compiled" for record in engine.graph_records())
        # An image is encoded before its request's first token, when it is counted; so the difference may dip for a
        # moment, and a counter must not.
        self._image_hits = max(self._image_hits, sums["images"] - encoded)
        yield "prompt_tokens", sums["prompt_tokens"], "Tokens of prompts that got a first token."
        yield "generation_tokens", sums["generation_tokens"], "New tokens."
        yield "num_preemptions", preemptions, "Requests put back into the queue for lack of pages."
        yield "prefix_cache_queries", sums["prompt_tokens"], "Prompt tokens looked up in the prefix cache."
        yield "prefix_cache_hits", sums["cached_tokens"], "Prompt tokens found in the prefix cache."
        yield "mm_cache_queries", sums["images"], "Pictures of requests."
        yield "mm_cache_hits", self._image_hits, "Pictures that were encoded before."
        yield "graph_compilations", compiled, "Graphs compiled since the start."
        yield "requests_aborted", self._ends["abort"], "Requests whose client left or that took too long."
