"""How many prompt tokens a step takes beside decoding sequences, with a machine whose times are known."""

from hypothesis import given
from hypothesis import strategies as st

from mllama_graph.engine.pace import KEPT, LEAST, MOST, RATIO, Pace, Times
from mllama_graph.engine.steps import DecodeStep, PrefillStep, Row

DECODING = 4


def step(new: int):
    """A step of sequences that decode, beside a prompt of `new` tokens unless that is 0."""
    rows = tuple(Row(n, (1,), 5, (), 1, 0) for n in range(DECODING))
    return PrefillStep((*rows, Row(9, (1,) * new, 0, (), 1, 0)), DECODING, DECODING) if new else DecodeStep(rows)


def paced(alone: float, base: float, each: float, steps: int = 200) -> Pace:
    """After steps of a machine on which a decode step takes `alone`, one with n prompt tokens base + n * each."""
    pace = Pace(8, 2048)
    for _ in range(2):
        pace.took(step(0), alone)
    for _ in range(steps):
        pace.took(step(pace.room), base + pace.room * each)
    return pace


@given(st.floats(0.1, 10), st.floats(1e-4, 1))
def test_a_step_takes_at_most_the_ratio_and_most_of_it(alone, each):
    room = paced(alone, alone, each * alone).room
    assert room == LEAST or room == 2048 or 0.8 * RATIO <= 1 + room * each <= RATIO * 1.15


def test_where_nothing_fits_the_least_chunk_remains():
    assert paced(1.0, 5.0, 0.1).room == LEAST


def test_one_late_step_takes_at_most_half():
    pace = paced(1.0, 1.0, 0.01)
    before = pace.room
    pace.took(step(before), 1000.0)
    assert pace.room == before // 2


def test_times_are_kept_by_the_number_of_sequences():
    pace = Pace(8, 2048)
    for _ in range(2):
        pace.took(step(0), 1.0)
    pace.took(PrefillStep((Row(9, (1,) * 64, 0, (), 1, 0),), 0), 100.0)
    assert pace.room == 8, "a prompt alone says nothing about rows beside it"


@given(st.floats(0.1, 10), st.floats(1, 30), st.floats(0, 1))
def test_the_mean_step_takes_the_ratio_whatever_the_least_chunk_takes(alone, base, each):
    pace, taken, tokens, since = Pace(8, 2048), [], 0, 0
    for _ in range(600):
        new = pace.room if pace.admits(DECODING) else 0
        since = since + 1 if new else 0
        assert since <= MOST
        taken.append(alone * (base + new * each) if new else alone)
        tokens += new
        pace.took(step(new), taken[-1])
    mean = sum(taken[100:]) / 500
    assert mean <= RATIO * alone * 1.2
    assert mean >= RATIO * alone * 0.9 or base + LEAST * each < RATIO, "no more steps without prompt tokens than needed"
    assert tokens > 500 * LEAST * (RATIO - 1) / (base + LEAST * each) / 2, "the prompt goes on"


def test_nothing_is_computed_beside_sequences_whose_own_time_is_not_known():
    pace = Pace(8, 2048)
    assert not pace.admits(DECODING)
    for _ in range(2):
        pace.took(step(0), 1.0)
    assert pace.admits(DECODING) and pace.admits(DECODING + 1), "the nearest number will do"


def test_a_step_with_proposals_is_measured_by_one_that_only_decodes_as_many():
    for ids, grows in (((1,), False), ((1, 2), True)):
        pace, row = Pace(8, 2048), Row(0, ids, 5, (), 1, 0)
        for rows, seconds in ((1, 1.0), (2, 2.0)):
            for _ in range(2):
                pace.took(DecodeStep((Row(0, (1,) * rows, 5, (), 1, 0),)), seconds)
        pace.took(PrefillStep((row, Row(9, (1,) * 8, 0, (), 1, 0)), 1, 1), 1.5 * RATIO)
        assert (pace.room > 8) == grows


def test_a_time_is_forgotten_where_no_step_repeats_it():
    times = Times()
    assert times.learn(5, 9.0) == 9.0 and times.of(5) is None and times.nearest(5) is None
    assert times.learn(5, 1.0) == 1.0 == times.of(5), "the first step of its kind may have loaded a graph"
    for _ in range(KEPT):
        times.learn(1, 1.0)
    assert (times.of(5), times.nearest(7), times.nearest(3)) == (1.0, 5, 1)
    times.learn(1, 1.0)
    assert (times.of(5), times.nearest(7), times.nearest(0)) == (None, 1, 1)
