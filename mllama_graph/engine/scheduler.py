"""Decides the next step from the requests and the ids sampled so far. Uses no tensors.

A step encodes one image, prefills prompts or chunks of them, decodes one token for every running sequence, or does both
of the latter.
"""

from bisect import insort
from collections.abc import Iterator

from mllama_graph.engine.holdings import Holdings
from mllama_graph.engine.pace import Pace
from mllama_graph.engine.sequence import Sequence, row_of
from mllama_graph.engine.speculation import Propose, no_proposals
from mllama_graph.engine.steps import NOT_FINITE, PENDING, DecodeStep, PrefillStep, Step, VisionStep, sampled
from mllama_graph.inputs.images import TiledImage
from mllama_graph.plan.blocks import OutOfPages, pages_for
from mllama_graph.plan.buckets import Plan


class Scheduler:
    """Continuous batching: sequences join and leave between steps.

    Waiting sequences are admitted by priority, then in order of arrival, while rows, pages and image pages suffice.
    Prompts that fit a prefill bucket together are computed in one step. Longer ones are computed in chunks and take
    turns with the others, so that a short prompt waits for one chunk of each longer one at most.

    While sequences decode, a step has at most `plan.step_tokens` tokens, or as many as `pace` allows. Prompts are
    computed beside the decoding sequences in one step, so that these get a token in each step but those that encode an
    image; where `pace` says so, steps that only decode come between. Where shapes are compiled, a step that also
    computes prompts has no proposals; if the plan has no mixed buckets, prefill and decode steps alternate.

    `prefix_cache`: full pages are kept when their sequence ends, and a sequence that begins with the same ids and
    images starts after them. It waits for a running prompt that is computing many of its pages.

    `propose` gives ids that may follow decoding sequences, by the sequence's id: at most as many as the
    plan and the sequence have room for.

    When pages run out, the youngest running sequence of the lowest priority is preempted: it returns to the head of the
    queue, keeps its ids, and is computed again later.

    A step may be decided while the one before runs. Call `assume`, which gives each sampled row of the running step a
    token with the id PENDING; take the next step from `ahead`; then `commit` the running one. A sequence that ends or
    is aborted meanwhile keeps its pages until the last step with one of its rows is committed: that step still writes
    to them, and clears them if the row fails.
    """

    def __init__(self, plan: Plan, batch: int, prefix_cache: bool = True, propose: Propose = no_proposals):
        self.plan, self.batch, self.prefix_cache, self.propose = plan, batch, prefix_cache, propose
        self.holdings = Holdings(plan, prefix_cache)
        self.pool, self.images = self.holdings.pool, self.holdings.images
        self.pace = Pace(max(1, plan.step_tokens - batch), plan.prefill_tokens[-1]) if plan.paced else None
        # In order of their turns.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        # The step that was decided last, until it is assumed; and the step that is assumed, until it is committed.
        self._pending: tuple[Step, list[Sequence]] | None = None
        self._assumed: tuple[Step, list[Sequence]] | None = None
        self._prefills = 0
        # Whether decoding sequences got no token in the last step.
        self._owed = False
        # Whether the last step that did not only decode encoded an image, or computed prompts.
        self._encoded = self._prefilled = False
        # Ended sequences that the ranks have not been told of yet, and those that ended before their last step was
        # committed.
        self._ended: list[int] = []
        self._leaving: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises UserError as `Plan.check` does."""
        self.plan.check(len(sequence.prompt), sequence.max_new, len(sequence.images))
        sequence.served = self._prefills
        insort(self.waiting, sequence, key=lambda one: one.turn)

    def abort(self, id: int) -> None:
        """Drop a sequence, waiting or running; unknown ids are ignored."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.id == id:
                self.finish(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def next(self) -> Step | None:
        """The next step, or None if no sequence is left. Each step must be followed by `commit`."""
        assert self._pending is None and self._assumed is None, "the last step was not committed"
        return self._next()

    def ahead(self) -> Step | None:
        """The step after the assumed one. None if the assumed one must be committed first: no sequence is certain to go
        on, or one would be preempted.
        """
        assert self._assumed is not None and self._pending is None, "a step is decided one ahead"
        going_on = [one for one in self.running if one.decoding and not one.complete]
        if sum(max(0, self.holdings.missing(one)) for one in going_on) > self.pool.free:
            return None
        return self._next()

    def _next(self) -> Step | None:
        decoding = self._decoding()
        room = self._room_beside(decoding)
        if decoding and room and self._keeps_pace(len(decoding)):
            return self._decode(decoding)
        step = self._decode(decoding) if decoding and self._owed and not room else None
        return step or self._admit(decoding, room) or self._decode(decoding)

    def assume(self) -> None:
        """Go on as if the last step had been committed. Each row that gets a token gets the id PENDING for now."""
        assert self._pending is not None and self._assumed is None
        step, sequences = self._assumed = self._pending
        self._pending = None
        if isinstance(step, VisionStep):
            self.images.trim(step.image.key)
            return
        for sequence, row in zip(sequences, step.rows, strict=True):
            # Sequences in `_leaving` have ended since the step was decided.
            if sequence not in self._leaving:
                sequence.computed += len(row.ids)
                sequence.unscored -= row.scored
        if isinstance(step, PrefillStep):
            self._prefills += 1
            for sequence in sequences[step.decoding :]:
                sequence.served = self._prefills
        # On a CPU, the K/V bits that prompt rows write depend on nothing but the tokens, and those of decoding rows
        # differ. Pages written by decoding rows are not kept there, so that the cache changes no bit of a result.
        for place, sequence in enumerate(sequences[: sampled(step)]):
            if sequence not in self._leaving:
                sequence.generated.append(PENDING)
                sequence.keeps = self.prefix_cache and (place >= step.decoding or not self.plan.lengths_are_free)

    def commit(self, ids: tuple[int, ...], counts: tuple[int, ...] = ()) -> list[tuple[Sequence, int]]:
        """Append the ids that the first uncommitted step sampled. Returns (sequence, id) for each of them.

        `counts`: the number of ids of each decoding row, as `agreeing` counts them; if empty, each row got one. A row
        with none is computed again from its beginning. Ids of sequences that have ended already are not appended. The
        caller ends sequences with `finish`.
        """
        if self._assumed is None:
            self.assume()
        assert self._assumed is not None
        (step, sequences), self._assumed = self._assumed, None
        moved: list[tuple[Sequence, int]] = []
        taken = iter(ids)
        got = counts + (1,) * (sampled(step) - len(counts))
        for place, (sequence, row, count) in enumerate(zip(sequences, step.rows, got)):
            own = [next(taken) for _ in range(count)]
            moved += [(sequence, token) for token in own]
            if sequence in self._leaving:
                continue
            sequence.generated.pop()
            keeps, sequence.keeps = sequence.keeps, False
            if not count:
                self.preempt(sequence)
                continue
            if place < step.decoding:
                # K/V that were written for rejected proposals are written again.
                sequence.computed += count - len(row.ids)
            sequence.generated += own
            # Finite logits mean finite K/V: a token attends to all before it.
            if keeps and own[-1] != NOT_FINITE:
                self.holdings.keep(sequence)
        if self._leaving:
            self._leaving = [sequence for sequence in self._leaving if not self._let_go(sequence)]
        return moved

    def finish(self, sequence: Sequence) -> None:
        """End a sequence: release its images, and its pages if no step that was not committed has a row of it."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._ended.append(sequence.id)
        self.holdings.release_images(sequence)
        if not self._let_go(sequence):
            self._leaving.append(sequence)

    def _let_go(self, sequence: Sequence) -> bool:
        """Release the pages of a sequence, unless an uncommitted step has a row of it. Returns whether it did."""
        if any(issued and sequence in issued[1] for issued in (self._pending, self._assumed)):
            return False
        self.holdings.release(sequence)
        return True

    def _room_beside(self, decoding: list[Sequence]) -> int:
        """The prompt tokens that fit a step with the decoding sequences; 0 if these need a step of their own."""
        rows = len(decoding)
        if (most := self.plan.room_beside(rows)) <= 0:
            return 0
        return max(1, min(self.pace.room if self.pace else self.plan.step_tokens - rows, most))

    def _keeps_pace(self, decoding: int) -> bool:
        """Whether prompts wait, so that steps of the decoding sequences are not late."""
        prompts = self.waiting or len(self.running) > decoding
        return bool(self.pace and prompts and not self.pace.admits(decoding))

    def _admit(self, decoding: list[Sequence], room: int) -> Step | None:
        """The next vision or prefill step. `room`: see `_room_beside`; above 0, the step decodes as well.

        A step that decodes as well takes parts of prompts, up to `room`; another one takes whole prompts as far as they
        fit a bucket, or one chunk. Where prompts wait for images, vision steps alternate with the others.
        """
        beside = decoding if room else []
        most = room if beside else self.plan.chunk(self.plan.step_tokens if decoding else self.plan.max_length)
        parts: list[tuple[Sequence, int]] = []
        unencoded: tuple[Sequence, TiledImage] | None = None
        tokens, longest, outputs = 0, 0, self.plan.outputs
        for sequence in self._to_prefill():
            image = next((image for image in sequence.images if not self.images[image.key].encoded), None)
            if image:
                unencoded = unencoded or (sequence, image)
                if not self._encoded and (not parts or self._prefilled):
                    parts = []
                    break
                continue
            longest = max(longest, sequence.length)
            count = min(sequence.left, most - tokens) if beside or not parts else sequence.left
            count = min(count, sequence.scorable(outputs))
            if parts and (
                tokens + count > most or not self.plan.packs(len(parts) + 1, tokens + count, longest, len(beside))
            ):
                break
            parts.append((sequence, count))
            tokens += count
            outputs -= count if sequence.unscored else 1
            if outputs <= 0 or tokens >= most or not self.plan.packs(len(parts) + 1, tokens + 1, longest, len(beside)):
                break
        if parts:
            return self._prefill(beside, parts, owed=bool(decoding) and not beside)
        if unencoded and not (decoding and self._owed):
            sequence, image = unencoded
            self._encoded, self._prefilled, self._owed = True, False, bool(decoding)
            return self._issue(VisionStep(image, tuple(self.images[image.key].pages)), [sequence])
        return None

    def _prefill(self, beside: list[Sequence], parts: list[tuple[Sequence, int]], owed: bool) -> Step:
        """A prefill step of the next tokens of some prompts, beside sequences that decode."""
        self._encoded, self._prefilled, self._owed = False, True, owed
        # Stable: prompts that the step ends are first.
        parts = sorted(parts, key=lambda part: part[1] < part[0].left)
        ended = sum(count == sequence.left for sequence, count in parts)
        rows = [
            row_of(sequence, 1, proposal, self.images, self.plan)
            for sequence, proposal in self._proposals(beside, parts)
        ]
        rows += [row_of(sequence, count, (), self.images, self.plan) for sequence, count in parts]
        step = PrefillStep(tuple(rows), len(beside) + ended, len(beside), self._take_ended())
        return self._issue(step, [*beside, *(sequence for sequence, _ in parts)])

    def _proposals(
        self, decoding: list[Sequence], parts: list[tuple[Sequence, int]]
    ) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Each decoding sequence with its proposal, cut to what fits a step beside `parts` of prompts."""
        left = self.plan.proposals_beside(len(decoding) + sum(count for _, count in parts)) if parts else None
        proposals = self.propose(decoding) if decoding and left != 0 else {}
        found = []
        for sequence in decoding:
            proposal = self._with_room(sequence, proposals.get(sequence.id, ())[:left])
            left = None if left is None else left - len(proposal)
            found.append((sequence, proposal))
        return found

    def _to_prefill(self) -> Iterator[Sequence]:
        """Running and waiting sequences whose prompts are not computed, in order of their turns. Waiting ones are
        admitted when they are taken, until one of them does not fit.
        """
        prompts = sorted((sequence for sequence in self.running if not sequence.decoding), key=lambda one: one.turn)
        fits = True
        while prompts or fits and self.waiting:
            if fits and self.waiting and not (prompts and prompts[0].turn < self.waiting[0].turn):
                fits = len(self.running) < self.batch and self.holdings.take(self.waiting[0], self.running)
                if fits:
                    self.running.append(self.waiting.pop(0))
                    yield self.running[-1]
            elif prompts:
                yield prompts.pop(0)

    def _decoding(self) -> list[Sequence]:
        """The decoding sequences, with a page for their next token. Preempts sequences where pages run out.

        A sequence that will have all its tokens when the assumed step is committed is left out.
        """
        decoding = [s for s in self.running if s.decoding and not (self._assumed and s.complete)]
        before = self.preemptions
        for sequence in decoding:
            while self.holdings.missing(sequence) > 0 and sequence in self.running:
                try:
                    sequence.pages += self.pool.allocate(1)
                except OutOfPages:
                    self.preempt(max(self.running, key=lambda one: (-one.priority, one.id)))
        return decoding if self.preemptions == before else [s for s in decoding if s in self.running]

    def _decode(self, sequences: list[Sequence]) -> Step | None:
        """A decode step."""
        if not sequences:
            return None
        self._owed = False
        rows = tuple(
            row_of(sequence, 1, proposal, self.images, self.plan)
            for sequence, proposal in self._proposals(sequences, [])
        )
        return self._issue(DecodeStep(rows, self._take_ended()), sequences)

    def _with_room(self, sequence: Sequence, proposal: tuple[int, ...]) -> tuple[int, ...]:
        """As much of a proposal as the sequence has pages for, or gets without taking them from others."""
        size = self.plan.page_size
        missing = pages_for(sequence.length + len(proposal), size) - len(sequence.pages)
        if missing > 0 and missing <= self.pool.free:
            sequence.pages += self.pool.allocate(missing)
        return proposal[: len(sequence.pages) * size - sequence.length]

    def preempt(self, sequence: Sequence) -> None:
        """Put a sequence back at the head of the queue, behind higher priorities."""
        self.preemptions += 1
        self.running.remove(sequence)
        self.holdings.release(sequence)
        # Images may be needed by a sequence of a higher priority, which is admitted before this one.
        self.holdings.release_images(sequence)
        sequence.served = 0
        insort(self.waiting, sequence, key=lambda one: one.turn)

    def _issue(self, step: Step, sequences: list[Sequence]) -> Step:
        self._pending = (step, sequences)
        return step

    def _take_ended(self) -> tuple[int, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended
