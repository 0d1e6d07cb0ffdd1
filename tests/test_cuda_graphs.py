"""CapturedStep on a CPU, with a stand-in for torch.cuda whose replay runs the step again."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mllama_graph.graphs.cuda_graphs import WARM_UPS, CapturedStep
from mllama_graph.model.inputs import with_ids


class Given(NamedTuple):
    """A step's inputs, as in model/inputs.py; optional ones may be None."""

    ids_T: Tensor
    table_BJ: Tensor
    past_1: Tensor | None


class StandIn:
    """The device interface of CapturedStep, on the host and with counters."""

    def __init__(self, captures=True, host=True):
        self.captures, self.host = captures, host
        self.warm_ups = self.replays = self.waits = self.records = 0

    def buffer(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    pinned = buffer

    def on_host(self, leaf):
        return self.host

    def event(self):
        return self

    def synchronize(self):
        self.waits += 1

    def record(self):
        self.records += 1

    def warm_up(self, run):
        for _ in range(WARM_UPS):
            run()
            self.warm_ups += 1

    def capture(self, run):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = run()

        def replay():
            self.replays += 1
            for held, fresh in zip(*(x if isinstance(x, tuple) else (x,) for x in (output, run())), strict=True):
                if held is not None:
                    held.copy_(fresh)

        return replay, output


def given(first, rows=3, past=None):
    return Given(
        torch.arange(first, first + rows, dtype=torch.int32), torch.full((rows, 2), first, dtype=torch.int32), past
    )


def new_pages():
    return ((torch.zeros(4, 2), torch.zeros(4, 2)),)


def run(inputs, pages):
    pages[0][0].add_(1)
    assert inputs.past_1 is None
    return inputs.ids_T * 10 + inputs.table_BJ.sum(1)


def silent(line):
    raise AssertionError(line)


@pytest.mark.parametrize("host", [True, False])
def test_a_call_runs_the_captured_step_on_the_inputs_of_that_call(host):
    cuda, pages = StandIn(host=host), new_pages()
    step = CapturedStep(run, (given(0), pages), cuda, silent)
    assert step.captured and cuda.warm_ups == WARM_UPS
    for first in (5, 2, 7):
        wanted = run(given(first), new_pages())
        assert torch.equal(step(given(first), pages), wanted)
    assert cuda.replays == 3
    assert pages[0][0][0, 0] == WARM_UPS + 1 + 3


def test_the_output_and_the_inputs_of_every_replay_lie_in_the_same_memory():
    seen = []

    def note(inputs, pages):
        seen.append((inputs.ids_T.data_ptr(), inputs.table_BJ.data_ptr(), pages[0][0].data_ptr()))
        return inputs.ids_T + 1

    pages = new_pages()
    step = CapturedStep(note, (given(0), pages), StandIn(), silent)
    first = step(given(5), pages)
    assert step(given(9), pages) is first
    assert len(set(seen)) == 1 and seen[0][2] == pages[0][0].data_ptr()


def test_logits_and_candidates_of_a_replay_are_those_of_its_inputs():
    def both(inputs, pages):
        return inputs.ids_T + 1, inputs.table_BJ * 2

    step, pages = CapturedStep(both, (given(0), ()), StandIn(), silent), ()
    for first in (5, 2):
        assert all(map(torch.equal, step(given(first), pages), both(given(first), pages)))


def test_the_caller_may_change_its_inputs_after_a_call():
    seen = []
    step = CapturedStep(lambda inputs, pages: seen.append(inputs.ids_T.clone()), (given(0), ()), StandIn(), silent)
    inputs = given(5)
    step(inputs, ())
    inputs.ids_T.zero_()
    assert seen[-1].tolist() == [5, 6, 7]


def test_ids_of_the_last_step_are_filled_in_after_the_copy():
    pages = new_pages()
    step = CapturedStep(run, (given(0), pages), StandIn(), silent)
    last = torch.tensor([40, 41, 42], dtype=torch.int32)
    inputs = given(5)._replace(ids_T=torch.tensor([~2, 6, ~0], dtype=torch.int32))
    filled = step(inputs, pages, fill=lambda given: given._replace(ids_T=with_ids(given.ids_T, last)))
    assert torch.equal(filled, run(inputs._replace(ids_T=torch.tensor([42, 6, 40])), new_pages()).int())
    assert torch.equal(step(given(5), pages), run(given(5), new_pages()))


def test_pinned_memory_is_not_overwritten_before_the_previous_copy_is_done():
    cuda = StandIn()
    step = CapturedStep(lambda inputs, pages: None, (given(0), ()), cuda, silent)
    for _ in range(2):
        step(given(1), ())
    assert (cuda.waits, cuda.records) == (3, 3)


def test_inputs_of_several_types_keep_their_values():
    inputs = {
        "tiles": torch.arange(7, dtype=torch.uint8),
        "gap": None,
        "ids": torch.tensor([-3], dtype=torch.int32),
        "long": torch.tensor([[2**40]]),
        "none_left": torch.zeros(0, dtype=torch.int32),
    }
    seen = []
    step = CapturedStep(
        lambda tree: seen.append({name: None if x is None else x.clone() for name, x in tree.items()}),
        (inputs,),
        StandIn(),
        silent,
    )
    step(inputs)
    for name, value in inputs.items():
        assert seen[-1][name] is None if value is None else torch.equal(seen[-1][name], value)


def test_a_step_without_output_returns_none():
    step = CapturedStep(lambda inputs, pages: None, (given(0), ()), StandIn(), silent)
    assert step(given(1), ()) is None


def test_inputs_of_another_bucket_are_refused_by_name():
    step = CapturedStep(run, (given(0), new_pages()), StandIn(), silent)
    with pytest.raises(ValueError, match=r"\.ids_T is int32 \[4\], not int32 \[3\].*bucket"):
        step(given(0, rows=4), new_pages())
    with pytest.raises(ValueError, match=r"\.past_1 is int32 \[1\], not None"):
        step(given(0, past=torch.zeros(1, dtype=torch.int32)), new_pages())
    with pytest.raises(ValueError, match=r"\.ids_T is int64 \[3\], not int32 \[3\]"):
        step(given(0)._replace(ids_T=torch.zeros(3, dtype=torch.int64)), new_pages())
    with pytest.raises(ValueError, match="another form"):
        step((given(0),), new_pages())


def test_other_pages_are_refused_and_the_same_ones_in_another_tuple_are_not():
    pages = new_pages()
    step = CapturedStep(run, (given(0), pages), StandIn(), silent)
    step(given(1), tuple(tuple(pair) for pair in pages))
    for other in ((new_pages(),), (), (pages, ())):
        with pytest.raises(ValueError, match="Capture the step again"):
            step(given(1), *other)


def test_a_step_that_cannot_be_captured_is_reported_and_runs():
    lines, pages, cuda = [], new_pages(), StandIn(captures=False)
    step = CapturedStep(run, (given(0), pages), cuda, lines.append)
    assert not step.captured and len(lines) == 1 and "not permitted" in lines[0]
    for first in (4, 6):
        assert torch.equal(step(given(first), pages), run(given(first), new_pages()))
    assert cuda.replays == 0


def test_a_step_that_fails_by_itself_raises():
    def broken(inputs, pages):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CapturedStep(broken, (given(0), ()), StandIn(), silent)
