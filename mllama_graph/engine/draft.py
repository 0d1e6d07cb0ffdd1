"""Proposals from a smaller model with the same tokenizer, which runs on rank 0 alone with pages and graphs of its own.

The other ranks get proposed ids with each step and need no part of the draft. It draws with the noise of the request's
own seed and positions, so that it proposes what the model would sample if both had the same distribution.
"""

from collections.abc import Mapping
from dataclasses import replace

from mllama_graph.engine.executor import Executor
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import NOT_FINITE
from mllama_graph.plan.blocks import OutOfPages, pages_for


class Draft:
    """A `Proposer` that continues each sequence with another model, once it is asked for.

    It computes what it has not seen of a sequence, its prompt and images at first, and then one token after the other.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self._scheduler = Scheduler(executor.plan, executor.run.limits.batch, prefix_cache=False)
        # The draft's own sequences. Only those that are being continued are in the scheduler's list of running ones.
        self._own: dict[int, Sequence] = {}

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[int, tuple[int, ...]]:
        """As many ids as are wanted for each sequence, by its id; fewer where a logit is not finite."""
        goals: dict[int, int] = {}
        for target, count in wanted.items():
            own = self._own.get(target.id)
            if own is None:
                own = self._own[target.id] = _counterpart(target)
                self._scheduler.add(own)
            elif own not in self._scheduler.waiting:
                self._scheduler.running.append(own)
            _follow(own, target)
            goals[target.id] = len(target.generated) + count
            self._take_pages(own)
        left = set(goals)
        while left and (step := self._scheduler.next()):
            tokens = self.executor.execute(step)
            for own, id in self._scheduler.commit(tuple(token.id for token in tokens)):
                if id == NOT_FINITE:
                    own.generated.pop()
                if id == NOT_FINITE or len(own.generated) >= goals[own.id]:
                    self._scheduler.running.remove(own)
                    left.discard(own.id)
        # Of those that got no pages.
        self._scheduler.running.clear()
        return {target.id: tuple(self._own[target.id].generated[len(target.generated) :]) for target in wanted}

    def _take_pages(self, own: Sequence) -> None:
        """Have pages for what a running sequence has got since it was continued last, or put it in the queue."""
        missing = pages_for(own.length, self.executor.plan.page_size) - len(own.pages)
        if own in self._scheduler.running and missing > 0:
            try:
                own.pages += self._scheduler.pool.allocate(missing)
            except OutOfPages:
                self._scheduler.preempt(own)

    def forget(self, id: int) -> None:
        """Forget a sequence that has ended, and free its pages."""
        if own := self._own.pop(id, None):
            self._scheduler.finish(own)

    def close(self) -> None:
        """End the draft's compiler processes."""
        self.executor.close()
        self.executor.graphs.compiler.close()


def _counterpart(target: Sequence) -> Sequence:
    """A sequence of the draft with the prompt, images and options of another model's."""
    sampling = replace(target.sampling, logprobs=None)
    return Sequence(target.id, target.prompt, target.images, target.image_positions, target.max_new, sampling)


def _follow(own: Sequence, target: Sequence) -> None:
    """Give the draft's sequence the ids of the other one. What it computed for others is computed again."""
    pairs = enumerate(zip(own.generated, target.generated))
    equal = next((n for n, (mine, given) in pairs if mine != given), min(len(own.generated), len(target.generated)))
    own.computed = min(own.computed, len(own.prompt) + equal)
    own.generated = list(target.generated)
