"""Page allocation and the image cache, each checked against a simple model of the pages' owners."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mllama_graph.plan.blocks import BlockPool, ImageCache, OutOfPages, pages_for, slots

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
