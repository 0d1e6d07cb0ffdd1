"""How many prompt tokens a step takes beside decoding sequences, with a machine whose times are known."""

from hypothesis import given
from hypothesis import strategies as st

from mllama_graph.engine.pace import LEAST, RATIO, Pace
from mllama_graph.engine.steps import DecodeStep, PrefillStep, Row

DECODING = 4


def step(new: int):
    """A step of sequences that decode, beside a prompt of `new` tokens unless that is 0."""
    rows = tuple(Row(n, (1,), 5, (), 1, 0) for n in range(DECODING))
    return PrefillStep((*rows, Row(9, (1,) * new, 0, (), 1, 0)), DECODING, DECODING) if new else DecodeStep(rows)


def paced(alone: float, base: float, each: float, steps: int = 200) -> Pace:
    """After steps of a machine on which a decode step takes `alone`, one with n prompt tokens base + n * each."""
    pace = Pace(8, 2048)
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
    pace.took(step(0), 1.0)
    pace.took(PrefillStep((Row(9, (1,) * 64, 0, (), 1, 0),), 0), 100.0)
    assert pace.room == 8, "a prompt alone says nothing about rows beside it"
