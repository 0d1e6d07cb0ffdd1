"""The fake model of scheduling.py behind a queue: steps may be decided before the ids of the last one are read."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from scheduling import IMAGE_TOKEN, Served, model

from mllama_graph.engine.batch import Known, Sequences
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import NOT_FINITE, PENDING, Row, Step, sampled
from mllama_graph.inputs.request import Sampling
from mllama_graph.plan.blocks import slots


@dataclass
class Device:
    """The pages and the ids of a device, which computes steps in the order in which they are launched.

    spoiled: requests whose third token can't be sampled; what its row writes is not finite, `dirty`.
    """

    plan: object
    scheduler: Scheduler
    sequences: list[Sequence]
    spoiled: frozenset[int]
    ranks: Sequences = field(default_factory=Sequences)
    written: dict = field(default_factory=dict)
    encoded: dict = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    # The ids that each request has got on the device, wasted ones included.
    got: dict[int, list[int]] = field(default_factory=dict)

    def seen(self, sequence: Sequence) -> Sequence:
        """A sequence with the ids that the device knows."""
        return replace(sequence, generated=list(self.got.get(sequence.id, [])))

    def launch(self, step: Step) -> tuple[list[int], list[tuple[Row, Known]]]:
        """Compute a step. Returns its ids, and what `finish` takes."""
        self.ranks.update(step)
        for row in step.rows:
            table = self.ranks[row].pages.tolist()
            size = self.plan.page_size
            read = set(slots(table, 0, len(table) * size, size))
            assert row.sequence in self.spoiled or not read & self.dirty, "a row reads what is not finite"
        known = [self.seen(sequence) for sequence in self.sequences]
        true = tuple(
            replace(row, ids=(known[row.sequence].generated[-1],)) if row.ids == (PENDING,) else row
            for row in step.rows
        )
        given = replace(step, rows=true) if step.rows else step
        ids = list(model(given, self.plan, self.scheduler, known, self.ranks, self.written, self.encoded))
        rows = step.rows[: sampled(step)]
        for place, row in enumerate(rows):
            own = self.got.setdefault(row.sequence, [])
            end = row.start + len(row.ids)
            if row.sequence in self.spoiled and len(own) >= 2:
                ids[place] = NOT_FINITE
                self.dirty |= set(slots(self.ranks[row].pages.tolist(), row.start, len(row.ids), self.plan.page_size))
            assert end == len(self.sequences[row.sequence].prompt) + len(own), "a row has all ids before its token"
            own.append(ids[place])
        return ids, [(row, self.ranks[row]) for row in rows]

    def finish(self, ids: list[int], rows: list[tuple[Row, Known]]) -> None:
        """Clear the pages of rows that failed, as a rank does, after all that was launched."""
        size = self.plan.page_size
        for id, (row, known) in zip(ids, rows, strict=True):
            if id != NOT_FINITE:
                known.finite = row.start + len(row.ids)
                continue
            for page in known.pages[min(known.finite, row.start) // size :].tolist():
                for slot in range(page * size, (page + 1) * size):
                    self.written.pop(slot, None)
                    self.dirty.discard(slot)


def serve(
    plan,
    batch,
    work,
    ahead: Callable[[], bool],
    late=0,
    abort=frozenset(),
    spoiled=frozenset(),
    stops=None,
    prefix_cache=True,
) -> tuple[Served, int]:
    """As scheduling.serve, without proposals; and the number of steps that were launched ahead.

    `ahead`: whether to launch a step before the last one is read, where that can be. `stops`: after how many tokens
    some requests end, which only their ids tell.
    """
    scheduler, stops = Scheduler(plan, batch, prefix_cache), stops or {}
    sequences = [
        Sequence(n, ids, images, tuple(at for at, id in enumerate(ids) if id == IMAGE_TOKEN), new, Sampling(), *rest)
        for n, (ids, images, new, *rest) in enumerate(work)
    ]
    device, results = Device(plan, scheduler, sequences, spoiled), {n: [] for n in range(len(work))}
    waiting, ended = sequences[len(sequences) - late :], set()
    for sequence in sequences[: len(sequences) - late]:
        scheduler.add(sequence)
    steps, flight, overlapped = [], None, 0

    def launch(step):
        steps.append(step)
        return device.launch(step)

    while waiting or flight or not scheduler.idle:
        assert len(steps) < 5000, "the scheduler makes no progress"
        if waiting and (scheduler.idle or len(steps) % 3 == 0):
            scheduler.add(waiting.pop(0))
        if flight is None:
            step = scheduler.next()
            if step is None:
                continue
            flight = launch(step)
            scheduler.assume()
        following = scheduler.ahead() if ahead() else None
        current, flight = flight, launch(following) if following else None
        overlapped += following is not None
        device.finish(*current)
        for sequence, id in scheduler.commit(tuple(current[0])):
            if sequence.id in ended:
                continue
            results[sequence.id].append(id)
            if len(results[sequence.id]) in (sequence.max_new, stops.get(sequence.id)) or id == NOT_FINITE:
                ended.add(sequence.id)
                scheduler.finish(sequence)
        if flight:
            scheduler.assume()
        for id in [id for id in abort if len(steps) > 4 * id and id not in ended]:
            if id < len(sequences) and sequences[id] not in waiting:
                ended.add(id)
                scheduler.abort(id)
    assert not device.dirty
    return Served(results, steps, scheduler), overlapped
