"""Allocation of K/V pages. Integers only: each rank owns the tensors that the page numbers index (engine/rank.py)."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b


class OutOfPages(Exception):
    """The pool has too few free pages; the scheduler waits or preempts a sequence."""


class BlockPool:
    """A free list of pages. Pages below `reserved` are scratch pages, which are never allocated."""

    def __init__(self, num_pages: int, reserved: int = 0):
        assert 0 <= reserved <= num_pages
        self.num_pages, self.reserved = num_pages, reserved
        # The lowest page is last, so that pop() returns low pages first and runs are reproducible.
        self._free = list(range(num_pages - 1, reserved - 1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        return self.num_pages - self.reserved

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises OutOfPages and takes none where fewer are free."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages needed, {len(self._free)} of {self.capacity} free")
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Return pages to the pool. All of them must be allocated."""
        for page in pages:
            assert page in self._taken, f"page {page} is not allocated"
            self._taken.remove(page)
            self._free.append(page)


def pages_for(tokens: int, page_size: int) -> int:
    """The number of pages that hold `tokens` tokens; the last page may be partly filled."""
    return -(-tokens // page_size)


def slots(pages: Sequence[int], start: int, count: int, page_size: int) -> list[int]:
    """The slots of positions start .. start + count - 1 of a sequence with the block table `pages`."""
    return [pages[t // page_size] * page_size + t % page_size for t in range(start, start + count)]


def page_digest(parent: bytes, ids: Sequence[int], images: Iterable[tuple[int, str]]) -> bytes:
    """The digest of a full page of text K/V: of its ids, its images as (position, key), and all that precedes it.

    K/V of a position depend on the ids and on the images that it and earlier positions see. Those follow from the image
    tokens up to it (engine/scheduler.py, Sequence.visible). `parent`: the digest of the page before; empty for none.
    """
    digest = blake2b(parent, digest_size=16)
    digest.update(array("i", ids))
    for position, key in images:
        digest.update(f"{position} {key};".encode())
    return digest.digest()


class SharedPages:
    """Pages of text K/V, with the number of sequences that use each.

    A full page may be kept under the digest of its contents. It is then never written again, may be used by other
    sequences, and stays in the pool without users until its page is needed; the least recently used goes first.
    `counts_readers`: a page counts once for each user (core/devices.py, Paging.counts_every_reader).
    """

    def __init__(self, pool: BlockPool, counts_readers: bool = False):
        self.pool, self.counts_readers = pool, counts_readers
        self._users: dict[int, int] = {}
        self._readers = 0
        self._page: dict[bytes, int] = {}
        self._digest: dict[int, bytes] = {}
        # Kept pages without users, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def capacity(self) -> int:
        return self.pool.capacity

    @property
    def free(self) -> int:
        """The number of pages that can be allocated, kept pages without users included."""
        return self.capacity - self._readers if self.counts_readers else self.pool.free + len(self._idle)

    def free_beside(self, shared: Sequence[int]) -> int:
        """The number of pages that can be allocated once kept pages have one more user each; may be negative."""
        return self.free - (len(shared) if self.counts_readers else sum(page in self._idle for page in shared))

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The kept pages of the longest run of digests, from the first."""
        pages = []
        for digest in digests:
            if (page := self._page.get(digest)) is None:
                break
            pages.append(page)
        return pages

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int]:
        """Add a user to the kept pages `shared`, and take `count` pages. Returns both, shared pages first.

        Raises OutOfPages and takes none where fewer are free.
        """
        if count > (free := self.free_beside(shared)):
            raise OutOfPages(f"{count} pages needed, {free} of {self.capacity} free")
        for page in shared:
            self._idle.pop(page, None)
        while self.pool.free < count:
            oldest, _ = self._idle.popitem(last=False)
            del self._page[self._digest.pop(oldest)]
            self.pool.release([oldest])
        pages = [*shared, *self.pool.allocate(count)]
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
        self._readers += len(pages)
        return pages

    def keep(self, page: int, digest: bytes) -> None:
        """Keep a full page under a digest, unless another page is kept under it. Nothing may be written to it again."""
        assert page in self._users, f"page {page} is not allocated"
        if digest not in self._page and page not in self._digest:
            self._page[digest], self._digest[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """Remove a user of each page of a sequence. Pages without users are idle if they are kept, else free."""
        # A page is of no use without those before it, so the last is the first to be evicted.
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self.pool.release([page])
        self._readers -= len(pages)


@dataclass
class ImagePages:
    """The K/V pages of one image, shared by all requests that use it. `tokens`: image tokens of its real tiles."""

    tokens: int
    pages: list[int]
    users: int = 1
    encoded: bool = False


class ImageCache:
    """Image K/V pages by the image's hash: shared while in use, then kept until their pages are needed.

    An image takes `full_pages` pages while it is encoded, padding tiles included. `trim` releases the pages of padding
    tiles after the vision graph has run, since no text row attends to them.
    """

    def __init__(self, pool: BlockPool, page_size: int, full_pages: int):
        self.pool, self.page_size, self.full_pages = pool, page_size, full_pages
        self._used: dict[str, ImagePages] = {}
        self._idle: OrderedDict[str, ImagePages] = OrderedDict()

    def __getitem__(self, key: str) -> ImagePages:
        return self._used[key]

    def __contains__(self, key: str) -> bool:
        return key in self._used or key in self._idle

    def acquire(self, key: str, tokens: int) -> ImagePages:
        """Add a user to an image and return its pages. `encoded` says whether they hold the image's K/V yet.

        Raises OutOfPages where evicting every idle image would still free too few pages.
        """
        if key in self._used:
            image = self._used[key]
            image.users += 1
            return image
        if key in self._idle:
            image = self._used[key] = self._idle.pop(key)
            image.users = 1
            return image
        idle = sum(len(image.pages) for image in self._idle.values())
        if self.pool.free + idle < self.full_pages:
            raise OutOfPages(f"{self.full_pages} image pages needed, {self.pool.free} free and {idle} idle")
        while self.pool.free < self.full_pages:
            _, oldest = self._idle.popitem(last=False)
            self.pool.release(oldest.pages)
        image = self._used[key] = ImagePages(tokens, self.pool.allocate(self.full_pages))
        return image

    def trim(self, key: str) -> None:
        """Mark an image as encoded and release the pages of its padding tiles."""
        image = self._used[key]
        keep = pages_for(image.tokens, self.page_size)
        self.pool.release(image.pages[keep:])
        del image.pages[keep:]
        image.encoded = True

    def release(self, key: str) -> None:
        """Remove a user of an image. An encoded image without users stays, as the most recently used idle image."""
        image = self._used[key]
        image.users -= 1
        if image.users == 0:
            del self._used[key]
            if image.encoded:
                self._idle[key] = image
            else:
                self.pool.release(image.pages)
