"""Decides the next step from the requests and the ids sampled so far. Uses no tensors.

A step encodes one image, prefills prompts or a chunk of one, or decodes one token for every running sequence.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from mllama_graph.core.errors import UserError
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, ImageTable, PrefillStep, Row, Step, VisionStep
from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Sampling
from mllama_graph.plan.blocks import BlockPool, ImageCache, OutOfPages, SharedPages, page_digest, pages_for
from mllama_graph.plan.buckets import Plan


@dataclass(eq=False)
class Sequence:
    """A request in the scheduler. image_positions: the positions of its image tokens, one per image."""

    id: int
    prompt: tuple[int, ...]
    images: tuple[TiledImage, ...]
    image_positions: tuple[int, ...]
    max_new: int
    sampling: Sampling
    generated: list[int] = field(default_factory=list)
    # Tokens whose K/V are in the pages.
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    # The digests of full pages, as far as they were needed, and the number of pages that are kept under them.
    digests: list[bytes] = field(default_factory=list)
    kept: int = 0
    # Tokens whose K/V were found when the sequence was first admitted; None before that.
    cached: int | None = None
    holds_images: bool = False
    # What the ranks have been sent: the number of pages, and the images [first, last) of their image table.
    sent_pages: int = 0
    sent_images: tuple[int, int] | None = None
    # The first entry of each image in that table, followed by the table's length.
    image_begins: list[int] = field(default_factory=lambda: [0])

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def decoding(self) -> bool:
        """Whether all tokens but the last are computed, so that the next step is a decode step."""
        return bool(self.generated) and self.computed == self.length - 1

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """The prompt and generated ids at positions start .. stop - 1."""
        split = len(self.prompt)
        return self.prompt[start:stop] + tuple(self.generated[max(start - split, 0) : max(stop - split, 0)])

    def digests_of(self, pages: int, size: int) -> list[bytes]:
        """The digests of the first full pages of `size` tokens."""
        while len(self.digests) < pages:
            start = len(self.digests) * size
            images = [
                (at, image.key) for at, image in zip(self.image_positions, self.images) if start <= at < start + size
            ]
            parent = self.digests[-1] if self.digests else b""
            self.digests.append(page_digest(parent, self.ids(start, start + size), images))
        return self.digests[:pages]

    def visible(self, position: int) -> tuple[int, int]:
        """The images [first, last) that the token at `position` attends to: the latest image at or before it, and the
        images whose tokens directly precede that image's token.

        Generated tokens attend to the same images as the last prompt token (transformers processing_mllama.py,
        get_cross_attention_token_mask).
        """
        last = sum(at <= position for at in self.image_positions)
        first = max(last - 1, 0)
        while first > 0 and self.image_positions[first] == self.image_positions[first - 1] + 1:
            first -= 1
        return first, last


class Scheduler:
    """Continuous batching: sequences join and leave between steps.

    Waiting sequences are admitted in order of arrival while rows, pages and image pages suffice. Prompts that fit a
    prefill bucket together are computed in one step. Prompts longer than the largest bucket are computed in chunks,
    with a decode step of the running sequences between chunks. When
    pages run out, the youngest running sequence is preempted: it returns to the head of the queue, keeps its ids, and
    is computed again later.

    `prefix_cache`: full pages are kept when their sequence ends, and a sequence that begins with the same ids and
    images starts after them. It waits while a running prompt is computing the next page that both have.
    """

    def __init__(self, plan: Plan, batch: int, prefix_cache: bool = True):
        self.plan, self.batch, self.prefix_cache = plan, batch, prefix_cache
        self.pool = SharedPages(BlockPool(plan.num_pages, reserved=plan.scratch_pages), plan.counts_every_reader)
        self.images = ImageCache(BlockPool(plan.num_image_pages), plan.page_size, plan.pages_per_image)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._pending: tuple[Step, list[Sequence]] | None = None
        self._decode_next = False
        # Sequences that ended, which the ranks have not been told yet.
        self._ended: list[int] = []

    def check(self, prompt: int, max_new: int, images: int) -> None:
        """Raises UserError for a request whose sizes exceed the plan, so that it could never run."""
        if prompt + max_new > self.plan.max_length:
            raise UserError(
                f"{prompt} prompt ids and {max_new} new ones are {prompt + max_new} tokens; the plan holds "
                f"{self.plan.max_length}. Raise max_input_length or max_output_length."
            )
        if images > self.plan.max_images:
            raise UserError(
                f"{images} images in one request; the plan holds {self.plan.max_images}. Set max_images={images}."
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises UserError as `check` does."""
        self.check(len(sequence.prompt), sequence.max_new, len(sequence.images))
        self.waiting.append(sequence)

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
        step = self._decode() if self._decode_next else None
        step = step or self._admit() or self._decode()
        self._decode_next = False
        return step

    def commit(self, ids: tuple[int, ...]) -> list[tuple[Sequence, int]]:
        """Append the ids that a step sampled. Returns (sequence, id) for each sequence that got one.

        The caller ends sequences with `finish`.
        """
        assert self._pending is not None
        step, sequences = self._pending
        self._pending = None
        if isinstance(step, VisionStep):
            self.images.trim(step.image.key)
            return []
        if isinstance(step, PrefillStep):
            # Running sequences get their next token between the chunks of a long prompt.
            self._decode_next = step.sampled < len(sequences)
        for sequence, row in zip(sequences, step.rows, strict=True):
            sequence.computed += len(row.ids)
        if isinstance(step, PrefillStep):
            sequences = sequences[: step.sampled]
        # On a CPU a prompt step gives K/V bits that depend on nothing but the tokens, and a decode step gives others:
        # there, pages that a decode step has written are not kept, so that the cache changes no result by a bit.
        keep = self.prefix_cache and (isinstance(step, PrefillStep) or not self.plan.lengths_are_free)
        for sequence, token in zip(sequences, ids, strict=True):
            # Finite logits mean finite K/V: a token attends to all before it.
            if keep and token != NOT_FINITE:
                self._keep(sequence)
            sequence.generated.append(token)
        return list(zip(sequences, ids))

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
        if sequence.holds_images:
            for image in sequence.images:
                self.images.release(image.key)
            sequence.holds_images = False

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.kept = [], 0, 0
        sequence.sent_pages, sequence.sent_images = 0, None

    def _admit(self) -> Step | None:
        """The next vision or prefill step, in order of arrival: an image, a chunk, or whole prompts as far as they fit
        a bucket and have their images encoded.
        """
        packed: list[Sequence] = []
        tokens = longest = 0
        for sequence in self._to_prefill():
            tokens += sequence.length - sequence.computed
            longest = max(longest, sequence.length)
            unencoded = [image for image in sequence.images if not self.images[image.key].encoded]
            if not packed and unencoded:
                image = unencoded[0]
                return self._issue(VisionStep(image, tuple(self.images[image.key].pages)), [sequence])
            if packed and (unencoded or not self.plan.packs(len(packed) + 1, tokens, longest)):
                break
            packed.append(sequence)
            if not self.plan.packs(len(packed) + 1, tokens + 1, longest):
                break
        if not packed:
            return None
        # Only a prompt by itself can be longer than the largest bucket.
        counts = [self.plan.chunk(sequence.length - sequence.computed) for sequence in packed]
        sampled = sum(s.computed + count == s.length for s, count in zip(packed, counts))
        rows = tuple(self._row(sequence, count) for sequence, count in zip(packed, counts))
        return self._issue(PrefillStep(rows, sampled, self._take_ended()), packed)

    def _to_prefill(self) -> Iterator[Sequence]:
        """Running sequences that are not decoding yet, then those that can be admitted, each admitted when taken."""
        yield from [sequence for sequence in self.running if not sequence.decoding]
        while self.waiting and len(self.running) < self.batch and self._take_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            yield sequence

    def _take_room(self, sequence: Sequence) -> bool:
        """Allocate pages for the prompt, its first token and its images; False and none if too few are free, or if the
        sequence waits for pages that are being computed.
        """
        size = self.plan.page_size
        # At least one token is computed, to get its logits.
        shared = self.pool.find(sequence.digests_of((sequence.length - 1) // size, size)) if self.prefix_cache else []
        needed = pages_for(min(sequence.length + 1, self.plan.max_length), size) - len(shared)
        if self.pool.free_beside(shared) < needed or self._is_being_computed(sequence, len(shared)):
            return False
        taken: list[str] = []
        try:
            for image in sequence.images if not sequence.holds_images else ():
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

    def _is_being_computed(self, sequence: Sequence, page: int) -> bool:
        """Whether a running prompt is computing the page of this number of a sequence, counted from 0."""
        size = self.plan.page_size
        if not self.prefix_cache or page >= (sequence.length - 1) // size:
            return False
        wanted = sequence.digests[page]
        return any(
            page < other.length // size and other.digests_of(page + 1, size)[page] == wanted
            for other in self.running
            if not other.decoding
        )

    def _keep(self, sequence: Sequence) -> None:
        """Keep the pages of a sequence that are full and computed, for sequences that begin with the same tokens."""
        full = sequence.computed // self.plan.page_size
        if full > sequence.kept:
            digests = sequence.digests_of(full, self.plan.page_size)
            for page, digest in zip(sequence.pages[sequence.kept : full], digests[sequence.kept :]):
                self.pool.keep(page, digest)
            sequence.kept = full

    def _decode(self) -> Step | None:
        """A decode step for every decoding sequence. Preempts the youngest running sequence where pages run out."""
        for sequence in [s for s in self.running if s.decoding]:
            while sequence in self.running and pages_for(sequence.length, self.plan.page_size) > len(sequence.pages):
                try:
                    sequence.pages += self.pool.allocate(1)
                except OutOfPages:
                    self._preempt(self.running[-1])
        rows = [s for s in self.running if s.decoding]
        return self._issue(DecodeStep(tuple(self._row(s, 1) for s in rows), self._take_ended()), rows) if rows else None

    def _preempt(self, sequence: Sequence) -> None:
        """Put a sequence back at the head of the queue. It keeps its images, since it is the next to be admitted."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def _issue(self, step: Step, sequences: list[Sequence]) -> Step:
        self._pending = (step, sequences)
        return step

    def _take_ended(self) -> tuple[int, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended

    def _row(self, sequence: Sequence, count: int) -> Row:
        """The next `count` tokens of a sequence, with the changes that the ranks have not been sent yet."""
        start, first_row = sequence.computed, not sequence.sent_pages
        seen = [sequence.visible(position) for position in range(start, start + count)]
        low, high = min(first for first, _ in seen), max(last for _, last in seen)
        if self.plan.lengths_are_free and not sequence.decoding:
            # Sums over image tokens begin at the table's first: wherever a prompt is split, they have the same bits.
            low = 0
        table = None
        if sequence.sent_images != (low, high):
            table, sequence.image_begins = self._image_table(sequence.images[low:high])
        begins = sequence.image_begins
        see = [(begins[first - low], begins[last - low]) if last > first else (0, 0) for first, last in seen]
        new_pages = tuple(sequence.pages[sequence.sent_pages :])
        sequence.sent_pages, sequence.sent_images = len(sequence.pages), (low, high)
        return Row(
            sequence.id,
            sequence.ids(start, start + count),
            start,
            new_pages,
            pages_for(start + count, self.plan.page_size),
            begins[-1],
            table,
            see=() if all(span == (0, begins[-1]) for span in see) else tuple(see),
            sampling=sequence.sampling if first_row else None,
        )

    def _image_table(self, images: tuple[TiledImage, ...]) -> tuple[ImageTable, list[int]]:
        """The table of some images' pages, and the first entry of each image in it, followed by the table's length."""
        begins, pages, fill, size = [0], [], [], self.plan.page_size
        for image in images:
            held = self.images[image.key].pages
            tokens = image.count * self.plan.tokens_per_tile
            pages += held
            fill += [min(size, tokens - size * n) for n in range(len(held))]
            begins.append(len(pages))
        return ImageTable(tuple(pages), tuple(fill)), begins
