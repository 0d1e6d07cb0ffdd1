"""Makes a run's bucket plan from its configuration and limits. Integers only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mllama_graph.core.config import PlanChoice
from mllama_graph.core.devices import Paging
from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.blocks import pages_for
from mllama_graph.plan.buckets import Plan

# The ratio of successive sizes in a ladder. It is large to keep the number of graphs small.
LADDER = 4
SMALLEST_PREFILL = 32
LARGEST_PREFILL = 2048
# The most tokens of a step while sequences decode, or twice the batch if that is more, where lengths are data and
# prompts are computed beside them: until measured times decide (engine/pace.py).
MIXED_TOKENS = 12
# The most sequences of a packed prefill where shapes are compiled.
PACKED_ROWS = 8
# The most rows of a decode step with proposals where lengths are data, unless the batch is larger: beyond, a step takes
# time in proportion to its rows, and few proposals pay.
SPECULATIVE_ROWS = 16


def ladder(low: int, high: int, factor: int = LADDER) -> tuple[int, ...]:
    """low, low * factor, ... up to and including high."""
    sizes, size = [], min(low, high)
    while size < high:
        sizes.append(size)
        size *= factor
    return (*sizes, high)


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

    if not shape.sees:
        limits = replace(limits, max_images=0)

    def pages_ladder(top: int) -> tuple[int, ...]:
        return (top,) if lengths_are_free else ladder(1, top)

    prefill = _sizes("prefill_tokens", choice.prefill_tokens, ladder(SMALLEST_PREFILL, chunk), 1)
    # Where lengths are free, absent sequences are too: one size, so that no graph is added.
    packed = (limits.batch,) if lengths_are_free else (1, min(PACKED_ROWS, limits.batch))
    rows = _sizes("prefill_rows", choice.prefill_rows, tuple(sorted(set(packed))), 1)
    if not lengths_are_free:
        # A long prompt is prefilled by itself.
        rows = tuple(sorted({1, *rows}))
    mixed = () if lengths_are_free else _mixed_sizes(choice, limits, paging, chunk)
    decode = ladder(1, limits.batch)
    if lengths_are_free and limits.proposals:
        most = min(limits.batch * (1 + limits.proposals), SPECULATIVE_ROWS)
        decode = tuple(sorted({*decode, max(most, limits.batch)}))
    batch = _sizes("decode_batch", choice.decode_batch, decode, limits.batch)
    pages = _sizes("pages", choice.pages, pages_ladder(widest), widest)
    images = _sizes("images", choice.images, pages_ladder(limits.max_images), limits.max_images)
    # Each padded token row writes to its own slot in the scratch pages, so that slots are unique.
    decoded = batch[-1] * (1 if lengths_are_free else 1 + limits.proposals)
    scratch = pages_for(max(prefill[-1], decoded, batch[-1] + max(mixed, default=0)), size)
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
        mixed,
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


def _mixed_sizes(choice: PlanChoice, limits: Limits, paging: Paging, chunk: int) -> tuple[int, ...]:
    """Prompt tokens beside decoding sequences: by default one size, within max_step_tokens. A single sequence in flight
    has no prompt beside it.
    """
    most = min(paging.mixed_tokens, chunk, limits.step_tokens or chunk)
    sizes = _sizes("mixed_tokens", choice.mixed_tokens or None, (most,), 1)
    return sizes if limits.batch > 1 and choice.mixed_tokens != [] and sizes != (0,) else ()


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
