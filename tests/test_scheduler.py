"""The scheduler with a fake model that computes each id from (sequence, position), so that any mix-up shows."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from overlapping import serve as overlapped
from scheduling import (
    IMAGE_TOKEN,
    MAX_IMAGES,
    MAX_INPUT,
    MAX_NEW,
    SHAPE,
    expected,
    image,
    plans,
    serve,
    tight,
    workloads,
)
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from mllama_graph.core.config import PlanChoice
from mllama_graph.core.devices import CPU
from mllama_graph.core.errors import UserError
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, PrefillStep, VisionStep
from mllama_graph.inputs.request import Sampling
from mllama_graph.plan.make import Limits, make_plan


@given(plan=plans(), work=workloads(), data=st.data())
@settings(max_examples=150)
def test_every_request_gets_exactly_its_ids_whatever_the_plan(plan, work, data):
    late, prefix_cache = data.draw(st.integers(0, len(work))), data.draw(st.sampled_from([True, True, False]))
    served = serve(*plan, work, late=late, prefix_cache=prefix_cache)
    assert served.tokens == expected(work)
    assert prefix_cache or not served.scheduler.pool._digest


@given(plan=plans(), work=workloads(), data=st.data())
def test_nothing_leaks_and_spoiled_pages_are_never_shared(plan, work, data):
    spoiled = data.draw(st.frozensets(st.integers(0, len(work) - 1)))
    served, wanted = serve(*plan, work, spoiled=spoiled), expected(work)
    for id, tokens in served.tokens.items():
        cut = id in spoiled and len(wanted[id]) > 2
        assert tokens == (wanted[id][:2] + [NOT_FINITE] if cut else wanted[id])
    scheduler = served.scheduler
    assert scheduler.pool.free == scheduler.pool.capacity and not scheduler.pool._users
    images = scheduler.images
    assert not images._used
    assert images.pool.free + sum(len(entry.pages) for entry in images._idle.values()) == images.pool.capacity


@given(plan=plans(), work=workloads(), data=st.data())
def test_aborted_requests_leave_no_trace_on_the_others(plan, work, data):
    abort = data.draw(st.frozensets(st.integers(0, len(work) - 1)))
    served = serve(*plan, work, abort=abort)
    wanted = expected(work)
    for id, tokens in served.tokens.items():
        assert tokens == wanted[id][: len(tokens)] if id in abort else tokens == wanted[id]
    assert served.scheduler.pool.free == served.scheduler.pool.capacity and not served.scheduler.images._used


@given(plan=plans(), work=workloads(), data=st.data())
def test_steps_decided_ahead_give_every_request_its_ids_and_leak_nothing(plan, work, data):
    some = st.frozensets(st.integers(0, len(work) - 1))
    abort, spoiled = data.draw(some), data.draw(some)
    stops = {id: data.draw(st.integers(1, 4)) for id in data.draw(some)}
    late, always = data.draw(st.integers(0, len(work))), data.draw(st.booleans())
    prefix_cache = data.draw(st.sampled_from([True, True, False]))
    random = data.draw(st.randoms(use_true_random=False))
    served, _ = overlapped(
        *plan, work, lambda: always or random.random() < 0.5, late, abort, spoiled, stops, prefix_cache
    )
    for id, tokens in served.tokens.items():
        wanted = expected(work)[id]
        if id in spoiled and len(wanted) > 2:
            wanted = wanted[:2] + [NOT_FINITE]
        wanted = wanted[: stops.get(id)]
        assert tokens == (wanted[: len(tokens)] if id in abort else wanted)
    scheduler = served.scheduler
    assert scheduler.pool.free == scheduler.pool.capacity and not scheduler.pool._users and not scheduler._leaving
    assert not scheduler.images._used


@given(length=st.integers(1, 60), data=st.data())
@settings(max_examples=300)
def test_visibility_is_that_of_hugging_face(length, data):
    places = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=8)))
    ids = [IMAGE_TOKEN if at in places else 1 for at in range(length)]
    sequence = Sequence(0, tuple(ids), tuple(image("a") for _ in places), tuple(places), 5, Sampling())
    spans = get_cross_attention_token_mask(ids, IMAGE_TOKEN)
    for position in range(length):
        # An end of -1 stands for the end of the text.
        seen = [n for n, (begin, end) in enumerate(spans) if begin <= position and (end == -1 or position < end)]
        assert list(range(*sequence.visible(position))) == seen
    for position in range(length, length + 5):
        assert sequence.visible(position) == sequence.visible(length - 1), (
            "a new token sees what the last prompt row sees"
        )


def test_the_youngest_is_preempted_and_resumes_where_it_was():
    work = [((1,) * 20, (), 20), ((2,) * 20, (), 20)]
    served = serve(tight(), 3, work)
    assert served.tokens == expected(work)
    assert served.scheduler.preemptions > 0
    prompts = [row for step in served.steps if isinstance(step, PrefillStep) for row in step.rows]
    again = [row for row in prompts if row.sequence == 1]
    assert len([row for row in prompts if row.sequence == 0]) == 1
    assert len(again) > 1 and again[-1].start + len(again[-1].ids) > 20, (
        "the resumed prompt must hold the generated ids"
    )
    assert again[-1].start > 0, "pages of a preempted sequence that nobody took are found again"


def test_a_shared_image_is_encoded_once():
    work = [((IMAGE_TOKEN, 1, 2), (image("a"),), 4)] * 5
    steps = serve(tight(), 3, work).steps
    assert sum(isinstance(step, VisionStep) for step in steps) == 1


def test_decoding_goes_on_between_the_chunks_of_a_long_prompt():
    work = [((1,) * 3, (), 20), ((2,) * 40, (), 2)]
    steps = serve(tight(prefill_tokens=[8], num_pages=40), 3, work).steps
    kinds = [type(step) for step in steps]
    chunks = [n for n, step in enumerate(steps) if isinstance(step, PrefillStep) and step.rows[0].sequence == 1]
    assert len(chunks) == 5
    assert all(kinds[n + 1] is DecodeStep for n in chunks[:-1])


@pytest.mark.parametrize("plan", [{"free": True}, {"mixed_tokens": [8]}, {"mixed_tokens": [3, 30]}])
def test_a_long_prompt_is_computed_beside_the_decoding_sequences(plan):
    work = [((1,) * 3, (), 20), ((2,) * 40, (), 2)]
    first, *steps = serve(tight(step_tokens=9, num_pages=40, **plan), 3, work, late=1).steps
    # The second prompt arrives after three steps.
    chunks = [step for step in steps if isinstance(step, PrefillStep)]
    assert [(step.decoding, len(step.rows[-1].ids)) for step in chunks] == [(1, 8)] * 5
    assert all(step.rows[0].sequence == 0 for step in steps)


@pytest.mark.parametrize("free", [False, True])
@given(st.integers(1, 6), st.integers(0, 30), st.booleans())
def test_a_short_prompt_that_arrives_gets_its_chunk_in_the_next_prefill_step(free, short, steps, seen):
    plan = make_plan(PlanChoice(page_size=4), Limits(3, 400, MAX_NEW, MAX_IMAGES, 8), SHAPE, CPU.paging, free)
    scheduler = Scheduler(plan, 3)
    for id, (length, new) in enumerate([(3, 1000), (400, 5)]):
        scheduler.add(Sequence(id, (1,) * length, (), (), min(new, MAX_NEW), Sampling()))
    while scheduler.running[1:] == [] or not scheduler.running[1].computed or (steps := steps - 1) > 0:
        step = scheduler.next()
        scheduler.commit((7,) * len(step.rows) if isinstance(step, DecodeStep) else (7,) * step.sampled)
    images = (image("a"),) if seen else ()
    scheduler.add(Sequence(2, (2,) * short, images, (0,) * len(images), 5, Sampling()))
    kinds = []
    while not (kinds and 2 in [row.sequence for row in step.rows]):
        step = scheduler.next()
        ids = () if isinstance(step, VisionStep) else (7,) * len(step.rows)
        scheduler.commit(ids[: step.sampled] if isinstance(step, PrefillStep) else ids)
        kinds.append(type(step))
    # An image is encoded first, after one more chunk of the long prompt at most.
    assert kinds.count(PrefillStep) <= 1 + seen


def served_first(work, plan, batch, **options) -> list[int]:
    """The sequences in order of their first rows."""
    steps = serve(plan, batch, work, **options).steps
    return [*dict.fromkeys(row.sequence for step in steps for row in step.rows)]


def test_first_come_first_served():
    assert served_first([((n,) * 30, (), 1) for n in range(6)], tight(), 1) == [*range(6)]


@given(priorities=st.lists(st.integers(-2, 2), min_size=2, max_size=6), free=st.booleans())
def test_higher_priorities_are_served_first(priorities, free):
    work = [((n,) * 20, (), 3, priority) for n, priority in enumerate(priorities)]
    wanted = sorted(range(len(work)), key=lambda n: -priorities[n])
    assert served_first(work, tight(free=free), 1) == wanted


def test_the_lowest_priority_is_preempted():
    work = [((1,) * 20, (), 20, -1), ((2,) * 20, (), 20, 0)]
    served = serve(tight(), 3, work, prefix_cache=False)
    assert served.tokens == expected(work) and served.scheduler.preemptions > 0
    begun = [row.sequence for step in served.steps for row in step.rows if row.start == 0]
    assert begun.count(0) > 1 and begun.count(1) == 1


@pytest.mark.parametrize(
    "prompt, new, images, message",
    [
        (MAX_INPUT + 1, MAX_NEW, 0, "41 prompt ids and 20 new ones are 61 tokens; the plan holds 60"),
        (5, 5, MAX_IMAGES + 1, "4 images in one request; the plan holds 3"),
    ],
)
def test_a_request_that_never_fits_is_refused_at_once(prompt, new, images, message):
    scheduler = Scheduler(tight(), 3)
    sequence = Sequence(0, (1,) * prompt, (image("a"),) * images, tuple(range(images)), new, Sampling())
    with pytest.raises(UserError, match=message):
        scheduler.add(sequence)
    assert scheduler.idle


def size_of_decode_step(prompt: int) -> int:
    """Bytes of one decode step, as it is sent to worker ranks, of a sequence with a prompt of the given length."""
    plan = make_plan(PlanChoice(page_size=16), Limits(1, 8192, MAX_NEW, MAX_IMAGES), SHAPE, CPU.paging, False)
    scheduler = Scheduler(plan, 1)
    scheduler.add(Sequence(0, (IMAGE_TOKEN, *[1] * (prompt - 1)), (image("a"),), (0,), MAX_NEW, Sampling()))
    while not isinstance(step := scheduler.next(), DecodeStep):
        scheduler.commit((7,) if isinstance(step, PrefillStep) and step.sampled else ())
    scheduler.commit((7,))
    return len(pickle.dumps(scheduler.next()))


def test_a_decode_step_sends_what_changed_and_no_history():
    # A pickled integer takes 1 to 5 bytes, and a row has a few of them.
    assert size_of_decode_step(8000) < size_of_decode_step(20) + 50
