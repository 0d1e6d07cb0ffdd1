"""Which step comes next: requests in, steps out, ids back. No tensor.

A step is one image to encode, one chunk of one prompt, or one token for every running sequence. All of them are plain
integers, so that they can be sent to any rank as they are.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Optional, Union

from mllama_graph.plan.blocks import BlockPool, ImageCache, OutOfPages, pages_for
from mllama_graph.plan.buckets import Plan
from mllama_graph.core.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How one row's next id is chosen. `logprobs`: how many of the best ids to report, None for no report."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: Optional[int] = None


@dataclass(frozen=True)
class ImageRef:
    """An image of a request: its hash, its real tiles and tokens, and its aspect-ratio id."""

    key: str
    tiles: int
    tokens: int
    aspect: int


@dataclass(frozen=True)
class Row:
    """Fresh tokens of one sequence, and all that the model must know of it.

    start: position of the first. pages: the pages of positions 0 .. start + len(ids) - 1. image_pages and image_fill:
    the image table and the tokens in each entry. see: per fresh token, the entries [from, to) that it sees.
    """

    sequence: int
    ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    image_pages: tuple[int, ...]
    image_fill: tuple[int, ...]
    see: tuple[tuple[int, int], ...]
    sampling: Sampling


@dataclass(frozen=True)
class VisionStep:
    """Encode an image into `pages` (padding tiles included)."""

    image: ImageRef
    pages: tuple[int, ...]


@dataclass(frozen=True)
class PrefillStep:
    """One chunk of a prompt; `sample` where it is the last one."""

    row: Row
    sample: bool


@dataclass(frozen=True)
class DecodeStep:
    """One fresh token for each row."""

    rows: tuple[Row, ...]


AnyStep = Union[VisionStep, PrefillStep, DecodeStep]


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine."""

    id: int
    prompt: tuple[int, ...]
    images: tuple[ImageRef, ...]
    # Positions of the image tokens in the prompt, one an image.
    image_positions: tuple[int, ...]
    max_new: int
    sampling: Sampling
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    holds_images: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + tuple(self.generated)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def decoding(self) -> bool:
        """Whether all but its last token is computed, so that the next step gives one more."""
        return bool(self.generated) and self.computed == self.length - 1

    def visible(self, position: int) -> tuple[int, int]:
        """The images [first, last) that a token sees: the last one begun, and the chain of image tokens before it.

        Generated tokens see what the last prompt token sees (transformers processing_mllama.py,
        get_cross_attention_token_mask).
        """
        last = sum(at <= position for at in self.image_positions)
        first = max(last - 1, 0)
        while first > 0 and self.image_positions[first] == self.image_positions[first - 1] + 1:
            first -= 1
        return first, last


class Scheduler:
    """Continuous batching: sequences join and leave between steps.

    Waiting sequences are admitted first come, first served, while rows, pages and image pages last; prompts longer
    than the largest prefill bucket go in chunks, with a decode step for the others in between. When pages run out the
    youngest running sequence is put back to the head of the queue and later computed again, ids kept.
    """

    def __init__(self, plan: Plan, batch: int):
        self.plan, self.batch = plan, batch
        self.pool = BlockPool(plan.num_pages, reserved=plan.scratch_pages)
        self.images = ImageCache(BlockPool(plan.num_image_pages), plan.page_size, plan.pages_per_image)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._pending: Optional[tuple[AnyStep, list[Sequence]]] = None
        self._decode_next = False

    def check(self, prompt: int, max_new: int, images: int) -> None:
        """Raises UserError for a request of these sizes that could never run."""
        if prompt + max_new > self.plan.max_length:
            raise UserError(
                f"{prompt} prompt ids and {max_new} new ones are {prompt + max_new} tokens; the plan holds "
                f"{self.plan.max_length}. Raise max_input_length or max_output_length.")
        if images > self.plan.max_images:
            raise UserError(f"{images} images in one request; the plan holds {self.plan.max_images}. "
                            f"Set max_images={images}.")

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises UserError as `check` does."""
        self.check(len(sequence.prompt), sequence.max_new, len(sequence.images))
        self.waiting.append(sequence)

    def abort(self, id: int) -> None:
        """Forget a sequence, waiting or running; unknown ids are ignored."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.id == id:
                self._leave(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def next(self) -> Optional[AnyStep]:
        """The next step, or None when there is nothing to do. `commit` must follow each step."""
        assert self._pending is None, "commit the last step first"
        step = self._decode() if self._decode_next else None
        step = step or self._admit() or self._decode()
        self._decode_next = False
        return step

    def commit(self, ids: tuple[int, ...]) -> list[tuple[Sequence, int]]:
        """Take a step's ids; each sequence that got a token, with its token. The caller ends sequences by `finish`."""
        assert self._pending is not None
        step, sequences = self._pending
        self._pending = None
        if isinstance(step, VisionStep):
            self.images.trim(step.image.key)
            return []
        if isinstance(step, PrefillStep):
            sequence = sequences[0]
            sequence.computed += len(step.row.ids)
            if not step.sample:
                # A long prompt gives way to those who wait for their next token.
                self._decode_next = True
                return []
        else:
            for sequence in sequences:
                sequence.computed += 1
        for sequence, token in zip(sequences, ids, strict=True):
            sequence.generated.append(token)
        return list(zip(sequences, ids))

    def finish(self, sequence: Sequence) -> None:
        """A sequence is done: its pages are free, its images one user fewer."""
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)
        if sequence.holds_images:
            for image in sequence.images:
                self.images.release(image.key)
            sequence.holds_images = False

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _admit(self) -> Optional[AnyStep]:
        """The next image or chunk of a sequence that is not decoding yet."""
        for sequence in self.running:
            if not sequence.decoding:
                return self._prepare(sequence)
        if self.waiting and len(self.running) < self.batch and self._take_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            return self._prepare(sequence)
        return None

    def _take_room(self, sequence: Sequence) -> bool:
        """Pages for the whole prompt and its first token, and for its images; False, holding nothing new, if not."""
        wanted = pages_for(min(sequence.length + 1, self.plan.max_length), self.plan.page_size)
        if self.pool.free < wanted:
            return False
        taken: list[str] = []
        try:
            for image in sequence.images if not sequence.holds_images else ():
                self.images.acquire(image.key, image.tokens)
                taken.append(image.key)
        except OutOfPages:
            for key in taken:
                self.images.release(key)
            return False
        sequence.holds_images = True
        sequence.pages = self.pool.allocate(wanted)
        return True

    def _prepare(self, sequence: Sequence) -> AnyStep:
        for image in sequence.images:
            entry = self.images[image.key]
            if not entry.encoded:
                return self._issue(VisionStep(image, tuple(entry.pages)), [sequence])
        count = self.plan.chunk(sequence.length - sequence.computed)
        row = self._row(sequence, count)
        return self._issue(PrefillStep(row, sample=sequence.computed + count == sequence.length), [sequence])

    def _decode(self) -> Optional[AnyStep]:
        """One token for every sequence whose prompt is computed, preempting the youngest where pages run out."""
        for sequence in [s for s in self.running if s.decoding]:
            while sequence in self.running and pages_for(sequence.length, self.plan.page_size) > len(sequence.pages):
                try:
                    sequence.pages += self.pool.allocate(1)
                except OutOfPages:
                    self._preempt(self.running[-1])
        rows = [s for s in self.running if s.decoding]
        return self._issue(DecodeStep(tuple(self._row(s, 1) for s in rows)), rows) if rows else None

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue. Its images stay held: it was admitted before all who wait."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def _issue(self, step: AnyStep, sequences: list[Sequence]) -> AnyStep:
        self._pending = (step, sequences)
        return step

    def _row(self, sequence: Sequence, count: int) -> Row:
        start = sequence.computed
        seen = [sequence.visible(position) for position in range(start, start + count)]
        low, high = min(first for first, _ in seen), max(last for _, last in seen)
        # Entry of the table at which each image begins; a token's range of images becomes a range of entries.
        begins, pages, fill = [0], [], []
        for image in sequence.images[low:high]:
            held = self.images[image.key].pages
            pages += held
            size = self.plan.page_size
            fill += [min(size, image.tokens - size * n) for n in range(len(held))]
            begins.append(len(pages))
        see = tuple((begins[first - low], begins[last - low]) if last > first else (0, 0) for first, last in seen)
        used = pages_for(start + count, self.plan.page_size)
        return Row(sequence.id, sequence.tokens[start:start + count], start, tuple(sequence.pages[:used]),
                   tuple(pages), tuple(fill), see, sequence.sampling)
