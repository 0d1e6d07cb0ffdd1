"""Page allocation and the image cache, each checked against a simple model of the pages' owners."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mllama_graph.plan.blocks import BlockPool, ImageCache, OutOfPages, SharedPages, page_digest, pages_for, slots

NUM_PAGES, RESERVED = 12, 2


class PoolMachine(RuleBasedStateMachine):
    """A BlockPool next to a list of the allocated pages."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_PAGES, reserved=RESERVED)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        free = self.pool.free
        if count > NUM_PAGES - RESERVED - sum(map(len, self.held)):
            with pytest.raises(OutOfPages):
                self.pool.allocate(count)
            assert self.pool.free == free, "a refused allocation took pages"
        else:
            pages = self.pool.allocate(count)
            assert len(pages) == count
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_page_is_free_or_held_once(self):
        out = [page for pages in self.held for page in pages]
        assert len(out) == len(set(out))
        assert all(RESERVED <= page < NUM_PAGES for page in out), "a scratch page was handed out"
        assert len(out) + self.pool.free == self.pool.capacity == NUM_PAGES - RESERVED


TestPool = PoolMachine.TestCase


def test_releasing_a_page_twice_fails_an_assertion():
    pool = BlockPool(4)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="not allocated"):
        pool.release(pages[:1])


def test_releasing_a_scratch_page_fails_an_assertion():
    with pytest.raises(AssertionError, match="not allocated"):
        BlockPool(4, reserved=1).release([0])


class SharedMachine(RuleBasedStateMachine):
    """SharedPages next to a list of each sequence's pages, and of what kept pages hold, least recently used first."""

    def __init__(self):
        super().__init__()
        self.pages = SharedPages(BlockPool(NUM_PAGES, reserved=RESERVED))
        self.held: list[tuple[str, list[int]]] = []
        self.kept: dict[bytes, int] = {}
        self.idle: list[bytes] = []

    def digests(self, text):
        return [text[:n].encode() for n in range(1, len(text) + 1)]

    @rule(text=st.text("ab", max_size=5))
    def begin(self, text):
        found = self.pages.find(self.digests(text))
        wanted = [self.kept.get(digest) for digest in self.digests(text)]
        assert found == wanted[: (wanted + [None]).index(None)]
        used = {page for _, pages in self.held for page in pages}
        new, idle = len(text) - len(found), [digest for digest in self.idle if self.kept[digest] not in found]
        room = NUM_PAGES - RESERVED - len(used | set(found))
        assert self.pages.free_beside(found) == room
        if new > room:
            with pytest.raises(OutOfPages):
                self.pages.allocate(new, found)
            return
        evicted = idle[: max(0, new - (room - len(idle)))]
        pages = self.pages.allocate(new, found)
        assert pages[: len(found)] == found and not used & set(pages[len(found) :])
        for digest in evicted:
            del self.kept[digest]
        self.idle = idle[len(evicted) :]
        self.held.append((text, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data):
        text, pages = data.draw(st.sampled_from(self.held))
        for digest, page in zip(self.digests(text), pages):
            self.pages.keep(page, digest)
            self.kept.setdefault(digest, page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        _, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pages.release(pages)
        used = {page for _, others in self.held for page in others}
        digests = {page: digest for digest, page in self.kept.items()}
        self.idle += [digests[page] for page in reversed(pages) if page in digests and page not in used]

    @invariant()
    def pages_are_free_or_used_or_kept(self):
        used = {page for _, pages in self.held for page in pages}
        assert self.pages.free == NUM_PAGES - RESERVED - len(used)
        assert self.pages.pool.free == NUM_PAGES - RESERVED - len(used | set(self.kept.values()))
        assert all(self.pages.find([digest]) == [page] for digest, page in self.kept.items())


TestSharedPages = SharedMachine.TestCase


def test_where_readers_count_a_shared_page_counts_for_each():
    pages = SharedPages(BlockPool(4), counts_readers=True)
    first = pages.allocate(2)
    pages.keep(first[0], b"a")
    assert pages.allocate(0, first[:1]) == first[:1] and pages.free == 1
    with pytest.raises(OutOfPages, match="1 pages needed, 0 of 4 free"):
        pages.allocate(1, first[:1])


def test_a_digest_follows_ids_pictures_and_what_precedes():
    pages = [
        (b"", (1, 2), []),
        (b"", (2, 1), []),
        (b"x", (1, 2), []),
        (b"", (1, 2), [(0, "a")]),
        (b"", (1, 2), [(1, "a")]),
        (b"", (1, 2), [(0, "a"), (1, "a")]),
        (b"", (1, 2), [(0, "b")]),
    ]
    assert len({page_digest(*page) for page in pages}) == len(pages)
    assert page_digest(*pages[3]) == page_digest(b"", [1, 2], iter([(0, "a")]))


PAGE, FULL, IMAGE_PAGES = 4, 5, 13
# Image -> tokens; the real tiles of some fill fewer than FULL pages.
IMAGES = {"a": 20, "b": 17, "c": 8, "d": 1, "e": 5}


class CacheMachine(RuleBasedStateMachine):
    """An ImageCache next to counts of users and a list of idle images, least recently used first."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(IMAGE_PAGES)
        self.cache = ImageCache(self.pool, PAGE, FULL)
        self.users: Counter[str] = Counter()
        self.encoded: set[str] = set()
        self.idle: list[str] = []

    def size(self, key):
        return pages_for(IMAGES[key], PAGE) if key in self.encoded else FULL

    @rule(key=st.sampled_from(sorted(IMAGES)))
    def acquire(self, key):
        known = self.users[key] > 0 or key in self.idle
        used = sum(self.size(k) for k in self.users if self.users[k])
        if not known and IMAGE_PAGES - used < FULL:
            before = (self.pool.free, {k: k in self.cache for k in IMAGES})
            with pytest.raises(OutOfPages):
                self.cache.acquire(key, IMAGES[key])
            assert before == (self.pool.free, {k: k in self.cache for k in IMAGES}), "a refusal took or evicted pages"
            return
        pages_before = set(self.cache[key].pages) if self.users[key] else None
        image = self.cache.acquire(key, IMAGES[key])
        self.users[key] += 1
        assert image.users == self.users[key] and image.tokens == IMAGES[key]
        assert image.encoded == (key in self.encoded), "an image's contents were forgotten or made up"
        assert pages_before is None or set(image.pages) == pages_before
        if known:
            self.idle = [k for k in self.idle if k != key]
            return
        # Idle images are evicted least recently used first.
        while self.idle and self.idle[0] not in self.cache:
            self.encoded.discard(self.idle.pop(0))
        assert all(k in self.cache for k in self.idle), "an image was evicted out of turn"

    @rule(key=st.sampled_from(sorted(IMAGES)))
    def trim(self, key):
        if self.users[key] and key not in self.encoded:
            first = self.cache[key].pages[: pages_for(IMAGES[key], PAGE)]
            self.cache.trim(key)
            self.encoded.add(key)
            assert self.cache[key].pages == first, "the pages of real tiles must stay where they are"

    @rule(key=st.sampled_from(sorted(IMAGES)))
    def release(self, key):
        if not self.users[key]:
            return
        self.cache.release(key)
        self.users[key] -= 1
        if not self.users[key] and key in self.encoded:
            self.idle.append(key)

    @invariant()
    def every_page_is_free_or_in_one_image(self):
        used = [page for key in self.users if self.users[key] for page in self.cache[key].pages]
        assert len(used) == len(set(used))
        kept = sum(self.size(key) for key in self.idle)
        assert len(used) + kept + self.pool.free == IMAGE_PAGES
        assert {key for key in IMAGES if key in self.cache} == set(self.idle) | {k for k in self.users if self.users[k]}


TestImageCache = CacheMachine.TestCase


def test_no_more_idle_images_are_evicted_than_needed():
    cache = ImageCache(BlockPool(9), PAGE, full_pages=3)
    for key in "abc":
        cache.acquire(key, 12)
        cache.trim(key)
        cache.release(key)
    cache.acquire("b", 12)
    cache.release("b")
    cache.acquire("d", 12)
    assert [key in cache for key in "abcd"] == [False, True, True, True]


@given(tokens=st.integers(0, 500), size=st.integers(1, 130))
def test_pages_for_is_the_smallest_sufficient_number(tokens, size):
    pages = pages_for(tokens, size)
    assert pages * size >= tokens > (pages - 1) * size


@given(size=st.integers(1, 9), data=st.data())
def test_slots_follow_the_sequence_through_its_pages(size, data):
    pages = data.draw(st.permutations(range(8)))[: data.draw(st.integers(1, 8))]
    start = data.draw(st.integers(0, len(pages) * size))
    count = data.draw(st.integers(0, len(pages) * size - start))
    everywhere = [page * size + offset for page in pages for offset in range(size)]
    assert slots(pages, start, count, size) == everywhere[start : start + count]
