"""The bucket plan: which static shapes exist, and which bucket runs a step. Integers only.

One graph is compiled per bucket. Bucket sizes and the number of pages depend on the configuration alone, never on free
memory, so that the same command finds its graphs in the store.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from mllama_graph.core.config import PlanChoice
from mllama_graph.core.devices import Paging
from mllama_graph.core.errors import TooLong, UserError
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.blocks import pages_for
from mllama_graph.plan.bucket import Bucket

# The ratio of successive sizes in a ladder. It is large to keep the number of graphs small.
LADDER = 4
SMALLEST_PREFILL = 32
LARGEST_PREFILL = 2048
# The most tokens of a step while sequences decode, or twice the batch if that is more, where lengths are data and
# prompts are computed beside them: until measured times decide (engine/pace.py).
MIXED_TOKENS = 12
# The most tokens and sequences of a packed prefill where shapes are compiled: beyond them, a device is busy with one
# prompt, and attention, which pads each sequence to all tokens, costs more than launches (plan/latency.py).
PACKED_TOKENS, PACKED_ROWS = 512, 8
# The most rows of a decode step with proposals where lengths are data, unless the batch is larger: beyond, a step takes
# time in proportion to its rows, and few proposals pay.
SPECULATIVE_ROWS = 16
# The number of prefill buckets, the largest that PACKED_TOKENS allows, that exist for several prompts.
PACKED_SIZES = 2


def pick(need: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `need`.

    Raises ValueError past the largest size; the scheduler splits or refuses such requests first.
    """
    for size in sizes:
        if size >= need:
            return size
    raise ValueError(f"{need} is beyond the largest bucket of {list(sizes)}")


def ladder(low: int, high: int, factor: int = LADDER) -> tuple[int, ...]:
    """low, low * factor, ... up to and including high."""
    sizes, size = [], min(low, high)
    while size < high:
        sizes.append(size)
        size *= factor
    return (*sizes, high)


@dataclass(frozen=True)
class Plan:
    """All static sizes of a run: buckets and page pools."""

    page_size: int
    max_length: int
    prefill_tokens: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    decode_batch: tuple[int, ...]
    pages: tuple[int, ...]
    images: tuple[int, ...]
    # Whether a step's cost depends on its actual lengths, not on the bucket's: then one size of `pages` is enough.
    lengths_are_free: bool
    tokens_per_tile: int
    pages_per_image: int
    scratch_pages: int
    num_pages: int
    num_image_pages: int
    # The most tokens of a step while sequences decode. paced: only the first steps', until their times are known.
    step_tokens: int
    paced: bool
    # Most real tiles of an image, each number of which has a vision graph; 0 for one graph that takes any number.
    tiles: int
    # Whether a page of several sequences counts once for each (core/devices.py, Paging).
    counts_every_reader: bool
    # The model's positions, where they limit max_length; None where the configured lengths do.
    positions: int | None
    # The most tokens of a sequence in a decode step: its last one, and proposals.
    row_tokens: int = 1

    @property
    def max_images(self) -> int:
        return self.images[-1]

    def check(self, prompt: int, max_new: int, images: int) -> None:
        """Raises UserError (TooLong for its tokens) for a request that exceeds the plan, so that it could never run."""
        if prompt + max_new > self.max_length:
            rule = f"the plan holds {self.max_length}. Raise max_input_length or max_output_length."
            if self.positions:
                rule = (
                    f"the model has {self.positions} positions (max_position_embeddings). Shorten the prompt, lower "
                    "max_new_tokens, or set extend_context=true."
                )
            message = f"{prompt} prompt ids and {max_new} new ones are {prompt + max_new} tokens; {rule}"
            raise TooLong(message, prompt, max_new, self.max_length)
        if images > self.max_images:
            raise UserError(
                f"{images} images in one request; the plan holds {self.max_images}. Set max_images={images}."
            )

    def decode(self, rows: int, pages: int, image_pages: int, each: int = 1) -> Bucket:
        """The smallest decode bucket for `rows` sequences of at most `pages` and `image_pages` pages each, which
        compute `each` tokens.
        """
        rows = pick(rows, self.decode_batch)
        return Bucket("decode", rows, rows * each, pick(pages, self.pages), self._images(image_pages))

    @property
    def decode_tokens(self) -> int:
        """The most token rows of a decode step."""
        return self.decode_batch[-1] * (1 if self.lengths_are_free else self.row_tokens)

    def prefill(self, tokens: int, pages: int, image_pages: int, rows: int = 1) -> Bucket:
        """The smallest prefill bucket for `tokens` new tokens of `rows` prompts, of at most `pages` pages each with
        their earlier tokens; pages is 0 for one prompt without earlier tokens.
        """
        images, rows = self._images(image_pages), pick(rows, self.prefill_rows)
        if rows > 1:
            return Bucket("prefill", rows, pick(tokens, self.packed_tokens), self.packed_pages, images)
        held = pick(pages, self.past_pages) if pages or self.lengths_are_free else 0
        return Bucket("prefill", rows, pick(tokens, self.prefill_tokens), held, images)

    def packs(self, rows: int, tokens: int, length: int) -> bool:
        """Whether a step holds `rows` prompts of `tokens` new tokens in all, of which the longest has `length` tokens,
        earlier ones included.
        """
        pages = pages_for(length, self.page_size)
        return rows <= self.prefill_rows[-1] and tokens <= self.packed_tokens[-1] and pages <= self.packed_pages

    @property
    def past_pages(self) -> tuple[int, ...]:
        """Buckets of pages for one prompt with earlier tokens: those of long prompts, which prefix hits use too."""
        least = 0 if self.lengths_are_free else pages_for(self.chunk(self.step_tokens), self.page_size)
        return tuple(pages for pages in self.pages if pages >= min(least, self.pages[-1]))

    @property
    def packed_tokens(self) -> tuple[int, ...]:
        """Buckets of tokens for several prompts."""
        if self.lengths_are_free:
            return self.prefill_tokens
        return tuple(size for size in self.prefill_tokens if size <= PACKED_TOKENS)[-PACKED_SIZES:] or (0,)

    @property
    def packed_pages(self) -> int:
        """The only bucket of pages for several prompts: prompts that fit have few."""
        if self.lengths_are_free:
            return self.pages[-1]
        return pick(min(pages_for(self.packed_tokens[-1] + 1, self.page_size), self.pages[-1]), self.pages)

    def vision(self, tiles: int) -> Bucket:
        """The vision bucket of an image with `tiles` real tiles."""
        return Bucket("vision", 1, 1, 0, self.pages_per_image, tiles if self.tiles else 0)

    def alone(self, prompt: int, max_new: int, tiles: Sequence[int]) -> list[Bucket]:
        """The buckets that a request served alone needs up to its full length. `tiles`: real tiles of each image."""
        images = sum(pages_for(count * self.tokens_per_tile, self.page_size) for count in tiles)
        buckets, done = [*dict.fromkeys(map(self.vision, tiles))], 0
        while done < prompt:
            chunk = self.chunk(prompt - done)
            done += chunk
            used = pages_for(done, self.page_size) if done > chunk else 0
            buckets.append(self.prefill(chunk, used, images))
        if max_new > 1:
            pages = pages_for(prompt + max_new, self.page_size)
            buckets.append(self.decode(1, pages, images))
            if self.row_tokens > 1:
                rows, each = (self.row_tokens, 1) if self.lengths_are_free else (1, self.row_tokens)
                buckets.append(self.decode(min(rows, self.decode_batch[-1]), pages, images, each))
        return buckets

    def chunk(self, left: int) -> int:
        """The number of tokens in the next chunk of a prompt with `left` remaining tokens."""
        return min(left, self.prefill_tokens[-1])

    def _images(self, image_pages: int) -> int:
        return pick(image_pages, [n * self.pages_per_image for n in self.images]) if image_pages else 0

    def buckets(self) -> list[Bucket]:
        """Every bucket that a step can need, vision buckets first."""
        image_pages = [0] + [n * self.pages_per_image for n in self.images]
        past = self.past_pages if self.lengths_are_free else (0, *self.past_pages)
        least = self.prefill_rows[0]
        prefill = [Bucket("prefill", least, t, p, i) for t, p, i in product(self.prefill_tokens, past, image_pages)]
        packed = product(self.prefill_rows[1:], self.packed_tokens, image_pages)
        prefill += [Bucket("prefill", b, t, self.packed_pages, i) for b, t, i in packed if t]
        # Where lengths are data, each proposal is a row of its own.
        each = (1,) if self.lengths_are_free or self.row_tokens == 1 else (1, self.row_tokens)
        sizes = product(self.decode_batch, each, self.pages, image_pages)
        decode = [Bucket("decode", b, b * n, p, i) for b, n, p, i in sizes]
        vision = [self.vision(tiles) for tiles in range(self.tiles, 0, -1)] or [self.vision(0)]
        return [*vision, *prefill, *decode]

    def describe(self) -> str:
        """The plan in one line, which a run prints at its start."""

        def join(sizes: Sequence[int]) -> str:
            return ",".join(map(str, sizes))

        return (
            f"prefill_tokens={join(self.prefill_tokens)} prefill_rows={join(self.prefill_rows)} "
            f"decode_batch={join(self.decode_batch)} "
            f"pages={join(self.pages)} images={join(self.images)} page_size={self.page_size} "
            f"num_pages={self.num_pages} num_image_pages={self.num_image_pages}"
        )


def choose(need: Bucket, existing: Iterable[Bucket], cost: Callable[[Bucket], float], reuse: float) -> Bucket:
    """The bucket that runs a step: the cheapest existing one, unless it costs more than `reuse` times the exact one."""
    fitting = [bucket for bucket in existing if bucket.holds(need)]
    best = min(fitting, key=cost, default=need)
    return best if cost(best) <= reuse * cost(need) else need


def _sizes(name: str, given: Sequence[int] | None, default: tuple[int, ...], least_top: int) -> tuple[int, ...]:
    if given is None:
        return default
    sizes = tuple(sorted(set(given)))
    if not sizes or sizes[0] < 1:
        raise UserError(f"plan.{name}={list(given)} must hold whole numbers of at least 1.")
    if sizes[-1] < least_top:
        raise UserError(f"plan.{name}={list(given)} must reach {least_top}, as batch and the lengths require.")
    return sizes


@dataclass(frozen=True)
class Limits:
    """Limits of a run: sequences in flight, ids per prompt, new tokens per request, images per request, and tokens per
    step while sequences decode (None: the device's default), and tokens proposed per sequence and decode step.
    extended: sequences may exceed the model's positions.
    """

    batch: int
    max_input: int
    max_new: int
    max_images: int
    step_tokens: int | None = None
    proposals: int = 0
    extended: bool = False


def make_plan(choice: PlanChoice, limits: Limits, shape: ModelShape, paging: Paging, lengths_are_free: bool) -> Plan:
    """Make the plan of a run: ladders over batch, tokens and pages, and pools that hold a full batch.

    Raises UserError where a configured size can't hold what the limits allow.
    """
    size = choice.page_size
    _check_page(size, paging)
    longest, positions = limits.max_input + limits.max_new, shape.text.positions
    limited = longest > positions and not limits.extended
    longest = positions if limited else longest
    pages_per_sequence = pages_for(longest, size)
    # Where each sequence of a step is padded to as many tokens, padding may reach behind the longest one.
    widest = pages_for(longest + (0 if lengths_are_free else limits.proposals), size)
    chunk = min(LARGEST_PREFILL, limits.max_input)

    def pages_ladder(top: int) -> tuple[int, ...]:
        return (top,) if lengths_are_free else ladder(1, top)

    prefill = _sizes("prefill_tokens", choice.prefill_tokens, ladder(SMALLEST_PREFILL, chunk), 1)
    # Where lengths are free, absent sequences are too: one size, so that no graph is added.
    packed = (limits.batch,) if lengths_are_free else (1, min(PACKED_ROWS, limits.batch))
    rows = _sizes("prefill_rows", choice.prefill_rows, tuple(sorted(set(packed))), 1)
    decode = ladder(1, limits.batch)
    if lengths_are_free and limits.proposals:
        most = min(limits.batch * (1 + limits.proposals), SPECULATIVE_ROWS)
        decode = tuple(sorted({*decode, max(most, limits.batch)}))
    batch = _sizes("decode_batch", choice.decode_batch, decode, limits.batch)
    pages = _sizes("pages", choice.pages, pages_ladder(widest), widest)
    images = _sizes("images", choice.images, pages_ladder(limits.max_images), limits.max_images)
    # Each padded token row writes to its own slot in the scratch pages, so that slots are unique.
    decoded = batch[-1] * (1 if lengths_are_free else 1 + limits.proposals)
    scratch = pages_for(max(prefill[-1], decoded), size)
    if paging.counts_every_reader:
        # The kernel counts at least one page per sequence of a batch, padding included.
        scratch = max(scratch, batch[-1], rows[-1])
    num_pages = scratch + (limits.batch * pages_per_sequence if choice.num_pages is None else choice.num_pages)
    if num_pages - scratch < pages_per_sequence:
        raise UserError(
            f"plan.num_pages={choice.num_pages} can't hold one sequence of {longest} tokens: "
            f"that takes {pages_per_sequence} pages of {size}."
        )
    num_images = _num_images(choice.num_images, limits, batch[-1], images[-1], paging)
    tokens_per_tile = shape.vision.tokens
    pages_per_image = pages_for(shape.vision.max_tiles * tokens_per_tile, size)
    return Plan(
        size,
        longest,
        prefill,
        rows,
        batch,
        pages,
        images,
        lengths_are_free,
        tokens_per_tile,
        pages_per_image,
        scratch,
        num_pages,
        num_images * pages_per_image,
        limits.step_tokens or (max(MIXED_TOKENS, 2 * limits.batch) if lengths_are_free else prefill[-1]),
        lengths_are_free and limits.step_tokens is None,
        shape.vision.max_tiles if paging.fixed_tiles else 0,
        paging.counts_every_reader,
        positions if limited else None,
        1 + limits.proposals,
    )


def _check_page(size: int, paging: Paging) -> None:
    if size < 1:
        raise UserError(f"plan.page_size={size} must be at least 1.")
    multiple, largest = paging.page_multiple, paging.largest_page
    if size % multiple or largest and size > largest:
        raise UserError(
            f"plan.page_size={size}: an NPU's attention takes pages of {multiple} to {largest} tokens, in "
            f"steps of {multiple}. Use plan.page_size={multiple}."
        )


def _num_images(given: int | None, limits: Limits, batch: int, images: int, paging: Paging) -> int:
    """The number of images in the pool. Some kernels count an image once for each sequence that reads it."""
    least = batch * images if paging.counts_every_reader else limits.max_images
    count = max(limits.batch, least) if given is None else given
    if count < least:
        needed = (
            f"{least}: {images} images for each of {batch} sequences, as an NPU's attention counts them"
            if paging.counts_every_reader
            else f"the {least} images of one request"
        )
        raise UserError(f"plan.num_images={count} must be at least {needed}.")
    return count
