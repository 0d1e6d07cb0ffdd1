"""A request in the scheduler: its ids, its pages, and what the ranks were told of both. Uses no tensors."""

from bisect import bisect_left
from dataclasses import dataclass, field

from mllama_graph.engine.steps import ImageTable, Row
from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Sampling
from mllama_graph.plan.blocks import ImageCache, ImagePages, page_digest, pages_for
from mllama_graph.plan.buckets import Plan


@dataclass(eq=False)
class Sequence:
    """A request in the scheduler. image_positions: the positions of its image tokens, one per image.

    priority: higher ones are served first. served: how many prefill steps there were when the sequence arrived, or got
    the last chunk of its prompt. skipped: ids of the request that are not in the sequence of a draft; a token is drawn
    with the random number of its position among all ids of the request. unscored: the number of its prompt's last ids
    whose log-probabilities are wanted and not known yet.
    """

    id: int
    prompt: tuple[int, ...]
    images: tuple[TiledImage, ...]
    image_positions: tuple[int, ...]
    max_new: int
    sampling: Sampling
    priority: int = 0
    skipped: int = 0
    unscored: int = 0
    served: int = 0
    generated: list[int] = field(default_factory=list)
    # Tokens whose K/V are in the pages.
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    # The digests of full pages, as far as they were needed, and the number of pages that are kept under them.
    digests: list[bytes] = field(default_factory=list)
    kept: int = 0
    # Whether more of them are kept once the tokens of a step are known.
    keeps: bool = False
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

    @property
    def complete(self) -> bool:
        """Whether it has all its new tokens."""
        return len(self.generated) >= self.max_new

    @property
    def left(self) -> int:
        """Tokens that are not computed."""
        return self.length - self.computed

    @property
    def turn(self) -> tuple[int, int, bool, int]:
        """The order in which prompts get their next chunks: by priority, then the one that has waited longest. Of
        those that are waiting since the same step, new ones are first, in order of arrival.
        """
        return -self.priority, self.served, self.computed > 0, self.id

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """The prompt and generated ids at positions start .. stop - 1."""
        split = len(self.prompt)
        return self.prompt[start:stop] + tuple(self.generated[max(start - split, 0) : max(stop - split, 0)])

    def scorable(self, outputs: int) -> int:
        """The most tokens of the next chunk, of which a step gives logits for as many as `outputs`.

        Those after which log-probabilities are known, of a sequence that was preempted, are a chunk of their own.
        """
        if not self.unscored:
            return self.left
        return max(len(self.prompt) - 1 - self.unscored - self.computed, 0) or outputs

    def scored_in(self, start: int, count: int) -> int:
        """After how many of the tokens from `start` on log-probabilities of the next one are wanted."""
        return min(count, self.unscored) if self.unscored and start == len(self.prompt) - 1 - self.unscored else 0

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


def image_table(images: list[ImagePages], size: int) -> tuple[ImageTable, list[int]]:
    """The table of some images' pages, and the first entry of each image in it, followed by the table's length."""
    begins, pages, fill = [0], [], []
    for image in images:
        pages += image.pages
        fill += [min(size, image.tokens - size * n) for n in range(len(image.pages))]
        begins.append(len(pages))
    return ImageTable(tuple(pages), tuple(fill)), begins


def equal_pages(one: list[bytes], other: list[bytes]) -> int:
    """The number of pages with which both sequences of digests begin. A digest covers the pages before it, too."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda page: one[page] != other[page])


def row_of(sequence: Sequence, count: int, proposal: tuple[int, ...], held: ImageCache, plan: Plan) -> Row:
    """The next `count` tokens of a sequence, its proposal, and what the ranks have not been sent yet, as a row."""
    ids = sequence.ids(sequence.computed, sequence.computed + count) + proposal
    count += len(proposal)
    start, first_row = sequence.computed, not sequence.sent_pages
    seen = [sequence.visible(position) for position in range(start, start + count)]
    low, high = min(first for first, _ in seen), max(last for _, last in seen)
    if plan.lengths_are_free and not sequence.decoding:
        # Sums over image tokens begin at the table's first: wherever a prompt is split, they have the same bits.
        low = 0
    table = None
    if sequence.sent_images != (low, high):
        pages = [held[image.key] for image in sequence.images[low:high]]
        table, sequence.image_begins = image_table(pages, plan.page_size)
    begins = sequence.image_begins
    see = [(begins[first - low], begins[last - low]) if last > first else (0, 0) for first, last in seen]
    scored = sequence.scored_in(start, count)
    new_pages = tuple(sequence.pages[sequence.sent_pages :])
    sequence.sent_pages, sequence.sent_images = len(sequence.pages), (low, high)
    return Row(
        sequence.id,
        ids,
        start,
        new_pages,
        pages_for(start + count, plan.page_size),
        begins[-1],
        table,
        see=() if all(span == (0, begins[-1]) for span in see) else tuple(see),
        sampling=sequence.sampling if first_row else None,
        given=sequence.prompt[start + count] if 0 < scored == count else None,
        skipped=sequence.skipped,
        scored=scored,
    )
