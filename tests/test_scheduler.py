"""The scheduler with a fake model that computes each id from (sequence, position), so that any mix-up shows."""

import hashlib
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from checkpoints import SPECS, model_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from mllama_graph.core.config import PlanChoice
from mllama_graph.core.devices import CPU
from mllama_graph.core.errors import UserError
from mllama_graph.engine.batch import Sequences, needs
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import DecodeStep, PrefillStep, VisionStep
from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Sampling
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.blocks import pages_for, slots
from mllama_graph.plan.buckets import Limits, make_plan

SHAPE = shape_of(model_config(SPECS["base"]))
TILE = SHAPE.vision.tokens
IMAGE_TOKEN = SHAPE.image_token
MAX_INPUT, MAX_NEW, MAX_IMAGES = 40, 20, 3


def answer(sequence: int, position: int) -> int:
    """The fake model's id at a position of a sequence, which depends on nothing else in the batch."""
    return int.from_bytes(hashlib.sha256(f"{sequence}/{position}".encode()).digest()[:2])


def image(name: str) -> TiledImage:
    return TiledImage(np.zeros((1 + ord(name) % SHAPE.vision.max_tiles, 0), np.uint8), 1, name)


def tokens(image: TiledImage) -> int:
    return image.count * TILE


@st.composite
def workloads(draw):
    """A list of (prompt ids, images, new tokens, priority); there are five images, so that requests share them."""
    work = []
    for number in range(draw(st.integers(1, 7))):
        length = draw(st.integers(1, MAX_INPUT))
        places = sorted(draw(st.sets(st.integers(0, length - 1), max_size=MAX_IMAGES)))
        ids = [IMAGE_TOKEN if at in places else answer(number, at) % 100 for at in range(length)]
        images = tuple(image(draw(st.sampled_from("abcde"))) for _ in places)
        work.append((tuple(ids), images, draw(st.integers(1, MAX_NEW)), draw(st.sampled_from((0, 0, 0, 1, -3)))))
    return work


@st.composite
def plans(draw):
    """A plan with pools down to the least that one request needs, so that preemption and eviction are common."""
    page = draw(st.sampled_from([1, 3, 4, 16, 64]))
    least = pages_for(MAX_INPUT + MAX_NEW, page)
    batch = draw(st.integers(1, 4))
    choice = PlanChoice(
        page_size=page,
        num_pages=least + draw(st.integers(0, 2 * least)),
        num_images=draw(st.integers(MAX_IMAGES, 5)),
        prefill_tokens=draw(st.sampled_from([None, [5], [2, 16], [40]])),
    )
    limits = Limits(batch, MAX_INPUT, MAX_NEW, MAX_IMAGES, draw(st.sampled_from([None, batch, 7, 30])))
    return make_plan(choice, limits, SHAPE, CPU.paging, draw(st.booleans())), batch


@dataclass
class Served:
    """The tokens, steps and scheduler of a simulated run."""

    tokens: dict[int, list[int]]
    steps: list
    scheduler: Scheduler


def serve(plan, batch, work, late=0, abort=frozenset()) -> Served:
    """Run a workload to its end, checking every step; the last `late` requests join between steps."""
    scheduler, steps, ranks = Scheduler(plan, batch), [], Sequences()
    sequences = [
        Sequence(
            n,
            ids,
            images,
            tuple(at for at, id in enumerate(ids) if id == IMAGE_TOKEN),
            new,
            Sampling(seed=n),
            *priority,
        )
        for n, (ids, images, new, *priority) in enumerate(work)
    ]
    waiting = sequences[len(sequences) - late :]
    for sequence in sequences[: len(sequences) - late]:
        scheduler.add(sequence)
    skipped: set[int] = set()
    written: dict[int, tuple[int, int]] = {}  # slot -> (sequence, position) whose K/V it holds
    encoded: dict[int, tuple[str, int]] = {}  # image page -> (image, which of its pages)
    while waiting or not scheduler.idle:
        if waiting and (scheduler.idle or len(steps) % 3 == 0):
            scheduler.add(waiting.pop(0))
        owed = {sequence.id for sequence in scheduler.running if sequence.decoding} if steps else set()
        step = scheduler.next()
        assert step is not None, "work is left and nothing is done"
        steps.append(step)
        # A sequence that decodes gets a token in this step or the next, unless it is preempted.
        got = {row.sequence for row in step.rows} if isinstance(step, DecodeStep) else set()
        if isinstance(step, PrefillStep):
            got = {row.sequence for row in step.rows[: step.decoding]}
        running = {sequence.id for sequence in scheduler.running}
        assert not (skipped & owed & running) - got, "a sequence that decodes gets nothing in two steps"
        skipped = (owed & running) - got
        ranks.update(step)
        ids = model(step, plan, scheduler, sequences, ranks, written, encoded)
        for sequence, _ in scheduler.commit(ids):
            if len(sequence.generated) == sequence.max_new:
                scheduler.finish(sequence)
        for id in [id for id in abort if len(steps) > 4 * id]:
            scheduler.abort(id)
        assert len(steps) < 5000, "the scheduler makes no progress"
    return Served({s.id: s.generated for s in sequences}, steps, scheduler)


def model(step, plan, scheduler, sequences, ranks, written, encoded) -> tuple[int, ...]:
    """Simulates a rank: checks a step's inputs, records its writes to pages, returns an id for each row."""
    if isinstance(step, VisionStep):
        assert len(step.pages) == len(set(step.pages)) == plan.pages_per_image
        encoded.update({page: (step.image.key, n) for n, page in enumerate(step.pages)})
        return ()
    rows = step.rows
    bucket = needs(plan, step)
    assert bucket in plan.buckets()
    if isinstance(step, PrefillStep):
        check_budget(step, plan, scheduler, sequences)
    assert len({row.sequence for row in rows}) == len(rows) <= scheduler.batch
    live = [page for sequence in scheduler.running for page in sequence.pages]
    assert len(live) == len(set(live)), "two live sequences share a page"
    # Ranks learn the block tables only from the steps.
    tables = {row.sequence: ranks[row].pages.tolist() for row in rows}
    for row in rows:
        assert tables[row.sequence] == sequences[row.sequence].pages
        assert row.used_pages == pages_for(row.start + len(row.ids), plan.page_size)
    fresh = [slot for row in rows for slot in slots(tables[row.sequence], row.start, len(row.ids), plan.page_size)]
    assert len(fresh) == len(set(fresh)), "two rows write to one slot"
    assert all(slot >= plan.scratch_pages * plan.page_size for slot in fresh), "a row writes to scratch"
    for row in rows:
        check_row(row, plan, sequences[row.sequence], ranks[row], written, encoded)
        written.update(
            {
                slot: (row.sequence, position)
                for position, slot in enumerate(
                    slots(tables[row.sequence], row.start, len(row.ids), plan.page_size), start=row.start
                )
            }
        )
    if isinstance(step, PrefillStep):
        rows = rows[: step.sampled]
    return tuple(answer(row.sequence, row.start + len(row.ids)) for row in rows)


def check_budget(step, plan, scheduler, sequences) -> None:
    """Checks the size of a prefill step, and the order of its rows."""
    decoding = {sequence.id for sequence in scheduler.running if sequence.decoding}
    assert {row.sequence for row in step.rows[: step.decoding]} == (decoding if step.decoding else set())
    assert step.decoding == 0 or plan.lengths_are_free
    ends = [row.start + len(row.ids) == sequences[row.sequence].length for row in step.rows]
    assert ends == [True] * step.sampled + [False] * (len(ends) - step.sampled)
    # One prompt token is computed even if decoding sequences fill the budget.
    assert not decoding or sum(len(row.ids) for row in step.rows) <= max(plan.step_tokens, step.decoding + 1)


def check_row(row, plan, sequence, known, written, encoded) -> None:
    """Checks a row's ids, its earlier K/V, and the image pages that each new token sees."""
    assert row.ids == (*sequence.prompt, *sequence.generated)[row.start : row.start + len(row.ids)]
    assert known.sampling == sequence.sampling
    for position, slot in enumerate(slots(known.pages.tolist(), 0, row.start, plan.page_size)):
        assert written[slot] == (sequence.id, position), "earlier K/V were overwritten or never written"
    assert row.image_pages == len(known.image_pages) == len(known.image_fill)
    see = row.see or [(0, row.image_pages)] * len(row.ids)
    for (low, high), position in zip(see, range(row.start, row.start + len(row.ids)), strict=True):
        got = [(*encoded[page], fill) for page, fill in zip(known.image_pages[low:high], known.image_fill[low:high])]
        first, last = sequence.visible(position)
        size = plan.page_size
        assert got == [
            (seen.key, n, min(size, tokens(seen) - n * size))
            for seen in sequence.images[first:last]
            for n in range(pages_for(tokens(seen), size))
        ]


def expected(work) -> dict[int, list[int]]:
    return {n: [answer(n, len(ids) + k) for k in range(new)] for n, (ids, _, new, *_) in enumerate(work)}


@given(plan=plans(), work=workloads(), data=st.data())
@settings(max_examples=150)
def test_every_request_gets_exactly_its_ids_whatever_the_plan(plan, work, data):
    served = serve(*plan, work, late=data.draw(st.integers(0, len(work))))
    assert served.tokens == expected(work)


@given(plan=plans(), work=workloads())
def test_nothing_leaks(plan, work):
    scheduler = serve(*plan, work).scheduler
    assert scheduler.pool.free == scheduler.pool.capacity
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


def tight(free=False, step_tokens=None, **choice):
    """A plan whose pages can't hold two sequences of the maximum length; `free`: for kernels that take lengths."""
    choice = PlanChoice(**({"page_size": 4, "num_pages": 16, "num_images": 3} | choice))
    return make_plan(choice, Limits(3, MAX_INPUT, MAX_NEW, MAX_IMAGES, step_tokens), SHAPE, CPU.paging, free)


def test_the_youngest_is_preempted_and_resumes_where_it_was():
    work = [((1,) * 20, (), 20), ((2,) * 20, (), 20)]
    served = serve(tight(), 3, work)
    assert served.tokens == expected(work)
    assert served.scheduler.preemptions > 0
    prompts = [row for step in served.steps if isinstance(step, PrefillStep) for row in step.rows]
    again = [row for row in prompts if row.sequence == 1]
    assert len([row for row in prompts if row.sequence == 0]) == 1
    assert len(again) > 1 and len(again[-1].ids) > 20, "the resumed prompt must hold the generated ids"


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


def test_a_long_prompt_is_computed_beside_the_decoding_sequences():
    work = [((1,) * 3, (), 20), ((2,) * 40, (), 2)]
    first, *steps = serve(tight(free=True, step_tokens=9, num_pages=40), 3, work, late=1).steps
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
    scheduler.add(Sequence(2, (1,) * short, images, (0,) * len(images), 5, Sampling()))
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
    served = serve(tight(), 3, work)
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
