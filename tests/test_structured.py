"""Structured output in the engine. The oracle of validity is tests/json_schemas.py, which knows nothing of grammars."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import holds_nothing, serve, start
from json_schemas import satisfies, schema

from mllama_graph.core.errors import UserError
from mllama_graph.engine.sampler import Sampler
from mllama_graph.engine.steps import NOT_FINITE
from mllama_graph.inputs.request import Sampling
from mllama_graph.model import sample
from mllama_graph.model.table import Shard
from mllama_graph.ops.plain import PLAIN

TINY = Path(__file__).parents[1] / "mllama_graph" / "tiny" / "checkpoint"
FREE = {"prompt": "What do you see?"}
REGEX = {"prompt": "Hi", "structured_outputs": {"regex": "[0-9]{3}-(yes|no)"}, "temperature": 2.0}


@pytest.fixture(scope="module")
def engine():
    return start(TINY, batch=8, max_output_length=200)


def lines_of(seeds, **changes):
    """Requests with random schemas, and the schemas."""
    lines, schemas = [], {}
    for seed in seeds:
        draw = random.Random(seed)
        schemas[seed] = schema(draw, 2)
        kind = {"type": "json_schema", "json_schema": {"name": "s", "schema": schemas[seed]}}
        temperature = draw.choice([0, 0.5, 1, 2, 5])
        lines.append({"id": seed, "prompt": "Reply in JSON", "seed": seed, "temperature": temperature})
        lines[-1] |= {"response_format": kind, "max_new_tokens": 150} | changes
    return lines, schemas


def test_answers_are_valid_and_complete_and_free_rows_do_not_change(engine):
    lines, schemas = lines_of(range(48))
    alone = serve(engine, [FREE | {"id": "free"}])["free"]
    results = serve(engine, [FREE | {"id": "free"}, *lines, REGEX | {"id": "regex"}])
    assert results["free"].token_ids == alone.token_ids
    assert re.fullmatch("[0-9]{3}-(yes|no)", results["regex"].text)
    stopped = [seed for seed in schemas if results[seed].finish_reason == "stop"]
    assert len(stopped) >= 47
    for seed in stopped:
        assert satisfies(json.loads(results[seed].text), schemas[seed]), (results[seed].text, schemas[seed])
    assert holds_nothing(engine)


def test_the_last_ids_before_the_limit_close_what_is_open(engine):
    # The tiny model writes no JSON: free strings run on, and would be cut off at the limit.
    kinds = [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "integer"},
        {"type": "object"},
    ]
    for limit in (24, 60):
        for n, result in serve(
            engine,
            [
                {"id": n, "prompt": "Hi", "seed": n, "temperature": 0.5, "max_new_tokens": limit}
                | {"structured_outputs": {"json": kinds[n % 4]}}
                for n in range(8)
            ],
        ).items():
            assert result.finish_reason == "stop" and satisfies(json.loads(result.text), kinds[n % 4])


def test_preempted_answers_are_those_they_have_alone(engine):
    # An answer takes 5 pages, and the pool holds three answers.
    lines = [
        {"id": n, "prompt": "Hi", "seed": n, "temperature": 1.0, "structured_outputs": {"regex": "([0-9]-[a-c]){30}"}}
        for n in range(6)
    ]
    alone = {id: result.text for line in lines for id, result in serve(engine, [line]).items()}
    few = start(TINY, batch=6, page_size=32, max_input_length=40, max_output_length=150, num_pages=16)
    found = serve(few, lines)
    assert few.scheduler.preemptions > 0
    assert {id: result.text for id, result in found.items()} == alone
    assert all(re.fullmatch("([0-9]-[a-c]){30}", text) for text in alone.values())


def test_the_grammar_follows_forced_ids_and_refuses_those_it_does_not_allow(engine):
    from dataclasses import replace

    def run(text):
        request = engine.processor.request(REGEX | {"id": text, "logprobs": 2})
        engine.submit(replace(request, forced=tuple(engine.processor.codec.encode(text))))
        results = []
        engine.run(lambda delta: delta.result and results.append(delta.result))
        return results[0]

    assert re.fullmatch("12[0-9]-(yes|no)", run("12").text)
    assert "does not allow" in run("1x").error
    assert holds_nothing(engine)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "contradict"),
        ({"structured_outputs": {"json": {"minLength": 5, "maxLength": 2, "type": "string"}}}, "minLength"),
        ({"structured_outputs": {"json": False}}, "exactly one"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "no text satisfies it"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"grammar": "start: <|image|>"}}, "no token"),
    ],
)
def test_what_cant_be_used_is_refused_with_the_reason(fields, reason, engine):
    with pytest.raises(UserError, match=reason):
        engine.processor.request(FREE | fields)


# ---- masks


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_rank_cuts_its_shard_of_a_mask(world):
    # 20 ids divide neither into bytes nor into words; a mask ends with its last word, or earlier.
    size, random = -(-20 // world), np.random.default_rng(world)
    for count in (20, 32, 13):
        bits = random.random(count) < random.choice([0.1, 0.5, 0.9])
        mask = np.packbits(bits, bitorder="little").tobytes()
        expected = [*bits, *[False] * 40]
        for rank in range(world):
            logits_BV = torch.randn(2, size)
            before = logits_BV.clone()
            sample.mask_(logits_BV, 1, mask, rank * size)
            allowed = torch.tensor(expected[rank * size : (rank + 1) * size])
            # The last byte of a mask is padded with zeros by its maker.
            assert torch.equal(logits_BV[1] > -torch.inf, allowed) and torch.equal(logits_BV[0], before[0])
            assert torch.equal(logits_BV[1][allowed], before[1][allowed])


@pytest.mark.parametrize("held", [0, 1, 4, 24])
def test_greedy_rows_take_the_largest_logit_that_their_mask_allows(held):
    sampler, random = Sampler(24, Shard(0, 1), lambda x: x[None], print), np.random.default_rng(held)
    for count in range(1, 60):
        # Few distinct logits: among equal ones the lowest id counts.
        logits_BV = torch.from_numpy(random.integers(-2, 3, (4, 24))).float()
        logits_BV[1] = torch.from_numpy(random.permutation(24)).float()
        logits_BV[3, 9] = torch.nan
        allowed = [random.random(24) < random.choice([0.2, 0.9]) for _ in range(4)]
        for row in allowed:
            row[int(random.integers(24))] = True
        masks = [np.packbits(row, bitorder="little").tobytes() + b"\0" for row in allowed]
        masks[1] = b""
        found = sample.best(logits_BV, held, None, PLAIN) if held else None
        tokens = sampler.tokens(lambda x=logits_BV: x.clone(), found, [Sampling()] * 4, [count] * 4, masks)
        want = [
            int(np.where(row if mask else True, logits, -np.inf).argmax())
            for row, mask, logits in zip(allowed, masks, logits_BV.numpy())
        ]
        assert [token.id for token in tokens] == [*want[:3], NOT_FINITE]


def test_a_mask_leaves_the_mark_of_a_row_that_is_not_finite_and_rows_without_one():
    sampler = Sampler(24, Shard(0, 1), lambda x: x[None], print)
    logits_BV = torch.randn(3, 24)
    logits_BV[1, 5] = torch.nan
    free = int(logits_BV[0].argmax())
    only = (1 << 7).to_bytes(4, "little")
    options = [Sampling(logprobs=3)] * 3
    first, second, third = sampler.tokens(lambda: logits_BV.clone(), None, options, [0] * 3, [b"", only, only])
    assert (first.id, second.id, third.id, third.top_ids) == (free, NOT_FINITE, 7, (7,))
    # Of the raw logits: what the mask leaves out still counts.
    assert third.logprob == pytest.approx(float(logits_BV[2].log_softmax(-1)[7]), abs=1e-6)
