"""The engine: submit requests, step, get tokens as they come. Ties scheduler, ranks and text together."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from mllama_graph.plan.blocks import pages_for
from mllama_graph.core.place import process_age
from mllama_graph.inputs.processor import Detokenizer, Processor, Request
from mllama_graph.engine.rank import Token
from mllama_graph.plan.cost import step_bytes
from mllama_graph.engine.scheduler import DecodeStep, ImageRef, PrefillStep, Scheduler, Sequence, VisionStep
from mllama_graph.engine.executor import Ranks


@dataclass
class Result:
    """A finished request. Times are in milliseconds, from submission."""

    id: Any
    token_ids: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    time_to_first_token_ms: float
    time_per_output_token_ms: Optional[float]
    logprobs: Optional[list[dict[str, Any]]] = None

    def line(self) -> dict[str, Any]:
        """As a line of results.jsonl."""
        fields = dict(self.__dict__)
        if self.logprobs is None:
            del fields["logprobs"]
        return fields


@dataclass(frozen=True)
class Delta:
    """What a step brought to one request: text that became certain, and its result if that was the last of it."""

    id: Any
    token: int
    text: str
    result: Optional[Result] = None


@dataclass
class Stats:
    """Sums over the steps of a run. `decode_bytes` is what decode steps had to read, modelled from shapes."""

    vision_steps: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    # Seconds from the start of the process to the first token of all; None before it.
    start_to_first_token: Optional[float] = None


@dataclass
class _Running:
    request: Request
    text: Detokenizer
    submitted: float
    first: float = 0.0
    tokens: list[Token] = field(default_factory=list)


class Engine:
    """One model serving many requests. `step` until `idle`."""

    def __init__(self, processor: Processor, scheduler: Scheduler, ranks: Ranks):
        self.processor, self.scheduler, self.ranks = processor, scheduler, ranks
        self.stats = Stats()
        self._running: dict[int, _Running] = {}
        self._pixels: dict[str, np.ndarray] = {}
        self._next = 0
        self._tokens_per_tile = ranks.shape.vision.tokens

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def load(self) -> int:
        """Requests submitted and not finished."""
        return len(self._running)

    def submit(self, request: Request) -> int:
        """Queue a request; the number that `abort` takes.

        Raises UserError for a request that the plan can never hold.
        """
        images = tuple(ImageRef(t.key, t.count, t.count * self._tokens_per_tile, t.aspect) for t in request.images)
        sequence = Sequence(self._next, request.ids, images, request.positions, request.max_new, request.sampling)
        self.scheduler.add(sequence)
        self._next += 1
        self._pixels |= {tiles.key: tiles.data for tiles in request.images}
        self._running[sequence.id] = _Running(
            request, Detokenizer(self.processor, request.stop), time.perf_counter())
        return sequence.id

    def expect(self, request: Request) -> None:
        """Have the graphs on their way that a request alone will use, the decode graph for its whole length."""
        plan, graphs = self.scheduler.plan, self.ranks.graphs
        image_pages = sum(pages_for(t.count * self._tokens_per_tile, plan.page_size) for t in request.images)
        if request.images:
            graphs.want(plan.vision())
        done = 0
        while done < len(request.ids):
            chunk = plan.chunk(len(request.ids) - done)
            graphs.want(plan.prefill(chunk, pages_for(done, plan.page_size), image_pages))
            done += chunk
        if request.max_new > 1:
            graphs.want(plan.decode(1, pages_for(len(request.ids) + request.max_new, plan.page_size), image_pages))

    def abort(self, number: int) -> None:
        """Forget a request; its pages are free at once."""
        self.scheduler.abort(number)
        if number in self._running:
            self._forget(number)

    def step(self) -> list[Delta]:
        """Run one step; what it brought to each request that got a token."""
        step = self.scheduler.next()
        if step is None:
            return []
        start = time.perf_counter()
        pixels = self._pixels[step.image.key] if isinstance(step, VisionStep) else None
        tokens = self.ranks.execute(step, pixels)
        self._count(step, time.perf_counter() - start)
        moved = self.scheduler.commit(tuple(token.id for token in tokens))
        return [self._advance(sequence, token) for (sequence, _), token in zip(moved, tokens, strict=True)]

    def run(self, on_delta: Callable[[Delta], None]) -> None:
        """Step until nothing is left to do."""
        while not self.idle:
            for delta in self.step():
                on_delta(delta)

    def _advance(self, sequence: Sequence, token: Token) -> Delta:
        state = self._running[sequence.id]
        now = time.perf_counter()
        state.first = state.first or now
        if self.stats.start_to_first_token is None:
            self.stats.start_to_first_token = process_age()
        state.tokens.append(token)
        request = state.request
        ended = token.id in self.processor.eos and not request.ignore_eos
        text = "" if ended else state.text.add(token.id)
        if ended or state.text.stopped or len(state.tokens) >= request.max_new:
            reason = "stop" if ended or state.text.stopped else "length"
            text += state.text.flush()
            self.scheduler.finish(sequence)
            self._forget(sequence.id)
            return Delta(request.id, token.id, text, self._result(state, reason, now))
        return Delta(request.id, token.id, text)

    def _result(self, state: _Running, reason: str, now: float) -> Result:
        request, ids = state.request, [token.id for token in state.tokens]
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = [{"id": t.id, "logprob": t.logprob, "top_ids": list(t.top_ids),
                         "top_logprobs": list(t.top_logprobs)} for t in state.tokens]
        after = len(ids) - 1
        return Result(
            id=request.id, token_ids=ids, text=state.text.text, finish_reason=reason, prompt_tokens=len(request.ids),
            image_tokens=sum(t.count for t in request.images) * self._tokens_per_tile,
            time_to_first_token_ms=round((state.first - state.submitted) * 1e3, 3),
            time_per_output_token_ms=round((now - state.first) * 1e3 / after, 3) if after else None,
            logprobs=logprobs)

    def _forget(self, number: int) -> None:
        gone = self._running.pop(number)
        wanted = {tiles.key for state in self._running.values() for tiles in state.request.images}
        for tiles in gone.request.images:
            if tiles.key not in wanted:
                self._pixels.pop(tiles.key, None)

    def _count(self, step: Any, seconds: float) -> None:
        stats = self.stats
        if isinstance(step, VisionStep):
            stats.vision_steps, stats.vision_seconds = stats.vision_steps + 1, stats.vision_seconds + seconds
        elif isinstance(step, PrefillStep):
            stats.prefill_steps, stats.prefill_seconds = stats.prefill_steps + 1, stats.prefill_seconds + seconds
        elif isinstance(step, DecodeStep):
            stats.decode_steps += 1
            stats.decode_rows += len(step.rows)
            stats.decode_seconds += seconds
            image_tokens = sum(sum(row.image_fill) for row in step.rows)
            stats.decode_bytes += step_bytes(
                self.ranks.shape, image_tokens > 0, sum(row.start + 1 for row in step.rows), image_tokens,
                self.ranks.rank.precision.store.itemsize, self.ranks.rank.precision.compute.itemsize)
