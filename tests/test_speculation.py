"""Proposed tokens change no result. The oracle is the engine without proposals; on native kernels bit for bit."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import served
from engines import holds_nothing, resolved, run_of, serve, start
from hypothesis import given
from hypothesis import strategies as st
from proposals import Replay
from test_finite import with_row

from mllama_graph.core.errors import UserError
from mllama_graph.engine.ngram import Ngram
from mllama_graph.engine.sampler import Sampler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.speculation import Speculation
from mllama_graph.engine.steps import NOT_FINITE, DecodeStep, PrefillStep, Row, agreeing
from mllama_graph.inputs.request import Sampling
from mllama_graph.model.table import Shard

TINY = Path(__file__).parents[1] / "mllama_graph" / "tiny" / "checkpoint"
SCENE = TINY.parent / "scene.png"
QUOTED = "I see a red circle, a green triangle and a blue star."

# Three requests of this length take more than the 9 pages of 32 tokens.
SHORT = {"max_input_length": 140, "max_output_length": 60}


def lines():
    """Requests of every kind: greedy and sampled, with pictures and without, with stop strings and grammars."""
    some = [
        {"prompt": "What do you see?", "images": [str(SCENE)]},
        {"prompt": f"{QUOTED} What do you see?", "images": [str(SCENE)], "logprobs": 3},
        {"prompt": "What can you do?", "temperature": 1.0, "logprobs": 2},
        {"prompt": "Describe the picture.", "images": [str(SCENE)], "temperature": 1.5, "top_p": 0.9, "stop": ["and"]},
        {"prompt": QUOTED * 3, "ignore_eos": True, "max_new_tokens": 37},
        {"prompt": "Hi", "temperature": 2.0, "structured_outputs": {"regex": "([0-9]-[a-c]){12}"}, "logprobs": 2},
        {"prompt": "Reply in JSON", "structured_outputs": {"json": {"type": "array"}}, "max_new_tokens": 30},
    ]
    return [{"max_new_tokens": 40, "seed": n, "id": n, **line} for n, line in enumerate(some)]


def told(result):
    """What a result says of the text."""
    return result.token_ids, result.text, result.finish_reason, result.logprobs


@pytest.fixture(scope="module")
def plain():
    return start(TINY, batch=8, kernels="native", prefix_cache=False)


@pytest.fixture(scope="module")
def alone(plain):
    """The results of `lines` without proposals, each request served by itself."""
    return [serve(plain, [line])[line["id"]] for line in lines()]


@pytest.mark.parametrize(
    "plan", [{"batch": 8}, {"batch": 3, "num_pages": 9, "page_size": 32} | SHORT, {"batch": 1}], ids=str
)
def test_results_are_those_without_proposals_by_the_bit(plan, alone):
    engine = start(TINY, kernels="native", speculate="ngram", **plan)
    for proposer in (engine.speculation.proposer, *(Replay(alone, share) for share in (0.0, 0.6, 1.0))):
        engine.speculation.proposer = proposer
        found = serve(engine, lines())
        # Sums over pages of another size, and those of preempted requests, have other bits.
        least = 3 if "page_size" in plan else 4
        assert [told(found[n])[:least] for n in range(len(alone))] == [told(result)[:least] for result in alone]
        taken, proposed = (sum(getattr(result, name) for result in found.values()) for name in TAKEN)
        assert 0 < taken <= proposed if getattr(proposer, "share", 1.0) else (taken, proposed > 0) == (0, True)
    assert holds_nothing(engine) and not engine.speculation._known


TAKEN = ("accepted_tokens", "proposed_tokens")


def test_steps_that_compute_prompts_keep_proposals(alone, monkeypatch):
    engine = start(TINY, batch=3, kernels="native", speculate="ngram", prefix_cache=False)
    engine.speculation.proposer = Replay(alone, 0.8)
    # In every step, whatever it costs.
    monkeypatch.setattr(engine.speculation, "_wanted", lambda rooms: {one: min(n, 2) for one, n in rooms.items() if n})
    steps, execute = [], engine.executor.execute
    monkeypatch.setattr(engine.executor, "execute", lambda step: steps.append(step) or execute(step))
    found = serve(engine, lines())
    assert [told(found[n]) for n in range(len(alone))] == [told(result) for result in alone]
    mixed = [step for step in steps if isinstance(step, PrefillStep) and step.decoding]
    assert any(len(row.ids) > 1 for step in mixed for row in step.rows[: step.decoding]) and holds_nothing(engine)
    # Chunks leave no room for proposals in as many tokens as max_step_tokens allows.
    plan = resolved(run_of(TINY, batch=2, kernels="native", speculate="ngram", max_step_tokens=9)).plan
    assert [plan.proposals_beside(tokens) for tokens in (4, 9, 10)] == [5, 0, 0]


def test_graphs_of_several_tokens_of_each_sequence_give_the_same_text(alone):
    # Without native kernels lengths are not data, and each sequence is padded to the same number of tokens.
    engine = start(TINY, batch=8, kernels="plain", speculate="ngram")
    engine.speculation.proposer = Replay(alone, 0.7)
    found = serve(engine, lines())
    assert [found[n].token_ids for n in range(len(alone))] == [result.token_ids for result in alone]
    assert any(bucket.each > 1 for bucket in engine.executor.plan.buckets())
    assert engine.stats.decode_tokens > engine.stats.decode_rows


def test_sampled_tokens_follow_the_distribution_whatever_is_proposed():
    # Two tokens of 6 ids each, the second's distribution given the first, with one proposal that is often right.
    # Pearson's chi-square of the 36 pairs against the softmax: its p-value falls below 1e-4 in one of 10,000 seeds.
    draws, vocab, random_ids = 20_000, 6, torch.Generator().manual_seed(1)
    first_V, second_VV = torch.randn(vocab, generator=random_ids), torch.randn(vocab, vocab, generator=random_ids)
    proposals = torch.randint(vocab, (draws,), generator=random_ids).where(
        torch.arange(draws) % 3 > 0, first_V.argmax()
    )
    sampler = Sampler(vocab, Shard(0, 1), lambda x: x[None], print)
    options = [Sampling(temperature=1.0, seed=seed) for seed in range(draws)]

    def sampled(logits_BV, position):
        return [token.id for token in sampler.tokens(lambda: logits_BV.clone(), None, options, [position] * draws)]

    pairs: Counter[tuple[int, int]] = Counter()
    after_last, after_proposal = sampled(first_V.expand(draws, -1), 7), sampled(second_VV[proposals], 8)
    again = sampled(second_VV[torch.tensor(after_last)], 8)
    for proposal, *tokens, later in zip(proposals.tolist(), after_last, after_proposal, again):
        count = agreeing(Row(0, (3, proposal), 6, (), 1, 0), tokens)
        pairs[tokens[0], tokens[1] if count == 2 else later] += 1
    wanted_VV = draws * first_V.softmax(-1)[:, None] * second_VV.softmax(-1)
    found_VV = torch.tensor([[pairs[one, two] for two in range(vocab)] for one in range(vocab)])
    chi_square = ((found_VV - wanted_VV) ** 2 / wanted_VV).sum()
    assert torch.special.gammaincc(torch.tensor((vocab**2 - 1) / 2), chi_square / 2) > 1e-4


def test_a_proposal_without_finite_logits_costs_its_request_nothing(checkpoint, tmp_path):
    folder = with_row(checkpoint("base"), tmp_path / "checkpoint", 7, torch.nan)
    plan = {"batch": 3, "page_size": 16, "kernels": "plain"}
    some = [{"id": n, "input_ids": [20 + n, *range(30, 45 + n)], "max_new_tokens": 12} for n in range(3)]
    wanted = serve(start(folder, **plan), some)
    engine = start(folder, **plan, speculate="ngram")
    engine.speculation.proposer = Replay([replace(wanted[n], token_ids=[7] * 12) for n in range(3)], 1.0)
    found = serve(engine, some)
    assert [found[n].token_ids for n in range(3)] == [wanted[n].token_ids for n in range(3)]
    assert engine.scheduler.preemptions == 3 and holds_nothing(engine)


def test_a_token_counts_if_all_proposals_before_it_were_sampled():
    row = Row(0, (5, 1, 2, 3), 9, (), 1, 0)
    for sampled, count in (((1, 2, 3, 4), 4), ((1, 2, 4, 4), 3), ((2, 2, 3, 4), 1), ((1, 2, 3, NOT_FINITE), 0)):
        assert agreeing(row, sampled) == count
    assert agreeing(Row(0, (5,), 9, (), 1, 0), (NOT_FINITE,)) == 1


def sequence(ids, generated=(), number=0):
    return Sequence(number, tuple(ids), (), (), 100, Sampling(), generated=list(generated))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=20))
def test_what_followed_the_last_ids_is_proposed(prompt, generated):
    proposer, one = Ngram(), sequence(prompt)
    for id in [*generated, None]:
        ids = [*prompt, *one.generated]
        found = next(
            (
                start + length
                for length in (4, 3, 2)
                for start in range(len(ids) - length - 1, -1, -1)
                if ids[start : start + length] == ids[-length:]
            ),
            None,
        )
        wanted = list(ids)
        for n in range(5 if found is not None else 0):
            wanted.append(wanted[found + n])
        assert list(proposer.propose({one: 5})[0]) == wanted[len(ids) :]
        one.generated += [id]


def test_proposals_follow_what_they_gain():
    plan = resolved(run_of(TINY, batch=8, kernels="native", speculate="ngram")).plan

    class Anything:
        def propose(self, wanted):
            return {one.id: (1,) * count for one, count in wanted.items()}

    def counts(speculation, rooms):
        return [len(speculation.propose(rooms).get(one.id, ())) for one in rooms]

    speculation, many = Speculation(Anything(), plan, 0.1), {sequence([1], number=n): 50 for n in range(8)}
    first, *others = many
    for _ in range(20):
        (count,) = counts(speculation, {first: 50})
        speculation.learn(0, count, count)
    assert counts(speculation, {first: 50}) == [plan.row_tokens - 1] and counts(speculation, {first: 1}) == [1]
    # In a larger batch a row costs more of what all others gain, and few rows are left.
    assert sum(counts(speculation, many)) <= plan.decode_batch[-1] - 8
    tried = 0
    for _ in range(200):
        if count := counts(speculation, {first: 50})[0]:
            speculation.learn(0, count, 0)
            tried += count
    # About the first twenty steps, in which the estimate falls, and then 1 step in 16, 32, ... 128.
    assert tried < 45
    # An acceptance that recovers is noticed.
    speculation.learn(0, 1, 1)
    assert max(counts(speculation, {first: 50})[0] for _ in range(3)) == 1
    speculation.learn(0, 1, 1)
    assert counts(speculation, {first: 50})[0] >= 1


def test_proposals_follow_measured_times():
    plan = resolved(run_of(TINY, batch=2, kernels="native", speculate="ngram")).plan
    speculation, one = Speculation(Ngram(), plan, 0.1), sequence([1])
    wanted = []
    for rows, seconds in ((1, 1.0), (3, 1.05), (3, 5.0), (2, 2.0)):
        for _ in range(15):
            speculation.took(DecodeStep((Row(0, (1,) * rows, 5, (), 1, 0),)), seconds)
        wanted.append(sum(speculation._wanted({one: 50}).values()))
    # By the cost alone; with the time of three rows; when that has risen; and when two rows have a time of their own.
    assert wanted == [2, 2, 1, 0]


# ---- a draft


def test_a_draft_that_is_the_model_itself_is_always_right_and_another_one_changes_nothing(alone, tmp_path):
    plan = {"batch": 8, "page_size": 4, "kernels": "native", "speculate_tokens": 3}
    engine = start(TINY, **plan, speculate="draft", draft=str(TINY))
    found = serve(engine, lines())
    assert [told(found[n])[:3] for n in range(len(alone))] == [told(result)[:3] for result in alone]
    # It draws with the same noise. Only what a request does not want, such as more after its end, is not accepted.
    accepted, proposed = (sum(getattr(result, name) for result in found.values()) for name in TAKEN)
    assert accepted > 0.6 * proposed > 0
    assert holds_nothing(engine)
    scheduler = engine.speculation.proposer._scheduler
    assert scheduler.pool.free == scheduler.pool.capacity and not scheduler.images._used
    engine.close()


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"speculate": "draft"}, "give draft="),
        ({"draft": "x"}, "speculate=draft only"),
        ({"speculate": "often"}, "not one of none, ngram, draft"),
        ({"speculate": "ngram", "speculate_tokens": 0}, "at least 1"),
        ({"speculate": "draft", "draft": "/nowhere"}, "draft=/nowhere is not a folder"),
    ],
)
def test_keys_that_cant_be_used_are_refused(keys, reason):
    from mllama_graph.core.config import check

    run = run_of(TINY, **keys)
    with pytest.raises(UserError, match=reason):
        check(run)
        resolved(run)


def test_a_draft_with_other_ids_is_refused(checkpoint):
    said = r"it has \d+ ids, where the model needs \d+\. Use one with its tokenizer and tiles"
    with pytest.raises(UserError, match=said):
        resolved(run_of(TINY, speculate="draft", draft=str(checkpoint("base"))))


def test_two_ranks_give_the_text_of_one_without_proposals(alone, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines()))
    keys = ["tp=2", "batch=8", "speculate=draft", f"draft={TINY}", "backend=eager", "max_output_length=100"]
    lines_of = served(tmp_path / "out", f"requests={path}", f"weights={TINY}", "dtype=fp32", *keys)["lines"]
    found = {line["id"]: line for line in lines_of}
    assert [found[n]["token_ids"] for n in range(len(alone))] == [result.token_ids for result in alone]
    assert any(found[n]["accepted_tokens"] for n in range(len(alone)))
