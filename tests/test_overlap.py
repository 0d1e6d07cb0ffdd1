"""Steps that are launched before the ids of the step before are read give the results of steps in turns.

test_scheduler.py, test_finite.py and test_ranks.py overlap steps, too; tests/ascend overlaps those of a simulated NPU.
"""

from functools import cache

import pytest
from engines import holds_nothing, resolved, run_of, serve, start
from test_engine import few

from mllama_graph.core.errors import UserError
from mllama_graph.engine import rank as ranks

# Graphs give candidates, as on an accelerator. A CPU runs a step when it is launched: only the order is that of one.
IN_TURNS = {"candidates": 8, "batch": 4, "page_size": 16}
OVERLAPPED = IN_TURNS | {"overlap": True}
PLANS = {
    "prompts in chunks": {"prefill_tokens": [16], "prefix_cache": False},
    "prompts beside decoding": {"mixed_tokens": [9, 40], "num_pages": 56, "batch": 8},
    "one at a time": {"batch": 1},
}
# Options of requests by their number: most are greedy, some need the host for the next id.
OPTIONS = (
    {},
    {"max_new_tokens": 3},
    {"temperature": 0.9, "top_k": 5, "seed": 3},
    {"logprobs": 2},
    {},
    {"frequency_penalty": 0.5},
    {"prompt_logprobs": 1},
)


@pytest.fixture(scope="module")
def lines(requests):
    """lines(greedy) -> requests of up to 8 new tokens, greedy ones or of all kinds."""

    def made(greedy: bool) -> list[dict]:
        left_out = ("text_257", "one_then_chain_129", "image_255")
        short = [line for line in few(requests, "base") if line["id"] not in left_out]
        plain = [{name: value for name, value in line.items() if name != "logprobs"} for line in short]
        options = (OPTIONS[0],) if greedy else OPTIONS
        return [line | {"max_new_tokens": 8} | options[n % len(options)] for n, line in enumerate(plain)]

    return cache(made)


def told(results):
    """What results say, without their times."""
    return {
        id: (one.token_ids, one.text, one.finish_reason, one.logprobs, one.prompt_logprobs)
        for id, one in results.items()
    }


def watch(engine, monkeypatch) -> list[str]:
    """The order in which a rank launches steps and the host waits for what they give."""
    rank, events = engine.executor.rank, []
    launch, fetched = rank.launch, ranks.fetched
    monkeypatch.setattr(rank, "launch", lambda *given: (events.append("launch"), launch(*given))[1])
    waiting = lambda wait: lambda: (events.append("wait"), wait())[1]  # noqa: E731
    monkeypatch.setattr(ranks, "fetched", lambda x: waiting(fetched(x)))
    return events


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("greedy", [True, False])
def test_results_are_those_of_steps_in_turns(plan, greedy, lines, checkpoint, monkeypatch):
    expected = told(serve(start(checkpoint("base"), **IN_TURNS | PLANS[plan]), lines(greedy)))
    engine = start(checkpoint("base"), **OVERLAPPED | PLANS[plan])
    events = watch(engine, monkeypatch)
    assert told(serve(engine, lines(greedy))) == expected
    assert ("launch", "launch") in set(zip(events, events[1:])), "no step was launched ahead"
    assert engine.idle and holds_nothing(engine)


def test_a_step_is_launched_before_the_host_waits_for_the_one_before(checkpoint, requests, monkeypatch):
    engine = start(checkpoint("base"), **OVERLAPPED)
    events = watch(engine, monkeypatch)
    line = next(line for line in few(requests, "base") if line["id"] == "text_64")
    serve(engine, [line | {"max_new_tokens": 6, "logprobs": None}])
    # The prompt's step and five more: each is launched before the ids of the one before are waited for.
    assert events == ["launch", *["launch", "wait"] * 5, "wait"]


def test_a_stop_that_only_the_text_tells_wastes_one_row_at_most(checkpoint, requests, monkeypatch):
    line = next(line for line in few(requests, "base") if line["id"] == "text_64") | {"logprobs": None}
    whole = serve(start(checkpoint("base"), **IN_TURNS), [line])["text_64"]
    stop = whole.text[len(whole.text) // 2 :][:4]
    line |= {"stop": [stop]}
    expected = told(serve(start(checkpoint("base"), **IN_TURNS), [line]))
    assert expected["text_64"][2] == "stop" and len(expected["text_64"][0]) < len(whole.token_ids)
    engine = start(checkpoint("base"), **OVERLAPPED)
    events = watch(engine, monkeypatch)
    assert told(serve(engine, [line])) == expected
    assert events.count("launch") == len(expected["text_64"][0]) + 1
    assert holds_nothing(engine)


def test_aborted_requests_leave_the_others_and_no_page(lines, checkpoint):
    expected = serve(start(checkpoint("base"), **IN_TURNS), lines(True))
    engine = start(checkpoint("base"), **OVERLAPPED)
    numbers = {engine.submit(engine.processor.request(line)): line["id"] for line in lines(True)}
    results, steps = {}, 0
    while not engine.idle:
        for delta in engine.step():
            results |= {delta.id: delta.result} if delta.result else {}
        steps += 1
        if steps % 3 == 0 and (left := [number for number, id in numbers.items() if id not in results and number % 2]):
            engine.abort(left[0])
            del numbers[left[0]]
    assert len(results) < len(expected)
    assert all(result.token_ids == expected[id].token_ids for id, result in results.items())
    assert holds_nothing(engine)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"candidates": 0},
            "overlap=true needs graphs that find the largest logits themselves. Here plan.candidates=0",
        ),
        ({"candidates": 8, "speculate": "ngram"}, "overlap=true speculate=ngram: proposals follow the last id"),
    ],
)
def test_what_steps_can_not_overlap_with_is_refused(changes, message, checkpoint):
    with pytest.raises(UserError, match=message):
        resolved(run_of(checkpoint("base"), overlap=True, **changes))


def test_steps_take_turns_on_a_cpu_unless_asked(checkpoint):
    assert not resolved(run_of(checkpoint("base"), candidates=8)).overlap
