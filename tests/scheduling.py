"""A scheduler with a fake model that computes each id from (sequence, position), so that any mix-up shows."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from checkpoints import SPECS, model_config
from hypothesis import strategies as st

from mllama_graph.core.config import PlanChoice
from mllama_graph.core.devices import CPU
from mllama_graph.engine.batch import Sequences, needs
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, PrefillStep, Token, VisionStep, agreed
from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Sampling
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.blocks import pages_for, slots
from mllama_graph.plan.make import Limits, make_plan

SHAPE = shape_of(model_config(SPECS["base"]))
TILE = SHAPE.vision.tokens
IMAGE_TOKEN = SHAPE.image_token
MAX_INPUT, MAX_NEW, MAX_IMAGES = 40, 20, 3


def answer(sequence: int, position: int) -> int:
    """The fake model's id at a position of a sequence, which depends on nothing else in the batch."""
    id = int.from_bytes(hashlib.sha256(f"{sequence}/{position}".encode()).digest()[:2])
    return id + (id == IMAGE_TOKEN)


def image(name: str) -> TiledImage:
    return TiledImage(np.zeros((1 + ord(name) % SHAPE.vision.max_tiles, 0), np.uint8), 1, name)


def tokens(image: TiledImage) -> int:
    return image.count * TILE


@st.composite
def workloads(draw):
    """A list of (prompt ids, images, new tokens, priority); there are five images, so that requests share them.

    Some begin as an earlier one does, or as its next turn, with the same pictures or others.
    """
    work = []
    for number in range(draw(st.integers(1, 7))):
        length = draw(st.integers(1, MAX_INPUT))
        places = sorted(draw(st.sets(st.integers(0, length - 1), max_size=MAX_IMAGES)))
        ids = [IMAGE_TOKEN if at in places else answer(number, at) % 100 for at in range(length)]
        images = [image(draw(st.sampled_from("abcde"))) for _ in places]
        if work and draw(st.booleans()):
            earlier = draw(st.integers(0, number - 1))
            before, shown, new, _ = work[earlier]
            before = (before + tuple(answer(earlier, len(before) + n) for n in range(new)))[: draw(st.integers(1, 60))]
            ids = [*before, *(id for id in ids if id != IMAGE_TOKEN)][:MAX_INPUT]
            images = list(shown[: ids.count(IMAGE_TOKEN)])
            if images and draw(st.booleans()):
                images[draw(st.integers(0, len(images) - 1))] = image(draw(st.sampled_from("abcde")))
        priority = draw(st.sampled_from((0, 0, 0, 1, -3)))
        work.append((tuple(ids), tuple(images), draw(st.integers(1, MAX_NEW)), priority))
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
        prefill_rows=draw(st.sampled_from([None, [1]])),
        mixed_tokens=draw(st.sampled_from([[], [6], [3, 30]])),
    )
    proposals = draw(st.integers(0, 3))
    limits = Limits(batch, MAX_INPUT, MAX_NEW, MAX_IMAGES, draw(st.sampled_from([None, batch, 7, 30])), proposals)
    plan = make_plan(choice, limits, SHAPE, CPU.paging, draw(st.booleans()))
    return replace(plan, counts_every_reader=draw(st.booleans())), batch


@dataclass
class Served:
    """The tokens, steps and scheduler of a simulated run."""

    tokens: dict[int, list[int]]
    steps: list
    scheduler: Scheduler


def serve(plan, batch, work, late=0, abort=frozenset(), spoiled=frozenset(), prefix_cache=True) -> Served:
    """Run a workload to its end, checking every step; the last `late` requests join between steps.

    The third token of a `spoiled` request can't be sampled. As many ids are proposed as the plan has room for; two of
    three are right. A request whose proposals came before a token that can't be sampled gets none any more. Every
    third request wants log-probabilities of its prompt, where steps can give them.
    """
    alone: set[int] = set()

    def propose(decoding):
        found, room = {}, plan.decode_batch[-1] - len(decoding) if plan.lengths_are_free else MAX_NEW * batch
        for one in decoding:
            most = min(plan.row_tokens - 1, one.max_new - len(one.generated) - 1, room)
            ids = [answer(one.id, one.length + n) for n in range(most if one.id not in alone else 0)]
            found[one.id] = tuple(id if (one.length + n) % 3 else id + 1 for n, id in enumerate(ids))
            room -= len(ids)
        return found

    scheduler, steps, ranks = Scheduler(plan, batch, prefix_cache, propose), [], Sequences()
    sequences = [
        Sequence(
            n,
            ids,
            images,
            tuple(at for at, id in enumerate(ids) if id == IMAGE_TOKEN),
            new,
            Sampling(seed=n),
            *priority,
            unscored=len(ids) - 1 if plan.lengths_are_free and n % 3 == 2 else 0,
        )
        for n, (ids, images, new, *priority) in enumerate(work)
    ]
    waiting = sequences[len(sequences) - late :]
    for sequence in sequences[: len(sequences) - late]:
        scheduler.add(sequence)
    skipped: set[int] = set()
    scores: dict[int, list[int]] = {}
    wanted = {one.id: list(one.prompt[1:]) for one in sequences if one.unscored}
    written: dict[int, tuple[int, type]] = {}  # slot -> K/V that it holds (contents), and the step that wrote them
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
        ids = sample(step, ids, plan, sequences, ranks, written, spoiled)
        found = agreed(step, [Token(id) for id in ids])
        alone |= {row.sequence for row, count in zip(step.rows, found.counts) if not count}
        for number, tokens in found.scored:
            scores.setdefault(number, []).extend(token.id for token in tokens)
        for sequence, id in scheduler.commit(tuple(token.id for token in found.new), found.counts):
            assert scores.get(sequence.id, []) == wanted.get(sequence.id, []), "a prompt was not scored just once"
            if sequence in scheduler.running and len(sequence.generated) == sequence.max_new or id == NOT_FINITE:
                scheduler.finish(sequence)
        for id in [id for id in abort if len(steps) > 4 * id]:
            scheduler.abort(id)
        assert len(steps) < 5000, "the scheduler makes no progress"
    return Served({s.id: s.generated for s in sequences}, steps, scheduler)


def contents(sequence, proposal=()) -> list[int]:
    """What the K/V at each position of a sequence depend on, hashed: its ids and the images that each of them sees."""
    known, found = 0, []
    for position, id in enumerate((*sequence.prompt, *sequence.generated, *proposal)):
        first, last = sequence.visible(position)
        known = hash((known, id, tuple(seen.key for seen in sequence.images[first:last])))
        found.append(known)
    return found


def sample(step, ids, plan, sequences, ranks, written, spoiled) -> tuple[int, ...]:
    """The ids of a step, NOT_FINITE for spoiled requests, whose pages are cleared as a rank does."""
    sampled, end = list(ids), 0
    for row, count in [] if isinstance(step, VisionStep) else zip(step.rows, step.outputs):
        if not count:
            continue
        known = ranks[row]
        third = len(sequences[row.sequence].prompt) + 2 - (row.start + len(row.ids) - count + 1)
        end += count
        if row.sequence in spoiled and 0 <= third < count:
            sampled[end - count + third] = NOT_FINITE
            for page in known.pages[min(known.finite, row.start) // plan.page_size :].tolist():
                for slot in range(page * plan.page_size, (page + 1) * plan.page_size):
                    written.pop(slot, None)
        else:
            known.finite = row.start + len(row.ids)
    return tuple(sampled)


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
    pool = scheduler.pool
    live = Counter(page for sequence in [*scheduler.running, *scheduler._leaving] for page in sequence.pages)
    assert live == pool._users, "pages are counted for others than those that hold them"
    assert not plan.counts_every_reader or live.total() + pool.free == pool.capacity
    assert pool.pool.free + len(live) + len(pool._idle) == pool.capacity, "a page leaked"
    # Ranks learn the block tables only from the steps.
    tables = {row.sequence: ranks[row].pages.tolist() for row in rows}
    for row in rows:
        assert tables[row.sequence] == sequences[row.sequence].pages
        assert row.used_pages == pages_for(row.start + len(row.ids), plan.page_size)
    fresh = [slot for row in rows for slot in slots(tables[row.sequence], row.start, len(row.ids), plan.page_size)]
    assert len(fresh) == len(set(fresh)), "two rows write to one slot"
    assert all(slot >= plan.scratch_pages * plan.page_size for slot in fresh), "a row writes to scratch"
    assert all(live[slot // plan.page_size] == 1 for slot in fresh), "a row writes to a page of two sequences"
    assert not {slot // plan.page_size for slot in fresh} & set(pool._digest), "a row writes to a page that is kept"
    for at, row in enumerate(rows):
        sequence = sequences[row.sequence]
        decodes = at < step.decoding
        proposal = row.ids[1:] if decodes else ()
        check_row(row, plan, sequence, ranks[row], written, encoded, proposal)
        new = slots(tables[row.sequence], row.start, len(row.ids), plan.page_size)
        kind = DecodeStep if decodes else PrefillStep
        written.update({slot: (kv, kind) for slot, kv in zip(new, contents(sequence, proposal)[row.start :])})
    after = [(row, n) for row, count in zip(rows, step.outputs) for n in range(len(row.ids) - count, len(row.ids))]
    assert len(after) <= (bucket.outputs or bucket.rows_of_logits)
    if plan.lengths_are_free:
        assert sum(len(row.ids) for row in rows[: step.decoding]) + len(rows) - step.decoding <= bucket.rows
    given = [row.given_after(n) for row, n in after]
    return tuple(answer(row.sequence, row.start + 1 + n) if id is None else id for (row, n), id in zip(after, given))


def check_budget(step, plan, scheduler, sequences) -> None:
    """Checks the size of a prefill step, and the order of its rows."""
    # One whose pages were all found again after it was preempted is admitted by this step.
    admitted = {row.sequence for row in step.rows if row.sampling}
    going_on = [one for one in scheduler.running if one.decoding and not (scheduler._assumed and one.complete)]
    decoding = {sequence.id for sequence in going_on} - admitted
    assert {row.sequence for row in step.rows[: step.decoding]} == (decoding if step.decoding else set())
    assert step.decoding == 0 or plan.lengths_are_free or plan.mixed_tokens
    ends = [row.start + len(row.ids) == sequences[row.sequence].length for row in step.rows[step.decoding :]]
    ended = step.sampled - step.decoding
    assert ends == [True] * ended + [False] * (len(ends) - ended)
    # One prompt token is computed even if decoding sequences fill the budget.
    assert not decoding or sum(len(row.ids) for row in step.rows) <= max(plan.step_tokens, step.decoding + 1)


def check_row(row, plan, sequence, known, written, encoded, proposal) -> None:
    """Checks a row's ids, its earlier K/V, and the image pages that each new token sees."""
    assert row.ids == (*sequence.prompt, *sequence.generated, *proposal)[row.start : row.start + len(row.ids)]
    assert known.sampling == sequence.sampling
    before = [written.get(slot, (None, None)) for slot in slots(known.pages.tolist(), 0, row.start, plan.page_size)]
    assert [kv for kv, _ in before] == contents(sequence)[: row.start], "earlier K/V were overwritten or never written"
    if plan.lengths_are_free and row.sampling:
        assert all(by is PrefillStep for _, by in before), "a decode step's bits are shared"
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


def tight(free=False, step_tokens=None, **choice):
    """A plan whose pages can't hold two sequences of the maximum length; `free`: for kernels that take lengths."""
    choice = PlanChoice(**({"page_size": 4, "num_pages": 16, "num_images": 3} | choice))
    return make_plan(choice, Limits(3, MAX_INPUT, MAX_NEW, MAX_IMAGES, step_tokens), SHAPE, CPU.paging, free)
