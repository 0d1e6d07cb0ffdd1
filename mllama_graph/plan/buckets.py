"""The bucket plan: which static shapes exist, and which bucket runs a step. Integers only.

One graph is compiled per bucket. Bucket sizes and the number of pages depend on the configuration alone, never on free
memory, so that the same command finds its graphs in the store.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from mllama_graph.core.errors import TooLong, UserError
from mllama_graph.plan.blocks import pages_for
from mllama_graph.plan.bucket import Bucket

# The most tokens of a packed prefill where shapes are compiled: beyond them, a device is busy with one prompt, and
# attention, which pads each sequence to all tokens, costs more than launches (plan/latency.py).
PACKED_TOKENS = 512
# The number of prefill buckets, the largest that PACKED_TOKENS allows, that exist for several prompts.
PACKED_SIZES = 2


# Rows of logits beside those of sequences in a step that computes prompts, where lengths are data: log-probabilities of
# a prompt's tokens are computed for as many at once. They bound the memory for logits: 33 MB for 128,256 ids.
SCORED_ROWS = 64


def pick(need: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `need`.

    Raises ValueError past the largest size; the scheduler splits or refuses such requests first.
    """
    for size in sizes:
        if size >= need:
            return size
    raise ValueError(f"{need} is beyond the largest bucket of {list(sizes)}")


@dataclass(frozen=True)
class Plan:
    """All static sizes of a run: buckets and page pools."""

    page_size: int
    max_length: int
    prefill_tokens: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    # Prompt tokens beside decoding sequences where shapes are compiled; empty where no graph mixes them.
    mixed_tokens: tuple[int, ...]
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
        """The most images of a request; 0 for a text-only model."""
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

    @property
    def mixed_rows(self) -> int:
        """The most token rows of a mixed step."""
        return self.decode_batch[-1] + self.mixed_tokens[-1] if self.mixed_tokens else 0

    def mixed(self, tokens: int, pages: int, image_pages: int, rows: int) -> Bucket:
        """The smallest mixed bucket for any decoding sequences, and beside them `tokens` new tokens of `rows` prompts,
        of at most `pages` pages each.
        """
        rows = pick(rows, self.prefill_rows)
        held = self.packed_pages if rows > 1 else pick(pages, self.past_pages)
        return self._beside(Bucket("prefill", rows, pick(tokens, self.mixed_tokens), held, self._images(image_pages)))

    def _beside(self, prompts: Bucket) -> Bucket:
        # One size of the decoding part: padded sequences read one token, and attention the pages that are used.
        rows, images = self.decode_batch[-1], prompts.image_pages
        return Bucket("mixed", rows, rows + prompts.tokens, self.pages[-1], images, prompts=prompts)

    def prefill(self, tokens: int, pages: int, image_pages: int, rows: int = 1) -> Bucket:
        """The smallest prefill bucket for `tokens` new tokens of `rows` prompts, of at most `pages` pages each with
        their earlier tokens; pages is 0 for one prompt without earlier tokens.
        """
        images, rows = self._images(image_pages), pick(rows, self.prefill_rows)
        if rows > 1:
            return self._prompts(rows, pick(tokens, self.packed_tokens), self.packed_pages, images)
        held = pick(pages, self.past_pages) if pages or self.lengths_are_free else 0
        return self._prompts(rows, pick(tokens, self.prefill_tokens), held, images)

    def _prompts(self, rows: int, tokens: int, pages: int, images: int) -> Bucket:
        """The prefill bucket of `rows` prompts. Where lengths are data, these include decoding sequences beside them,
        each proposal of which takes a row, too.
        """
        if not self.lengths_are_free:
            return Bucket("prefill", rows, tokens, pages, images)
        rows += self.decode_tokens if self.row_tokens > 1 else 0
        return Bucket("prefill", rows, tokens, pages, images, outputs=rows + SCORED_ROWS)

    @property
    def outputs(self) -> int:
        """The most rows of logits of a step that computes prompts, beside those of decoding sequences."""
        return self.prefill_rows[-1] + (SCORED_ROWS if self.lengths_are_free else 0)

    def packs(self, rows: int, tokens: int, length: int, beside: int = 0) -> bool:
        """Whether a step holds `rows` prompts of `tokens` new tokens in all, of which the longest has `length` tokens,
        earlier ones included, beside as many decoding sequences.
        """
        if pages_for(length, self.page_size) > self.packed_pages:
            return False
        if beside and not self.lengths_are_free:
            return rows <= self.prefill_rows[-1] and tokens <= self.mixed_tokens[-1]
        return rows + beside <= self.prefill_rows[-1] and tokens + beside <= self.packed_tokens[-1]

    def room_beside(self, decoding: int) -> int:
        """The prompt tokens that a step holds beside `decoding` sequences; 0 if these need a step of their own."""
        if not self.lengths_are_free:
            return max(self.mixed_tokens, default=0)
        return self.prefill_tokens[-1] - decoding if decoding < self.prefill_rows[-1] else 0

    def proposals_beside(self, tokens: int) -> int:
        """The most proposals in a step that computes `tokens` tokens of prompts and decoding sequences."""
        if not self.lengths_are_free or self.row_tokens == 1:
            return 0
        most = self.prefill_tokens[-1] if self.paced else min(self.step_tokens, self.prefill_tokens[-1])
        return max(0, most - tokens)

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
        image_pages = [0] + [n * self.pages_per_image for n in self.images if n]
        past = self.past_pages if self.lengths_are_free else (0, *self.past_pages)
        least = self.prefill_rows[0]
        prefill = [self._prompts(least, t, p, i) for t, p, i in product(self.prefill_tokens, past, image_pages)]
        packed = product(self.prefill_rows[1:], self.packed_tokens, image_pages)
        prefill += [self._prompts(b, t, self.packed_pages, i) for b, t, i in packed if t]
        beside = [
            *product(self.prefill_rows[:1], self.past_pages),
            *((b, self.packed_pages) for b in self.prefill_rows[1:]),
        ]
        mixed = [
            self._beside(Bucket("prefill", b, t, p, i))
            for t, (b, p), i in product(self.mixed_tokens, beside, image_pages)
        ]
        # Where lengths are data, each proposal is a row of its own.
        each = (1,) if self.lengths_are_free or self.row_tokens == 1 else (1, self.row_tokens)
        sizes = product(self.decode_batch, each, self.pages, image_pages)
        decode = [Bucket("decode", b, b * n, p, i) for b, n, p, i in sizes]
        vision = [self.vision(tiles) for tiles in range(self.tiles, 0, -1)] or [self.vision(0)]
        return [*(vision if self.max_images else []), *prefill, *mixed, *decode]

    def describe(self) -> str:
        """The plan in one line, which a run prints at its start."""

        def join(sizes: Sequence[int]) -> str:
            return ",".join(map(str, sizes))

        return (
            f"prefill_tokens={join(self.prefill_tokens)} prefill_rows={join(self.prefill_rows)} "
            + ("" if self.lengths_are_free else f"mixed_tokens={join(self.mixed_tokens) or 'none'} ")
            + f"decode_batch={join(self.decode_batch)} "
            f"pages={join(self.pages)} images={join(self.images)} page_size={self.page_size} "
            f"num_pages={self.num_pages} num_image_pages={self.num_image_pages}"
        )


def choose(need: Bucket, existing: Iterable[Bucket], cost: Callable[[Bucket], float], reuse: float) -> Bucket:
    """The bucket that runs a step: the cheapest existing one, unless it costs more than `reuse` times the exact one."""
    fitting = [bucket for bucket in existing if bucket.holds(need)]
    best = min(fitting, key=cost, default=need)
    return best if cost(best) <= reuse * cost(need) else need
