"""The engine: connects the scheduler, the ranks and text processing, and returns tokens step by step."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from mllama_graph.core.machine import process_age
from mllama_graph.core.report import Progress
from mllama_graph.engine.constrained import Constraint, masked
from mllama_graph.engine.edits import told
from mllama_graph.engine.executor import Executor
from mllama_graph.engine.results import Delta, Result
from mllama_graph.engine.running import Flight, Running, entry
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.speculation import Speculation
from mllama_graph.engine.stats import HostSeconds, Stats, Totals
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, History, Step, Token, agreed
from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.request import Request
from mllama_graph.model.formats import described

# The error of a request whose logits are NaN or infinite at its new token number `step`, counted from 1.
NOT_FINITE_ERROR = (
    "logits are not finite at step {step}: the checkpoint holds weights that are not finite, or a value left the range "
    "of its dtype. Check the checkpoint, or use dtype=fp32."
)


class Engine:
    """Serves many requests with one model: `submit` requests, `step` until `idle`, then `close`."""

    def __init__(
        self, processor: Processor, scheduler: Scheduler, executor: Executor, speculation: Speculation | None = None
    ):
        self.processor, self.scheduler, self.executor, self.speculation = processor, scheduler, executor, speculation
        if speculation:
            scheduler.propose = self._propose
        self.stats = Stats()
        self._running: dict[int, Running] = {}
        self._unread: dict[int, list[Delta]] = {}
        self._next = 0
        # The step that was launched and not finished, and when the last one ended.
        self._flight: Flight | None = None
        self._ended = 0.0
        self._tokens_per_tile = scheduler.plan.tokens_per_tile

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running, nor a step."""
        return self.scheduler.idle and self._flight is None

    @property
    def load(self) -> int:
        """The number of unfinished requests."""
        return len(self._running)

    def submit(self, request: Request) -> int:
        """Queue a request and return its number, which `abort` takes.

        Raises UserError for a request that the plan can never hold.
        """
        unscored = len(request.ids) - 1 if request.sampling.prompt_logprobs is not None else 0
        # Where shapes are compiled, graphs give logits after the last id of a prompt alone: the others are decoded.
        scored = 0 if self.scheduler.plan.lengths_are_free else unscored
        sequence = Sequence(
            self._next,
            request.ids[: len(request.ids) - scored],
            request.images,
            request.positions,
            request.max_new + scored,
            request.sampling,
            request.priority,
            unscored=unscored - scored,
        )
        self.scheduler.add(sequence)
        self._next += 1
        constraint = Constraint(request.grammar, request.max_new) if request.grammar else None
        self._running[sequence.id] = Running(
            request,
            sequence,
            self.processor.detokenizer(request.stop),
            time.perf_counter(),
            constraint,
            count=-scored,
            scored=scored,
            given=request.ids[len(request.ids) - scored :] + request.forced,
        )
        return sequence.id

    def abort(self, number: int) -> None:
        """Drop a request and free its pages, those of a step in progress when that is finished."""
        self.scheduler.abort(number)
        self._forget(number)
        self._unread.pop(number, None)

    def step(self) -> list[Delta]:
        """Run one step and return a delta for each token of a request, those of a request in their order."""
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
        if self._flight is None:
            self._flight = self._begin(self.scheduler.next)
            if self._flight and self._flight.feeds:
                self.scheduler.assume()
        if (flight := self._flight) is None:
            return []
        # While the device computes this step, the next one is prepared and launched.
        self._flight = self._begin(self.scheduler.ahead) if flight.feeds else None
        tokens = self.executor.finish(flight.launched) if flight.launched else flight.tokens
        now = time.perf_counter()
        # Where steps overlap, the device begins a step when it has finished the one before.
        step, seconds, self._ended = flight.step, now - max(flight.start, self._ended), now
        if self.scheduler.pace:
            self.scheduler.pace.took(step, seconds)
        if self.speculation:
            self.speculation.took(step, seconds)
        found = agreed(step, tokens)
        self._learn(step, found.counts)
        self.stats.count(
            step, seconds, len(found.new), self._image_tokens(step), self.executor.run.shape, self.executor.run.storage
        )
        moved = self.scheduler.commit(tuple(token.id for token in found.new), found.counts)
        deltas = [(number, delta) for number, own in found.scored for delta in self._take_scores(number, own)]
        before = None
        for (sequence, _), token in zip(moved, found.new, strict=True):
            # What follows the end of a request is dropped.
            if state := self._running.get(sequence.id):
                if before is sequence:
                    state.take_proposal()
                if delta := self._advance(sequence, token):
                    deltas.append((sequence.id, delta))
            before = sequence
        if self._flight:
            self.scheduler.assume()
        self.executor.rank.host.text += time.perf_counter() - now
        return deltas

    def _begin(self, decide: Callable[[], Step | None]) -> Flight | None:
        """Decide a step and launch it; its tokens are taken at once where it is the only one and feeds none."""
        begin = time.perf_counter()
        step = decide()
        if step is None:
            return None
        start = time.perf_counter()
        step = told(masked(step, self._constraints), self._history, self._given)
        # A profile tells the operations of steps apart by time.
        overlap = self.executor.run.overlap and not self.executor.rank.profiler
        feeds = overlap and all(self._running[row.sequence].feeds for row, n in zip(step.rows, step.outputs) if n)
        self.executor.rank.host.schedule += time.perf_counter() - begin
        if feeds or self._flight:
            return Flight(step, start, feeds, launched=self.executor.launch(step, feeds))
        return Flight(step, start, feeds, tokens=self.executor.execute(step))

    def _propose(self, sequences: list[Sequence]) -> Mapping[int, tuple[int, ...]]:
        """Ids that may follow those of running sequences."""
        assert self.speculation
        start = time.perf_counter()
        rooms: dict[Sequence, int] = {}
        for sequence in sequences:
            state = self._running[sequence.id]
            state.ahead = []
            alone = state.alone or self._given(sequence.id) is not None
            rooms[sequence] = 0 if alone else state.request.max_new - state.count - 1
        proposals = self.speculation.propose(rooms)
        for number, ids in proposals.items():
            state = self._running[number]
            if state.constraint:
                state.ahead = state.constraint.after(ids)
                proposals[number] = ids[: len(state.ahead)]
        self.stats.decode_seconds += time.perf_counter() - start
        return proposals

    def _learn(self, step: Step, counts: tuple[int, ...]) -> None:
        """Take note of how many tokens each row of a step with proposals got."""
        for row, count in zip(step.rows, counts):
            if proposed := len(row.ids) - 1:
                state = self._running[row.sequence]
                state.alone, state.proposed = not count, state.proposed + proposed
                if count and self.speculation:
                    self.speculation.learn(row.sequence, proposed, count - 1)

    def _constraints(self, number: int) -> list[Constraint]:
        """What constrains the next id of a sequence and those after its proposals, unless that id is given."""
        state = self._running[number]
        if state.constraint is None or self._given(number) is not None:
            return []
        return [state.constraint, *state.ahead]

    def _history(self, number: int) -> History | None:
        """What ranks must know of a sequence to sample for it; None where logits are enough."""
        state = self._running[number]
        request = state.request
        if request.sampling.prompt_logprobs is None and not request.sampling.edits:
            return None
        ends = () if request.ignore_eos and not request.grammar else tuple(sorted(self.processor.eos))
        return History(state.sequence.ids(0, state.sequence.length), len(request.ids), ends)

    def _given(self, number: int) -> int | None:
        """The id that a sequence gets next, if it is given."""
        state = self._running[number]
        at = len(state.sequence.generated)
        return state.given[at] if at < len(state.given) else None

    def run(self, on_delta: Callable[[Delta], None]) -> None:
        """Step until no request is left."""
        while not self.idle:
            for delta in self.step():
                on_delta(delta)

    def reset_stats(self) -> None:
        """Forget the steps so far, such as those of a warm-up."""
        self.stats, self.scheduler.preemptions = Stats(), 0
        self.executor.rank.host = HostSeconds()

    def metrics(self, finished: Totals) -> dict[str, Any]:
        """The run's metrics for result.json."""
        run = self.executor.run
        stored = {"quant": described(run.storage.formats), "kv": run.precision.kv}
        host = {"host_us_per_step": self.executor.rank.host.per_step(self.stats.steps)}
        return self.stats.metrics(finished, self.scheduler.preemptions) | host | stored

    def graph_records(self) -> list[dict[str, Any]]:
        """The record of each graph, for result.json."""
        return [asdict(record) for record in self.executor.graphs.records]

    def close(self, progress: Progress | None = None) -> None:
        """End the worker ranks. With `progress`, first finish and store graphs still compiling; Ctrl-C stops that."""
        self.executor.close()
        if self.speculation:
            self.speculation.proposer.close()
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

    def _advance(self, sequence: Sequence, token: Token) -> Delta | None:
        """The delta of a token; None for a token of the prompt, which only has log-probabilities."""
        state, now = self._running[sequence.id], time.perf_counter()
        state.count += 1
        if state.count <= 0 and token.id != NOT_FINITE:
            state.prompt_logprobs.append(entry(token))
            return None
        state.first = state.first or now
        if self.stats.start_to_first_token is None:
            self.stats.start_to_first_token = process_age()
        request = state.request
        if token.id == NOT_FINITE:
            return self._failed(state, NOT_FINITE_ERROR.format(step=max(1, state.count)))
        constraint = state.constraint
        if constraint:
            constraint.accept(token.id)
            if constraint.error:
                return self._failed(state, constraint.error + ".")
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = entry(token)
            state.logprobs.append(logprobs)
        ended = token.id in self.processor.eos and (constraint is not None or not request.ignore_eos)
        text = "" if ended else state.text.add(token.id, state.count > request.sampling.min_tokens)
        ended = ended or (constraint is not None and constraint.complete)
        prompt = state.told_prompt() if state.count == 1 else None
        if not (ended or state.text.stopped or state.count >= request.max_new):
            return Delta(request.id, token.id, text, None, logprobs, prompt)
        reason = "stop" if ended or state.text.stopped else "length"
        text += state.text.flush()
        self._end(sequence)
        return Delta(request.id, token.id, text, self._result(state, reason, now), logprobs, prompt)

    def _take_scores(self, number: int, tokens: list[Token]) -> list[Delta]:
        """Keep log-probabilities of a prompt's tokens. Returns the error of a request whose logits are not finite."""
        state = self._running.get(number)
        if state is None:
            return []
        state.prompt_logprobs += map(entry, tokens)
        if all(token.id != NOT_FINITE for token in tokens):
            return []
        return [self._failed(state, NOT_FINITE_ERROR.format(step=1))]

    def _failed(self, state: Running, error: str) -> Delta:
        """End a request with an error, and return it."""
        self._end(state.sequence)
        return Delta(state.request.id, None, "", Result.failed(state.request.id, error))

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self._forget(sequence.id)

    def _forget(self, number: int) -> None:
        self._running.pop(number, None)
        if self.speculation:
            self.speculation.forget(number)

    def _result(self, state: Running, reason: str, now: float) -> Result:
        request = state.request
        # What follows the end in a step is no part of the answer.
        ids = state.sequence.generated[state.scored : state.scored + state.count]
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
            proposed_tokens=state.proposed if self.speculation else None,
            accepted_tokens=state.accepted if self.speculation else None,
            prompt_logprobs=state.told_prompt(),
        )

    def _image_tokens(self, step: Step) -> int:
        """Image tokens that the rows of a decode step attend to, summed over rows."""
        if not isinstance(step, DecodeStep):
            return 0
        states = (self._running.get(row.sequence) for row in step.rows)
        return sum(self._seen_tokens(state.sequence) for state in states if state)

    def _seen_tokens(self, sequence: Sequence) -> int:
        first, last = sequence.visible(sequence.length)
        return sum(image.count for image in sequence.images[first:last]) * self._tokens_per_tile
