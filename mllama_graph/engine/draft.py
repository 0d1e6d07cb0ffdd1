"""Proposals from a smaller model with the same tokenizer, which runs on rank 0 alone with its own pages and graphs.

The other ranks only receive the proposed ids with each step. The draft samples with the noise of the request's seed and
the token's position, so that it proposes what the model would sample if both had the same distribution.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from mllama_graph.engine.executor import Executor
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import NOT_FINITE
from mllama_graph.inputs.images import TiledImage
from mllama_graph.plan.blocks import OutOfPages


class Draft:
    """A `Proposer` that continues a sequence with another model when `propose` asks for it.

    It first computes the tokens of the sequence that it has not seen, prompt and images included, and then samples one
    token after the other. Ids for which it has no embedding are left out, and the ids after them move up to their
    positions. A text-only draft does not see pictures, and usually has no embedding for the id that stands for one.
    """

    def __init__(self, executor: Executor, say: Callable[[str], None]):
        """`say`: tells the user, once, that a logit was not finite."""
        self.executor = executor
        self._say, self._told = say, False
        self._scheduler = Scheduler(executor.plan, executor.run.limits.batch, prefix_cache=False)
        # Nobody waits for one of its sequences alone.
        self._scheduler.pace = None
        # The draft's own sequences, by id. The scheduler's `running` has only those that are being continued.
        self._own: dict[int, Sequence] = {}
        self._rows = executor.run.shape.embeddings

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[int, tuple[int, ...]]:
        """As many ids as are wanted, by the sequence's id; fewer if a logit is not finite or pages are missing, and
        none for a sequence that is longer than the draft's positions.
        """
        given: dict[int, list[int]] = {}
        goals: dict[int, int] = {}
        for target, count in wanted.items():
            if target.length + count > self.executor.plan.max_length:
                continue
            own = self._own.get(target.id)
            if own is None:
                own = self._own[target.id] = self._counterpart(target)
                self._scheduler.add(own)
            else:
                self._scheduler.running.append(own)
            given[target.id] = self._held(target.generated)
            _follow(own, given[target.id])
            goals[target.id] = len(own.generated) + count
            self._take_pages(own)
        left = set(goals)
        while left and (step := self._scheduler.next()):
            tokens = self.executor.execute(step)
            for own, id in self._scheduler.commit(tuple(token.id for token in tokens)):
                if id == NOT_FINITE:
                    own.generated.pop()
                    self._tell()
                if id == NOT_FINITE or len(own.generated) >= goals[own.id]:
                    self._scheduler.running.remove(own)
                    left.discard(own.id)
        found = {id: tuple(self._own[id].generated[len(ids) :]) for id, ids in given.items()}
        # Where pages ran out, some may be left. Those that wait have no pages: they begin anew when they are wanted.
        self._scheduler.running.clear()
        for own in list(self._scheduler.waiting):
            self.forget(own.id)
        return found

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._say(
                "Logits of the draft are not finite, so that it proposes less or nothing. Results do not depend on it. "
                "Use another draft, or speculate=none."
            )

    def _held(self, ids: Iterable[int]) -> list[int]:
        """The given ids for which the draft has an embedding."""
        return [id for id in ids if id < self._rows]

    def _counterpart(self, target: Sequence) -> Sequence:
        """The draft's own sequence with the prompt, images and options of the model's sequence `target`."""
        skipped = [at for at, id in enumerate(target.ids(0, target.length)) if id >= self._rows]
        prompt = tuple(self._held(target.prompt))
        images: tuple[TiledImage, ...] = ()
        positions: tuple[int, ...] = ()
        if self.executor.run.shape.sees:
            images, positions = target.images, tuple(at - bisect_left(skipped, at) for at in target.image_positions)
        most = min(target.max_new, self.executor.plan.max_length - len(prompt))
        sampling = replace(target.sampling, logprobs=None)
        return Sequence(target.id, prompt, images, positions, most, sampling, skipped=len(skipped))

    def _take_pages(self, own: Sequence) -> None:
        """Allocate pages for the tokens that a running sequence got since it was last continued, or preempt it."""
        missing = self._scheduler.holdings.missing(own)
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


def _follow(own: Sequence, given: list[int]) -> None:
    """Replace the generated ids of the draft's sequence. K/V are computed again from the first id that differs."""
    pairs = enumerate(zip(own.generated, given))
    equal = next((n for n, (mine, other) in pairs if mine != other), min(len(own.generated), len(given)))
    own.computed = min(own.computed, len(own.prompt) + equal)
    own.generated = list(given)
