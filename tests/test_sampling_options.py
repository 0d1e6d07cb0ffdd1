"""Penalties, biases, least lengths and prompts' log-probabilities, against transformers and OpenAI's formula."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from engines import holds_nothing, serve, start
from request_cases import resolve
from test_engine import LOGPROB, NEAR_TIE, few
from test_finite import with_row
from transformers import AutoTokenizer
from transformers.generation import logits_process as hf

from mllama_graph.core.errors import UserError
from mllama_graph.engine.edits import LEAST, Edit
from mllama_graph.engine.sampler import Sampler
from mllama_graph.inputs.request import Sampling, read_options
from mllama_graph.model.table import Shard

OPTIONS = {
    "repetition": {"repetition_penalty": 1.4},
    "less than one": {"repetition_penalty": 0.7},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.0, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {"7": 100, "3": -100, "11": 2.5}},
    "length": {"min_tokens": 9},
    "all": {"repetition_penalty": 1.2, "frequency_penalty": 0.7, "logit_bias": {"5": 4, "9": -3}, "min_tokens": 3},
}


def edited(logits_V, sampling, ids, prompt, ends):
    """The logits after transformers' processors and OpenAI's formula (API reference, frequency_penalty)."""
    given, scores = torch.tensor([ids]), logits_V[None].clone()
    if sampling.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor([[[id], bias] for id, bias in sampling.logit_bias.items()])(
            given, scores
        )
    if sampling.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(given, scores)
    for id in set(ids[prompt:]):
        count = ids[prompt:].count(id)
        scores[0, id] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
    if sampling.min_tokens:
        scores = hf.MinNewTokensLengthLogitsProcessor(prompt, sampling.min_tokens, [*ends], "cpu")(given, scores)
    return scores[0]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_rank_edits_its_logits_as_transformers_does(name, world):
    vocab, prompt, ends, random = 20, 6, (1, 13), np.random.default_rng(world)
    sampling = read_options(OPTIONS[name], 30, Sampling(), vocab).sampling
    for length in (6, 7, 12, 30):
        ids = random.integers(0, vocab, length).tolist()
        logits_V = torch.from_numpy(random.normal(0, 3, vocab)).float()
        want = edited(logits_V, sampling, ids, prompt, ends)
        # Images' tokens have no logit, and the last rank has padding.
        edit = Edit(sampling, np.array([*ids[:2], 20, *ids[2:]], np.int32), prompt + 1, ends)
        size = -(-vocab // world)
        parts = [*torch.nn.functional.pad(logits_V, (0, size * world - vocab), value=-torch.inf).split(size)]
        for rank, part in enumerate(parts):
            edit.apply_(part, rank * size, vocab)
        have = torch.cat(parts)
        assert torch.isneginf(have[vocab:]).all()
        # An id that may not end the text yet is left with the least number, for grammars that allow no other.
        assert torch.equal(have[:vocab] == LEAST, torch.isneginf(want))
        assert torch.allclose(have[:vocab], want.clamp(min=LEAST), atol=1e-5)
        assert edit.changes or torch.equal(have[:vocab], logits_V)


def test_the_mark_of_logits_that_are_not_finite_stays():
    sampling = read_options(OPTIONS["all"] | {"logit_bias": {"0": 5}}, 30, Sampling(), 20).sampling
    logits_V = torch.zeros(20)
    logits_V[0] = torch.nan
    Edit(sampling, np.zeros(4, np.int32), 2, (0,)).apply_(logits_V, 0, 20)
    assert logits_V[0].isnan() and logits_V[1:].isfinite().all()


def lines_of(requests, name):
    """The representative requests, plain and with each of OPTIONS in turn; all report the prompt, too."""
    lines = few(requests, name)
    options = [*OPTIONS.values()]
    edited = [
        line | options[n % len(options)] | {"id": f"{line['id']} edited", "logprobs": 2, "prompt_logprobs": n % 3}
        for n, line in enumerate(lines)
    ]
    return [line for pair in zip(lines, edited) for line in pair]


@pytest.mark.parametrize(
    "plan", [{}, {"candidates": 24, "page_size": 16, "num_pages": 60}], ids=["from logits", "with candidates"]
)
def test_edited_rows_follow_transformers_and_leave_their_neighbours_alone(plan, checkpoint, requests, oracle):
    lines = lines_of(requests, "base")
    plain = [line for line in lines if not line["id"].endswith("edited")]
    alone = {id: result.token_ids for id, result in serve(start(checkpoint("base"), batch=4), plain).items()}
    engine = start(checkpoint("base"), batch=6, **plan)
    found = serve(engine, lines)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("base"))
    vocab, differences = engine.executor.run.shape.text.vocab, 0
    for line in lines:
        result = found[line["id"]]
        if not line["id"].endswith("edited"):
            assert result.token_ids == alone[line["id"]]
            continue
        request = engine.processor.request(line)
        ids, images = resolve(line, tokenizer)
        one = oracle("base")
        with torch.inference_mode():
            logits_TV = one._forward([*ids, *result.token_ids[:-1]], *one._encode([*ids], images))
        for step, (logits_V, id) in enumerate(zip(logits_TV[len(ids) - 1 :], result.token_ids)):
            so_far, row_V = [*ids, *result.token_ids[:step]], logits_V.log_softmax(-1)
            want_V = edited_of(logits_V, request.sampling, so_far, len(ids), engine.processor.eos, vocab)
            assert want_V.max() - want_V[id] < NEAR_TIE, (line["id"], step)
            assert abs(result.logprobs[step]["logprob"] - float(row_V[id])) < LOGPROB
            # Log-probabilities are those of the model, whatever was sampled.
            assert result.logprobs[step]["top_logprobs"] == pytest.approx(row_V.topk(2).values.tolist(), abs=LOGPROB)
            differences += id != int(row_V.argmax())
        check_prompt(result, ids, logits_TV, line["prompt_logprobs"], vocab)
        if line.get("min_tokens") and not request.ignore_eos:
            assert len(result.token_ids) > line["min_tokens"] or result.finish_reason == "length"
    assert differences > 20 and holds_nothing(engine)


def edited_of(row_V, sampling, ids, prompt, ends, vocab):
    """`edited`, for ids of which some have no logit."""
    kept = [id for id in ids if id < vocab]
    return edited(row_V, sampling, kept, prompt - len(ids) + len(kept), sorted(ends))


def check_prompt(result, ids, logits_TV, count, vocab):
    """Each token of the prompt has its log-probability after those before it; the first, and images', have none."""
    entries = result.prompt_logprobs
    assert [entry["id"] for entry in entries] == [*ids] and entries[0]["logprob"] is None
    for entry, row_V in zip(entries[1:], logits_TV.log_softmax(-1)):
        assert len(entry["top_ids"]) == count
        if entry["id"] >= vocab:
            assert entry["logprob"] is None
        else:
            assert abs(entry["logprob"] - float(row_V[entry["id"]])) < LOGPROB
        assert entry["top_logprobs"] == pytest.approx(row_V.topk(count).values.tolist(), abs=LOGPROB)


def test_a_prompt_is_scored_in_chunks_where_lengths_are_data_and_its_answer_keeps_its_bits(checkpoint):
    ids = [7 * n % 390 for n in range(90)]
    lines = [
        {"id": n, "input_ids": ids[: 90 - n], "images": [], "max_new_tokens": 8, "logprobs": 2, "ignore_eos": True}
        for n in range(3)
    ]
    scored = [line | {"prompt_logprobs": n} for n, line in enumerate(lines)]
    # One token at a time, in decode steps.
    wanted = serve(start(checkpoint("base"), batch=3), scored)
    engine = start(checkpoint("base"), batch=3, kernels="native")
    found, plain = serve(engine, scored), serve(engine, lines)
    assert engine.stats.decode_steps + engine.stats.prefill_steps < 50 and holds_nothing(engine)
    for n in range(3):
        assert (found[n].token_ids, found[n].logprobs) == (plain[n].token_ids, plain[n].logprobs)
        assert found[n].token_ids == wanted[n].token_ids and found[n].cached_tokens == 0
        for one, other in zip(found[n].prompt_logprobs, wanted[n].prompt_logprobs, strict=True):
            assert one["id"] == other["id"] and one["top_ids"] == other["top_ids"]
            assert one["logprob"] == (other["logprob"] and pytest.approx(other["logprob"], abs=LOGPROB))
            assert one["top_logprobs"] == pytest.approx(other["top_logprobs"], abs=LOGPROB)


def test_a_prompt_whose_logits_are_not_finite_is_an_error_of_its_request_alone(checkpoint, tmp_path):
    folder = with_row(checkpoint("base"), tmp_path / "checkpoint", 7, torch.nan)
    engine = start(folder, batch=3, kernels="native")
    lines = [{"id": n, "input_ids": [5, 9 - n, 3, 4], "max_new_tokens": 3, "prompt_logprobs": 1} for n in range(3)]
    found = serve(engine, lines)
    assert "not finite at step 1" in found[2].error and holds_nothing(engine)
    assert all(found[n].error is None and len(found[n].prompt_logprobs) == 4 for n in range(2))


def test_stop_strings_and_ends_wait_for_the_least_length(checkpoint):
    engine = start(checkpoint("base"), batch=4)
    free = {"prompt": "x", "max_new_tokens": 30, "seed": 3, "temperature": 2.0, "ignore_eos": True, "id": 0}
    text = serve(engine, [free])[0].text
    letter = text[0]
    stopped = serve(engine, [free | {"stop": letter}, free | {"stop": letter, "min_tokens": 5, "id": 1}])
    assert (stopped[0].text, len(stopped[0].token_ids)) == ("", 1)
    assert stopped[1].text.startswith(letter) and len(stopped[1].token_ids) > 5
    grammar = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert serve(engine, [free | grammar | {"min_tokens": 25}])[0].text in ("yes", "no")


def test_preempted_rows_keep_their_penalties(checkpoint):
    lines = [
        {"input_ids": [5 + n] * 20, "id": n, "max_new_tokens": 60, "frequency_penalty": 0.8, "ignore_eos": True}
        for n in range(6)
    ]
    lines[3]["prompt_logprobs"] = 1
    few_pages = start(
        checkpoint("base"), batch=6, page_size=16, max_output_length=60, max_input_length=30, num_pages=24
    )
    found = serve(few_pages, lines)
    assert few_pages.scheduler.preemptions > 0
    alone = start(checkpoint("base"), batch=1)
    for line in lines:
        want = serve(alone, [line])[line["id"]]
        assert found[line["id"]].token_ids == want.token_ids
        assert [e["id"] for e in found[3].prompt_logprobs] == lines[3]["input_ids"]


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"logit_bias": {"20": 1}}, "ids run from 0 to 19"),
        ({"logit_bias": {"a": 1}}, "logit_bias holds 'a', which is no id: ids are numbers from 0 to 19"),
        ({"top_p": -1}, "top_p=-1 must be above 0 and at most 1"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1"),
        ({"logit_bias": {"1": 101}}, "from -100 to 100"),
        ({"logit_bias": {"1": True}}, "from -100 to 100"),
        ({"logit_bias": [1]}, "an object of ids"),
        ({"repetition_penalty": 0}, "at least 0.01"),
        ({"presence_penalty": 2.5}, "at most 2"),
        ({"min_tokens": 31}, "more than the 30 tokens"),
        ({"min_tokens": -1}, "at least 0"),
    ],
)
def test_options_out_of_range_are_refused_with_the_rule(fields, reason):
    with pytest.raises(UserError, match=reason):
        read_options(fields, 30, Sampling(), 20)
    assert not replace(Sampling(), logprobs=3).edits


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_sample_the_tokens_of_one_rank_with_edits_masks_and_a_search(world):
    vocab, count, generator = 50, 6, torch.Generator().manual_seed(world)
    size, barrier, slots = -(-vocab // world), threading.Barrier(world), [None] * world

    def gather(rank, x):
        slots[rank] = x
        barrier.wait()
        found = torch.stack(slots)
        barrier.wait()
        return found

    def sampler(rank, gather, world):
        found = Sampler(vocab, Shard(rank, world), gather, print)
        found.small = 0
        return found

    alone = sampler(0, lambda x: x[None], 1)
    ranks = [sampler(rank, partial(gather, rank), world) for rank in range(world)]
    options = [Sampling(), Sampling(logprobs=2), Sampling(temperature=0.8, top_k=9, seed=1)]
    options += [Sampling(temperature=0.7, seed=2, logprobs=3), Sampling(logprobs=0), Sampling(temperature=1.0, seed=4)]
    for position in range(8, 30):
        logits_BV = 4 * torch.randn(count, vocab, generator=generator)
        logits_BV[position % 9 % count, 41] = torch.nan
        ids = torch.randint(0, vocab, (position,), generator=generator).int().numpy()
        changed = replace(Sampling(), repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={40: 3.0})
        edits = [Edit(changed, ids, 4, (1,), None if row % 3 else 7) if row % 2 else None for row in range(count)]
        masks = [bytes([position, 0, 255, 1, 9, 9, 1]) if (row + position) % 3 == 0 else b"" for row in range(count)]
        padded = torch.nn.functional.pad(logits_BV, (0, size * world - vocab))

        def of(rank, padded=padded, rest=(None, options, [position] * count, masks, edits)):
            return ranks[rank].tokens(lambda: padded[:, rank * size : (rank + 1) * size].clone(), *rest)

        want = alone.tokens(lambda x=logits_BV: x.clone(), None, options, [position] * count, masks, edits)
        with ThreadPoolExecutor(world) as pool:
            for have in pool.map(of, range(world)):
                for one, other in zip(have, want, strict=True):
                    assert (one.id, one.top_ids) == (other.id, other.top_ids)
                    assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
