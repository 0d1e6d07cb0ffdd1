"""The engine from requests to text, eager, against the corrected Hugging Face model."""

import pickle
from collections import Counter
from functools import cache

import pytest
from checkpoints import SPECS
from engines import holds_nothing, serve, start, tokens_of
from request_cases import resolve
from transformers import AutoTokenizer

from mllama_graph.engine.steps import VisionStep

# Two correct fp32 engines may choose different ids where the best two logits are this close.
NEAR_TIE = 1e-3
# fp32 sums in another order, over a few layers of width 256, on log-probabilities of about 10.
LOGPROB = 1e-3
# A small representative set: image chains, text before an image, text alone, a shared image, lengths near page ends.
FEW = (
    "bos_only",
    "text_64",
    "text_257",
    "bos_image",
    "text_before_image_63",
    "chain_of_three_48",
    "one_then_chain_129",
    "same_image_twice_49",
    "image_255",
    "prompt_text",
    "messages_images",
)


def few(requests, name: str = "base") -> list[dict]:
    return [line for line in requests(name) if line["id"] in FEW]


@pytest.fixture(scope="module")
def expected(checkpoint, requests):
    """expected(spec) -> ids of the requests in FEW, served one at a time; another test compares all with the oracle."""
    return cache(lambda name: tokens_of(start(checkpoint(name), batch=1, page_size=64), few(requests, name)))


def difference(result, logprobs, spec, ignore_eos) -> str | None:
    """The first difference between a result and the oracle's log-probabilities for the same prefix, or None.

    Every id must be the oracle's greedy choice after the ids before it; a near tie ends the comparison.
    """
    best, choice = logprobs.topk(2, dim=-1)
    for step, id in enumerate(result.token_ids):
        if id != choice[step, 0]:
            margin = float(best[step, 0] - best[step, 1])
            return None if margin < NEAR_TIE and id == choice[step, 1] else f"step {step}: {id} for {choice[step, 0]}"
        if result.logprobs is None:
            continue
        reported = result.logprobs[step]
        off = max(
            abs(reported["logprob"] - float(logprobs[step, id])),
            *(
                abs(p - float(logprobs[step, i]))
                for i, p in zip(reported["top_ids"], reported["top_logprobs"], strict=True)
            ),
        )
        if (
            off > LOGPROB
            or reported["id"] != id
            or abs(reported["top_logprobs"][-1] - logprobs[step].topk(3).values[-1]) > LOGPROB
        ):
            return f"step {step}: log-probabilities off by {off:.1e}"
    if not ignore_eos and any(id in spec.end_ids for id in result.token_ids[:-1]):
        return "goes on after EOS"
    return None


@pytest.mark.parametrize("name", SPECS)
def test_every_request_in_one_batch_gives_the_oracles_tokens_and_log_probabilities(name, checkpoint, requests, oracle):
    spec, lines = SPECS[name], requests(name)
    engine = start(checkpoint(name), batch=8, page_size=16)
    results = serve(engine, lines)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    faults = {}
    for line in lines:
        result, (ids, images) = results[line["id"]], resolve(line, tokenizer)
        if fault := difference(
            result, oracle(name).top_logprobs(list(ids), result.token_ids, images), spec, line.get("ignore_eos")
        ):
            faults[line["id"]] = fault
        ended = result.token_ids[-1] in spec.end_ids and not line.get("ignore_eos")
        assert ended or len(result.token_ids) == line["max_new_tokens"]
        assert result.finish_reason == ("stop" if ended else "length")
        assert result.prompt_tokens == len(ids)
        assert (result.logprobs is not None) == ("logprobs" in line)
    assert not faults
    assert holds_nothing(engine)


PLANS = {
    "pages of 8": {"page_size": 8},
    "pages of 100, no divisor of anything": {"page_size": 100},
    "chunks of 16": {"page_size": 16, "prefill_tokens": [16]},
    "chunks of 50 across pages of 16": {"page_size": 16, "prefill_tokens": [7, 50]},
    "one large bucket of each": {"prefill_tokens": [300], "decode_batch": [8], "pages": [4], "images": [4]},
    "batch 1": {"batch": 1},
    "batch 3": {"batch": 3, "page_size": 32},
    "mixed steps of 40": {"page_size": 16, "mixed_tokens": [9, 40]},
    "mixed steps of one prompt": {"page_size": 16, "mixed_tokens": [16], "prefill_rows": [1], "batch": 3},
    "room for one image set": {"page_size": 16, "num_images": 4},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["base", "cross_first"])
def test_no_plan_changes_the_tokens(name, plan, checkpoint, requests, expected):
    engine = start(checkpoint(name), **({"batch": 8} | PLANS[plan]))
    assert tokens_of(engine, few(requests, name)) == expected(name)
    assert holds_nothing(engine)


@pytest.mark.parametrize("plan", [{}, PLANS["pages of 8"], PLANS["chunks of 50 across pages of 16"], PLANS["batch 3"]])
@pytest.mark.parametrize("name", ["base", "cross_first", "adjacent", "half"])
def test_kernels_give_the_same_tokens(name, plan, checkpoint, requests, expected):
    # fp32 sums in another order; no request of these specs has a near tie.
    engine = start(checkpoint(name), kernels="native", **({"batch": 8} | plan))
    assert tokens_of(engine, few(requests, name)) == expected(name)
    assert holds_nothing(engine)


def test_the_budget_of_steps_changes_no_bit_of_kernels(checkpoint, requests):
    lines = [line | {"logprobs": 2} for line in few(requests, "base")]
    made = []
    for budget in (4, 9, 2048):
        engine = start(checkpoint("base"), kernels="native", batch=4, max_step_tokens=budget)
        results = serve(engine, lines)
        made.append({id: (result.token_ids, result.logprobs) for id, result in results.items()})
    assert made[0] == made[1] == made[2]


def test_kernels_read_weights_as_they_are_stored(checkpoint, requests):
    # Widening 16-bit weights is exact, so that the tokens equal those of the same weights kept in fp32.
    for name in ("cross_first", "half"):
        wide, narrow = (start(checkpoint(name), kernels="native", batch=4, dtype=dtype) for dtype in ("fp32", "auto"))
        assert narrow.executor.rank.spec.store.itemsize == 2
        assert tokens_of(narrow, few(requests, name)) == tokens_of(wide, few(requests, name))


@pytest.mark.parametrize("name", ["base", "cross_first"])
def test_preemption_does_not_change_the_tokens(name, checkpoint, requests, expected):
    # 25 pages of 16 hold one sequence of the longest 400 tokens, so that eight rows are preempted.
    engine = start(checkpoint(name), batch=8, page_size=16, num_pages=25)
    assert tokens_of(engine, few(requests, name)) == expected(name)
    assert engine.scheduler.preemptions > 0
    assert holds_nothing(engine)


def test_the_order_of_requests_does_not_change_the_tokens(checkpoint, requests, expected):
    engine = start(checkpoint("base"), batch=3, page_size=16)
    assert tokens_of(engine, few(requests)[::-1]) == expected("base")


def test_weights_kept_in_bf16_and_computed_in_fp32_give_the_tokens_of_fp32(checkpoint, requests, expected):
    engine = start(checkpoint("cross_first"), batch=4, dtype="auto")
    assert engine.executor.rank.weights.text.embed.weight.dtype.itemsize == 2
    assert tokens_of(engine, few(requests, "cross_first")) == expected("cross_first")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_runs_and_mostly_agrees(dtype, checkpoint, requests, expected):
    # Rounding to 8 bits changes a token sooner or later; first tokens, with margins of several units, must agree.
    tokens = tokens_of(start(checkpoint("base"), batch=8, dtype=dtype), few(requests))
    first = [tokens[id][0] == ids[0] for id, ids in expected("base").items()]
    assert sum(first) >= len(first) - 1


# ---- sampling


def sampled(requests) -> list[dict]:
    return [line | {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 7} for line in few(requests)]


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(checkpoint, requests, expected):
    alone = start(checkpoint("base"), batch=1)
    lines = sampled(requests)
    one_by_one = {line["id"]: serve(alone, [line])[line["id"]].text for line in lines}
    together = serve(start(checkpoint("base"), batch=8, page_size=16, num_pages=50), lines[::-1])
    assert {id: result.text for id, result in together.items()} == one_by_one
    assert {id: r.token_ids for id, r in together.items()} != expected("base")


def test_another_seed_gives_other_text_and_greedy_neighbours_stay_greedy(checkpoint, requests, expected):
    lines = sampled(requests)
    engine = start(checkpoint("base"), batch=8)
    mixed = [line if n % 2 else plain for n, (line, plain) in enumerate(zip(lines, few(requests)))]
    first = tokens_of(engine, mixed)
    second = tokens_of(engine, [line | {"seed": 8} for line in mixed])
    for n, line in enumerate(mixed):
        id = line["id"]
        assert (first[id] == second[id] == expected("base")[id]) if n % 2 == 0 else True
    assert any(first[line["id"]] != second[line["id"]] for line in mixed[1::2])


# ---- text, stops and ends


def test_streamed_text_is_the_text_of_the_result_and_of_the_tokenizer(checkpoint, requests):
    engine = start(checkpoint("base"), batch=4)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("base"))
    streamed, results = Counter(), {}
    pieces: dict[str, str] = {}
    for line in few(requests):
        engine.submit(engine.processor.request(line))

    def keep(delta):
        pieces[delta.id] = pieces.get(delta.id, "") + delta.text
        streamed[delta.id] += 1
        if delta.result:
            results[delta.id] = delta.result

    engine.run(keep)
    for id, result in results.items():
        assert streamed[id] == len(result.token_ids)
        assert pieces[id] == result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_before_itself(checkpoint, requests, expected):
    line = next(line for line in requests("base") if line["id"] == "text_64")
    engine = start(checkpoint("base"))
    whole = serve(engine, [line])["text_64"].text
    stop = whole[20:23]
    result = serve(engine, [line | {"stop": ["never said", stop]}])["text_64"]
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert len(result.token_ids) < len(expected("base")["text_64"])


def test_ignore_eos_goes_on_to_the_last_token(checkpoint, requests, expected):
    ended = [line for line in requests("base") if not line.get("ignore_eos")]
    results = serve(start(checkpoint("base"), batch=8), ended)
    stopped = [line for line in ended if results[line["id"]].finish_reason == "stop"]
    assert stopped, "no request of the cases ends by EOS"
    again = serve(start(checkpoint("base"), batch=8), [line | {"ignore_eos": True} for line in stopped])
    for line in stopped:
        before, after = results[line["id"]].token_ids, again[line["id"]]
        assert after.token_ids[: len(before)] == before
        assert len(after.token_ids) == line["max_new_tokens"] and after.finish_reason == "length"


# ---- images and pages


def test_an_image_shared_by_requests_is_encoded_once(checkpoint, requests):
    line = next(line for line in requests("base") if line["id"] == "same_image_twice_49")
    engine = start(checkpoint("base"), batch=4)
    results = tokens_of(engine, [line | {"id": n} for n in range(4)])
    assert engine.stats.vision_steps == 1
    assert len({tuple(ids) for ids in results.values()}) == 1
    serve(engine, [line])
    assert engine.stats.vision_steps == 1, "an idle image is encoded again"


def test_a_batch_without_images_reads_no_cross_layer(checkpoint, requests):
    engine = start(checkpoint("base"), batch=4)
    served = []
    select = engine.executor.graphs.select
    engine.executor.graphs.select = lambda need: served.append(select(need)) or served[-1]
    tokens_of(engine, [line for line in requests("base") if not line.get("images") and "messages" not in line])
    assert served and all(bucket.image_pages == 0 for bucket, _ in served)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 12])
def test_abort_frees_everything_and_leaves_the_others_alone(steps, checkpoint, requests, expected):
    engine = start(checkpoint("base"), batch=3, page_size=16, prefill_tokens=[64])
    lines, results = few(requests), {}
    numbers = {line["id"]: engine.submit(engine.processor.request(line)) for line in lines}
    for _ in range(steps):
        for delta in engine.step():
            results |= {delta.id: delta.result} if delta.result else {}
    gone = [id for id in numbers if id not in results][::2]
    for id in gone:
        engine.abort(numbers[id])
    engine.run(lambda delta: results.update({delta.id: delta.result}) if delta.result else None)
    assert {id: r.token_ids for id, r in results.items()} == {
        id: ids for id, ids in expected("base").items() if id not in gone
    }
    assert engine.idle and engine.load == 0 and holds_nothing(engine)


def test_only_a_vision_step_is_given_pixels(checkpoint, requests):
    engine = start(checkpoint("base"), batch=2)
    given = []
    execute = engine.executor.execute
    engine.executor.execute = lambda step: given.append(step) or execute(step)
    serve(engine, few(requests)[:4])
    assert {type(step) for step in given if b"TiledImage" in pickle.dumps(step)} == {VisionStep}
