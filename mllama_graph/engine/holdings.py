"""What sequences hold: pages of text K/V, and images. Full pages are kept for sequences that begin alike."""

from collections.abc import Sequence as Several

from mllama_graph.engine.sequence import Sequence, equal_pages
from mllama_graph.plan.blocks import BlockPool, ImageCache, OutOfPages, SharedPages, pages_for
from mllama_graph.plan.buckets import Plan


class Holdings:
    """The pools of a plan, and what sequences take from them.

    `prefix_cache`: full pages are kept when their sequence ends, and a sequence that begins with the same ids and
    images starts after them.
    """

    def __init__(self, plan: Plan, prefix_cache: bool):
        self.plan, self.prefix_cache = plan, prefix_cache
        self.pool = SharedPages(BlockPool(plan.num_pages, reserved=plan.scratch_pages), plan.counts_every_reader)
        self.images = ImageCache(BlockPool(plan.num_image_pages), plan.page_size, plan.pages_per_image)

    def take(self, sequence: Sequence, running: Several[Sequence]) -> bool:
        """Allocate pages for the prompt, its first token and its images; False and none if too few are free, or if the
        sequence waits for pages that one of `running` is computing.
        """
        size = self.plan.page_size
        # At least one token is computed, to get its logits.
        finds = self.prefix_cache and not sequence.unscored
        wanted = sequence.digests_of((sequence.length - 1) // size, size) if finds else []
        shared = self.pool.find(wanted)
        needed = pages_for(min(sequence.length + 1, self.plan.max_length), size) - len(shared)
        if self.pool.free_beside(shared) < needed or self._is_being_computed(wanted, len(shared), running):
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

    def missing(self, sequence: Sequence) -> int:
        """The number of pages that a decoding sequence lacks for its last token; 0 or below if it lacks none."""
        return pages_for(sequence.length, self.plan.page_size) - len(sequence.pages)

    def keep(self, sequence: Sequence) -> None:
        """Keep the pages of a sequence that are full and computed, for sequences that begin with the same tokens."""
        full = sequence.computed // self.plan.page_size
        if full > sequence.kept:
            digests = sequence.digests_of(full, self.plan.page_size)
            for page, digest in zip(sequence.pages[sequence.kept : full], digests[sequence.kept :]):
                self.pool.keep(page, digest)
            sequence.kept = full

    def release(self, sequence: Sequence) -> None:
        """Release the pages of a sequence, which is computed anew if it runs again."""
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.kept = [], 0, 0
        sequence.sent_pages, sequence.sent_images = 0, None

    def release_images(self, sequence: Sequence) -> None:
        """Release the images of a sequence."""
        if sequence.holds_images:
            for image in sequence.images:
                self.images.release(image.key)
            sequence.holds_images = False

    def _is_being_computed(self, wanted: list[bytes], found: int, running: Several[Sequence]) -> bool:
        """Whether a running prompt is computing so many of the wanted pages after those `found`, that waiting for its
        end costs at most twice what it saves; or a step that was not committed has computed them.
        """
        size = self.plan.page_size
        for other in running:
            if other.decoding and not other.keeps:
                continue
            # The last id of one that keeps its pages may not be known.
            theirs = other.digests_of(min(len(wanted), (other.length - other.keeps) // size), size)
            if other.left <= 2 * size * (equal_pages(wanted, theirs) - found):
                return True
        return False
