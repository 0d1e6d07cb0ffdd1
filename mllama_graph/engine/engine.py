"""The engine: connects the scheduler, the ranks and text processing, and returns tokens step by step."""

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mllama_graph.core.machine import process_age
from mllama_graph.core.report import Progress
from mllama_graph.engine.constrained import Constraint, masked
from mllama_graph.engine.executor import Executor
from mllama_graph.engine.results import Delta, Result
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.stats import Stats, Totals
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, Step, Token
from mllama_graph.inputs.detokenizer import Detokenizer
from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.request import Request
from mllama_graph.model.formats import described

# The error of a request whose logits are NaN or infinite at its new token number `step`, counted from 1.
NOT_FINITE_ERROR = (
    "logits are not finite at step {step}: the checkpoint holds weights that are not finite, or a value left the range "
    "of its dtype. Check the checkpoint, or use dtype=fp32."
)


@dataclass
class _Running:
    """A request in progress. Its generated ids are in `sequence`."""

    request: Request
    sequence: Sequence
    text: Detokenizer
    submitted: float
    constraint: Constraint | None = None
    first: float = 0.0
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class Engine:
    """Serves many requests with one model: `submit` requests, `step` until `idle`, then `close`."""

    def __init__(self, processor: Processor, scheduler: Scheduler, executor: Executor):
        self.processor, self.scheduler, self.executor = processor, scheduler, executor
        self.stats = Stats()
        self._running: dict[int, _Running] = {}
        self._unread: dict[int, list[Delta]] = {}
        self._next = 0
        self._tokens_per_tile = scheduler.plan.tokens_per_tile

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return self.scheduler.idle

    @property
    def load(self) -> int:
        """The number of unfinished requests."""
        return len(self._running)

    def submit(self, request: Request) -> int:
        """Queue a request and return its number, which `abort` takes.

        Raises UserError for a request that the plan can never hold.
        """
        sequence = Sequence(
            self._next,
            request.ids,
            request.images,
            request.positions,
            request.max_new,
            request.sampling,
            request.priority,
        )
        self.scheduler.add(sequence)
        self._next += 1
        constraint = Constraint(request.grammar, request.max_new) if request.grammar else None
        self._running[sequence.id] = _Running(
            request, sequence, self.processor.detokenizer(request.stop), time.perf_counter(), constraint
        )
        return sequence.id

    def abort(self, number: int) -> None:
        """Drop a request and free its pages at once."""
        self.scheduler.abort(number)
        self._running.pop(number, None)
        self._unread.pop(number, None)

    def step(self) -> list[Delta]:
        """Run one step and return a delta for each request that got a token."""
        return [delta for _, delta in self._step()]

    def deltas_of(self, numbers: Collection[int]) -> list[tuple[int, Delta]]:
        """(number, delta) for the requests with these numbers. Runs a step if no delta of theirs is waiting to be read.

        Deltas of other requests are kept until they are read.
        """
        if not any(number in self._unread for number in numbers):
            for number, delta in self._step():
                self._unread.setdefault(number, []).append(delta)
        return [(number, delta) for number in numbers for delta in self._unread.pop(number, [])]

    def _step(self) -> list[tuple[int, Delta]]:
        step = self.scheduler.next()
        if step is None:
            return []
        start = time.perf_counter()
        step = masked(step, self._constraint)
        tokens = self.executor.execute(step)
        seconds = time.perf_counter() - start
        if self.scheduler.pace:
            self.scheduler.pace.took(step, seconds)
        self.stats.count(step, seconds, self._image_tokens(step), self.executor.run.shape, self.executor.run.storage)
        tokens = self._forced(step, tokens)
        moved = self.scheduler.commit(tuple(token.id for token in tokens))
        return [
            (sequence.id, self._advance(sequence, token)) for (sequence, _), token in zip(moved, tokens, strict=True)
        ]

    def _constraint(self, number: int) -> Constraint | None:
        """What constrains the next id of a sequence, unless that id is given."""
        state = self._running[number]
        return None if len(state.sequence.generated) < len(state.request.forced) else state.constraint

    def _forced(self, step: Step, tokens: list[Token]) -> list[Token]:
        """The tokens of a step, with the ids of requests that force theirs. Ranks learn ids from the next step."""
        taken = []
        for row, token in zip(step.rows, tokens):
            state = self._running[row.sequence]
            at = len(state.sequence.generated)
            if at < len(state.request.forced) and token.id != NOT_FINITE:
                id = state.request.forced[at]
                token = replace(token, id=id, logprob=dict(zip(token.top_ids, token.top_logprobs)).get(id))
            taken.append(token)
        return taken

    def run(self, on_delta: Callable[[Delta], None]) -> None:
        """Step until no request is left."""
        while not self.idle:
            for delta in self.step():
                on_delta(delta)

    def reset_stats(self) -> None:
        """Forget the steps so far, such as those of a warm-up."""
        self.stats, self.scheduler.preemptions = Stats(), 0

    def metrics(self, finished: Totals) -> dict[str, Any]:
        """The run's metrics for result.json."""
        run = self.executor.run
        stored = {"quant": described(run.storage.formats), "kv": run.precision.kv}
        return self.stats.metrics(finished, self.scheduler.preemptions) | stored

    def graph_records(self) -> list[dict[str, Any]]:
        """The record of each graph, for result.json."""
        return [asdict(record) for record in self.executor.graphs.records]

    def close(self, progress: Progress | None = None) -> None:
        """End the worker ranks. With `progress`, first finish and store graphs still compiling; Ctrl-C stops that."""
        self.executor.close()
        graphs = self.executor.graphs
        pending = graphs.compiler.pending
        if progress and pending and not graphs.store.warning:
            progress.say(
                f"\nwaiting for {pending} graph{'s' * (pending > 1)} to be compiled for the next start; "
                "Ctrl-C stops this"
            )
            try:
                graphs.drain(progress.graphs)
            except KeyboardInterrupt:
                progress.say(
                    f"stopped: {graphs.compiler.pending} not compiled; task=warmup compiles all graphs in advance"
                )
        graphs.compiler.close()

    def _advance(self, sequence: Sequence, token: Token) -> Delta:
        state, now = self._running[sequence.id], time.perf_counter()
        state.first = state.first or now
        if self.stats.start_to_first_token is None:
            self.stats.start_to_first_token = process_age()
        request = state.request
        if token.id == NOT_FINITE:
            self._end(sequence)
            error = NOT_FINITE_ERROR.format(step=len(sequence.generated))
            return Delta(request.id, None, "", Result.failed(request.id, error))
        constraint = state.constraint
        if constraint:
            constraint.accept(token.id)
            if constraint.error:
                self._end(sequence)
                return Delta(request.id, None, "", Result.failed(request.id, constraint.error + "."))
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = {
                "id": token.id,
                "logprob": token.logprob,
                "top_ids": list(token.top_ids),
                "top_logprobs": list(token.top_logprobs),
            }
            state.logprobs.append(logprobs)
        ended = token.id in self.processor.eos and (constraint is not None or not request.ignore_eos)
        text = "" if ended else state.text.add(token.id)
        ended = ended or (constraint is not None and constraint.complete)
        if not (ended or state.text.stopped or len(sequence.generated) >= request.max_new):
            return Delta(request.id, token.id, text, None, logprobs)
        reason = "stop" if ended or state.text.stopped else "length"
        text += state.text.flush()
        self._end(sequence)
        return Delta(request.id, token.id, text, self._result(state, reason, now), logprobs)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._running[sequence.id]

    def _result(self, state: _Running, reason: str, now: float) -> Result:
        request, ids = state.request, list(state.sequence.generated)
        after = len(ids) - 1
        return Result(
            id=request.id,
            token_ids=ids,
            text=state.text.text,
            finish_reason=reason,
            prompt_tokens=len(request.ids),
            image_tokens=sum(image.count for image in request.images) * self._tokens_per_tile,
            cached_tokens=state.sequence.cached or 0,
            time_to_first_token_ms=round((state.first - state.submitted) * 1e3, 3),
            time_per_output_token_ms=round((now - state.first) * 1e3 / after, 3) if after else None,
            logprobs=state.logprobs if request.sampling.logprobs is not None else None,
        )

    def _image_tokens(self, step: Step) -> int:
        """Image tokens that the rows of a decode step attend to, summed over rows."""
        if not isinstance(step, DecodeStep):
            return 0
        return sum(self._seen_tokens(self._running[row.sequence].sequence) for row in step.rows)

    def _seen_tokens(self, sequence: Sequence) -> int:
        first, last = sequence.visible(sequence.length)
        return sum(image.count for image in sequence.images[first:last]) * self._tokens_per_tile
