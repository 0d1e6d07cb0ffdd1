"""The bucket plan: which static shapes exist, and which one serves a step. Integers only.

A graph is compiled for one bucket. Its sizes, and the number of pages in the pools, come from the configuration alone,
so that the same command finds the same graphs again whatever memory happens to be free.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Optional, Sequence

from mllama_graph.plan.blocks import pages_for
from mllama_graph.core.config import Run, UserError
from mllama_graph.model.shape import ModelShape

# Each step of a ladder is this many times the one before: few graphs, each compiled on first use.
LADDER = 4
# docs npu_fused_infer_attention_score: pages for several query rows.
NPU_PAGE, MOST_NPU_PAGE = 128, 512
SMALLEST_PREFILL = 32
LARGEST_PREFILL = 2048


@dataclass(frozen=True, order=True)
class Bucket:
    """The static sizes of one graph.

    rows: sequences (B). tokens: token rows (T). pages: K/V pages a sequence (J; earlier ones in a prefill).
    image_pages: image K/V pages a sequence; 0 is the lean graph without cross-attention layers.
    """

    phase: str
    rows: int
    tokens: int
    pages: int
    image_pages: int

    def __str__(self) -> str:
        sizes = {"vision": [], "prefill": [("tokens", self.tokens), ("pages", self.pages)],
                 "decode": [("batch", self.rows), ("pages", self.pages)]}[self.phase]
        image = [("image_pages", self.image_pages)]
        return self.phase + " " + " ".join(f"{name}={size}" for name, size in sizes + image)

    def holds(self, need: "Bucket") -> bool:
        """Whether a graph of this bucket can run a step that needs `need`.

        Lean steps stay lean: a batch without images must not pay for the cross layers.
        """
        return (self.phase == need.phase and (self.image_pages == 0) == (need.image_pages == 0)
                and (self.pages == 0) == (need.pages == 0)
                and self.rows >= need.rows and self.tokens >= need.tokens
                and self.pages >= need.pages and self.image_pages >= need.image_pages)


def pick(need: int, sizes: Sequence[int]) -> int:
    """Smallest size that holds `need`.

    Raises ValueError past the largest; the scheduler chunks or refuses first.
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
    """Every static size of a run, and the pools behind them."""

    page_size: int
    max_length: int
    prefill_tokens: tuple[int, ...]
    decode_batch: tuple[int, ...]
    pages: tuple[int, ...]
    images: tuple[int, ...]
    # Whether a step's cost follows its lengths, not its bucket's: then one bucket of pages serves any.
    lengths_are_free: bool
    pages_per_image: int
    scratch_pages: int
    num_pages: int
    num_image_pages: int

    @property
    def max_images(self) -> int:
        return self.images[-1]

    def decode(self, rows: int, pages: int, image_pages: int) -> Bucket:
        """The smallest decode bucket for `rows` sequences with `pages` and `image_pages` each at the most."""
        rows = pick(rows, self.decode_batch)
        return Bucket("decode", rows, rows, pick(pages, self.pages), self._images(image_pages))

    def prefill(self, tokens: int, past_pages: int, image_pages: int) -> Bucket:
        """The smallest prefill bucket for a chunk of `tokens` behind `past_pages` earlier pages."""
        past = pick(past_pages, self.pages) if past_pages or self.lengths_are_free else 0
        return Bucket("prefill", 1, pick(tokens, self.prefill_tokens), past, self._images(image_pages))

    def vision(self) -> Bucket:
        """The one vision bucket: an image with all its tiles."""
        return Bucket("vision", 1, 1, 0, self.pages_per_image)

    def chunk(self, left: int) -> int:
        """How many of a prompt's `left` tokens to prefill next."""
        return min(left, self.prefill_tokens[-1])

    def _images(self, image_pages: int) -> int:
        return pick(image_pages, [n * self.pages_per_image for n in self.images]) if image_pages else 0

    def buckets(self) -> list[Bucket]:
        """Every bucket that a step can need, the vision one first."""
        image_pages = [0] + [n * self.pages_per_image for n in self.images]
        past = self.pages
        if not self.lengths_are_free:
            # A chunk comes behind earlier pages only where a prompt (or one that was preempted) exceeds the largest chunk.
            chunk = self.prefill_tokens[-1]
            least = pages_for(chunk, self.page_size)
            past = (0, *(p for p in self.pages if p >= least)) if self.max_length - 1 > chunk else (0,)
        prefill = [Bucket("prefill", 1, t, p, i) for t, p, i in product(self.prefill_tokens, past, image_pages)]
        decode = [Bucket("decode", b, b, p, i) for b, p, i in product(self.decode_batch, self.pages, image_pages)]
        return [self.vision(), *prefill, *decode]

    def describe(self) -> str:
        """The plan in one line, as it is printed at the start of a run."""
        join = lambda sizes: ",".join(map(str, sizes))  # noqa: E731
        return (f"prefill_tokens={join(self.prefill_tokens)} decode_batch={join(self.decode_batch)} "
                f"pages={join(self.pages)} images={join(self.images)} page_size={self.page_size} "
                f"num_pages={self.num_pages} num_image_pages={self.num_image_pages}")


def choose(need: Bucket, existing: Iterable[Bucket], cost: Callable[[Bucket], float], reuse: float) -> Bucket:
    """The bucket that serves a step: a graph that exists, unless it costs more than `reuse` times the exact one."""
    fitting = [bucket for bucket in existing if bucket.holds(need)]
    best = min(fitting, key=cost, default=need)
    return best if cost(best) <= reuse * cost(need) else need


def _sizes(name: str, given: Optional[Sequence[int]], default: tuple[int, ...], least_top: int) -> tuple[int, ...]:
    if given is None:
        return default
    sizes = tuple(sorted(set(given)))
    if not sizes or sizes[0] < 1:
        raise UserError(f"plan.{name}={list(given)} must hold whole numbers of at least 1.")
    if sizes[-1] < least_top:
        raise UserError(f"plan.{name}={list(given)} must reach {least_top}, which batch and lengths ask for.")
    return sizes


def make_plan(run: Run, shape: ModelShape, max_images: int) -> Plan:
    """The plan of a run: ladders over batch, tokens and pages, and pools that hold a full batch.

    Raises UserError where a size given in the configuration can't hold what the run's limits allow.
    """
    choice = run.plan
    size, on_npu = choice.page_size, run.backend.name == "torchair"
    if size < 1:
        raise UserError(f"plan.page_size={size} must be at least 1.")
    if on_npu and (size % NPU_PAGE or size > MOST_NPU_PAGE):
        raise UserError(f"plan.page_size={size}: an NPU's attention takes pages of {NPU_PAGE} to {MOST_NPU_PAGE} tokens, in "
                        f"steps of {NPU_PAGE}. Use plan.page_size={NPU_PAGE}.")
    longest = run.max_input_length + run.max_output_length
    pages_per_sequence = pages_for(longest, size)
    chunk = min(LARGEST_PREFILL, run.max_input_length)
    prefill = _sizes("prefill_tokens", choice.prefill_tokens, ladder(SMALLEST_PREFILL, chunk), 1)
    free = run.backend.kernels == "native"
    batch = _sizes("decode_batch", choice.decode_batch, ladder(1, run.batch), run.batch)
    pages = _sizes("pages", choice.pages, (pages_per_sequence,) if free else ladder(1, pages_per_sequence), pages_per_sequence)
    images = _sizes("images", choice.images, (max_images,) if free else ladder(1, max_images), max_images)
    pages_per_image = pages_for(shape.vision.max_tiles * shape.vision.tokens, size)
    # A padded token row writes to a slot of its own in these pages, so that slots are unique.
    scratch = pages_for(max(prefill[-1], batch[-1]), size)
    if on_npu:
        # Each sequence of a batch counts pages of its own, a padded row one (docs npu_fused_infer_attention_score).
        scratch = max(scratch, batch[-1])
    num_pages = scratch + (run.batch * pages_per_sequence if choice.num_pages is None else choice.num_pages)
    if num_pages - scratch < pages_per_sequence:
        raise UserError(f"plan.num_pages={choice.num_pages} can't hold one sequence of {longest} tokens: "
                        f"it takes {pages_per_sequence} pages of {size}.")
    # The same rule counts an image once for every sequence that sees it, shared or not.
    least = batch[-1] * images[-1] if on_npu else max_images
    num_images = max(run.batch, least) if choice.num_images is None else choice.num_images
    if num_images < least:
        needed = (f"{least}: {images[-1]} images for each of {batch[-1]} sequences, as an NPU's attention counts them"
                  if on_npu else f"the {least} images of one request")
        raise UserError(f"plan.num_images={num_images} must be at least {needed}.")
    return Plan(size, longest, prefill, batch, pages, images, free, pages_per_image, scratch, num_pages,
                num_images * pages_per_image)
