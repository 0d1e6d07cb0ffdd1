"""Decides the next step from the requests and the ids sampled so far. Uses no tensors.

A step encodes one image, prefills prompts or chunks of them, decodes one token for every running sequence, or does both
of the latter.
"""

from bisect import insort
from collections.abc import Iterator

from mllama_graph.engine.pace import Pace
from mllama_graph.engine.sequence import Sequence, equal_pages, row_of
from mllama_graph.engine.speculation import Propose, no_proposals
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, PrefillStep, Step, VisionStep
from mllama_graph.inputs.images import TiledImage
from mllama_graph.plan.blocks import BlockPool, ImageCache, OutOfPages, SharedPages, pages_for
from mllama_graph.plan.buckets import Plan


class Scheduler:
    """Continuous batching: sequences join and leave between steps.

    Waiting sequences are admitted by priority, then in order of arrival, while rows, pages and image pages suffice.
    Prompts that fit a prefill bucket together are computed in one step. Longer ones are computed in chunks and take
    turns with the others, so that a short prompt waits for one chunk of each longer one at most.

    While sequences decode, a step has at most `plan.step_tokens` tokens, or as many as `pace` allows. Prompts are
    computed beside the decoding sequences in one step, so that these get a token in each step but those that encode an
    image; where `pace` says so, steps that only decode come between. Where shapes are compiled, such steps have no
    proposals, and the two alternate if the plan has no mixed buckets.

    `prefix_cache`: full pages are kept when their sequence ends, and a sequence that begins with the same ids and
    images starts after them. It waits for a running prompt that is computing many of its pages.

    `propose` gives ids that may follow the sequences of a decode step, by the sequence's id: at most as many as the
    plan and the sequence have room for.

    When pages run out, the youngest running sequence of the lowest priority is preempted: it returns to the head of the
    queue, keeps its ids, and is computed again later.
    """

    def __init__(self, plan: Plan, batch: int, prefix_cache: bool = True, propose: Propose = no_proposals):
        self.plan, self.batch, self.prefix_cache, self.propose = plan, batch, prefix_cache, propose
        self.pool = SharedPages(BlockPool(plan.num_pages, reserved=plan.scratch_pages), plan.counts_every_reader)
        self.images = ImageCache(BlockPool(plan.num_image_pages), plan.page_size, plan.pages_per_image)
        self.pace = Pace(max(1, plan.step_tokens - batch), plan.prefill_tokens[-1]) if plan.paced else None
        # In order of their turns.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._pending: tuple[Step, list[Sequence]] | None = None
        self._prefills = 0
        # Whether decoding sequences got no token in the last step, and what the last step did that did not only decode.
        self._owed = False
        self._encoded = self._prefilled = False
        # Sequences that ended, which the ranks have not been told yet.
        self._ended: list[int] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises UserError as `Plan.check` does."""
        self.plan.check(len(sequence.prompt), sequence.max_new, len(sequence.images))
        sequence.served = self._prefills
        insort(self.waiting, sequence, key=lambda one: one.turn)

    def abort(self, id: int) -> None:
        """Drop a sequence, waiting or running; unknown ids are ignored."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.id == id:
                self._leave(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def next(self) -> Step | None:
        """The next step, or None if no sequence is left. Each step must be followed by `commit`."""
        assert self._pending is None, "the last step was not committed"
        decoding = self._decoding()
        room = self._room_beside(decoding)
        if decoding and room and self._keeps_pace(len(decoding)):
            return self._decode(decoding)
        step = self._decode(decoding) if decoding and self._owed and not room else None
        return step or self._admit(decoding, room) or self._decode(decoding)

    def commit(self, ids: tuple[int, ...], counts: tuple[int, ...] = ()) -> list[tuple[Sequence, int]]:
        """Append the ids that a step sampled. Returns (sequence, id) for each of them.

        `counts`: how many each decoding row got, one if it is empty: those that `agreeing` counts. A row with none is
        computed again from its beginning. The caller ends sequences with `finish`.
        """
        assert self._pending is not None
        step, sequences = self._pending
        self._pending = None
        if isinstance(step, VisionStep):
            self.images.trim(step.image.key)
            return []
        got = counts or (1,) * step.decoding
        for sequence, row in zip(sequences, step.rows, strict=True):
            sequence.computed += len(row.ids)
            sequence.unscored -= row.scored
        for sequence, row, count in zip(sequences, step.rows, got):
            # What was written for proposals that were not taken is written again.
            sequence.computed += count - len(row.ids)
        if isinstance(step, PrefillStep):
            self._prefills += 1
            for sequence in sequences[step.decoding :]:
                sequence.served = self._prefills
            sequences = sequences[: step.sampled]
        # On a CPU prompt rows give K/V bits that depend on nothing but the tokens, and decoding rows give others: pages
        # that the latter have written are not kept there, so that the cache changes no result by a bit.
        decoding = step.decoding
        got += (1,) * (len(sequences) - decoding)
        moved: list[tuple[Sequence, int]] = []
        taken = iter(ids)
        for place, (sequence, count) in enumerate(zip(sequences, got, strict=True)):
            if not count:
                self.preempt(sequence)
                continue
            own = [next(taken) for _ in range(count)]
            sequence.generated += own
            moved += [(sequence, token) for token in own]
            # Finite logits mean finite K/V: a token attends to all before it.
            if self.prefix_cache and own[-1] != NOT_FINITE and (place >= decoding or not self.plan.lengths_are_free):
                self._keep(sequence)
        return moved

    def finish(self, sequence: Sequence) -> None:
        """End a sequence: free its pages and release its images."""
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)
        self._ended.append(sequence.id)
        self._release_images(sequence)

    def _release_images(self, sequence: Sequence) -> None:
        if sequence.holds_images:
            for image in sequence.images:
                self.images.release(image.key)
            sequence.holds_images = False

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.kept = [], 0, 0
        sequence.sent_pages, sequence.sent_images = 0, None

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
        """Each decoding sequence with its proposal, as far as they fit a step beside parts of prompts."""
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
                fits = len(self.running) < self.batch and self._take_room(self.waiting[0])
                if fits:
                    self.running.append(self.waiting.pop(0))
                    yield self.running[-1]
            elif prompts:
                yield prompts.pop(0)

    def _take_room(self, sequence: Sequence) -> bool:
        """Allocate pages for the prompt, its first token and its images; False and none if too few are free, or if the
        sequence waits for pages that are being computed.
        """
        size = self.plan.page_size
        # At least one token is computed, to get its logits.
        finds = self.prefix_cache and not sequence.unscored
        wanted = sequence.digests_of((sequence.length - 1) // size, size) if finds else []
        shared = self.pool.find(wanted)
        needed = pages_for(min(sequence.length + 1, self.plan.max_length), size) - len(shared)
        if self.pool.free_beside(shared) < needed or self._is_being_computed(wanted, len(shared)):
            return False
        taken: list[str] = []
        try:
            for image in sequence.images:
                self.images.acquire(image.key, image.count * self.plan.tokens_per_tile)
                taken.append(image.key)
        except OutOfPages:
            for key in taken:
                self.images.release(key)
            return False
        sequence.holds_images = True
        sequence.pages, sequence.kept = self.pool.allocate(needed, shared), len(shared)
        sequence.computed = len(shared) * size
        if sequence.cached is None:
            sequence.cached = sequence.computed
        return True

    def _is_being_computed(self, wanted: list[bytes], found: int) -> bool:
        """Whether a running prompt is computing so many of the wanted pages after those `found`, that waiting for its
        end costs at most twice what it saves.
        """
        size = self.plan.page_size
        for other in self.running:
            if other.decoding:
                continue
            theirs = other.digests_of(min(len(wanted), other.length // size), size)
            if other.left <= 2 * size * (equal_pages(wanted, theirs) - found):
                return True
        return False

    def _keep(self, sequence: Sequence) -> None:
        """Keep the pages of a sequence that are full and computed, for sequences that begin with the same tokens."""
        full = sequence.computed // self.plan.page_size
        if full > sequence.kept:
            digests = sequence.digests_of(full, self.plan.page_size)
            for page, digest in zip(sequence.pages[sequence.kept : full], digests[sequence.kept :]):
                self.pool.keep(page, digest)
            sequence.kept = full

    def _decoding(self) -> list[Sequence]:
        """The decoding sequences, with a page for their next token. Preempts sequences where pages run out."""
        for sequence in [s for s in self.running if s.decoding]:
            while sequence in self.running and pages_for(sequence.length, self.plan.page_size) > len(sequence.pages):
                try:
                    sequence.pages += self.pool.allocate(1)
                except OutOfPages:
                    self.preempt(max(self.running, key=lambda one: (-one.priority, one.id)))
        return [s for s in self.running if s.decoding]

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
        self._free(sequence)
        # Images may be needed by a sequence of a higher priority, which is admitted before this one.
        self._release_images(sequence)
        sequence.served = 0
        insort(self.waiting, sequence, key=lambda one: one.turn)

    def _issue(self, step: Step, sequences: list[Sequence]) -> Step:
        self._pending = (step, sequences)
        return step

    def _take_ended(self) -> tuple[int, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended
