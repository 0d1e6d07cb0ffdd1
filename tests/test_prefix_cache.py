"""Requests that begin as earlier ones: what is computed again, and that no result changes by a bit."""

import pytest
import torch
from engines import holds_nothing, resolved, run_of, serve, start
from scheduling import IMAGE_TOKEN, answer, image, tight
from scheduling import serve as simulate
from test_finite import with_row

from mllama_graph.engine.steps import NOT_FINITE, PrefillStep, VisionStep

CHATS = ("text_64", "image_255", "text_before_image_63", "three_images_127", "chain_of_three_48", "one_then_chain_129")
WIDE = {"prefill_tokens": [32], "num_pages": 200}


def computed(steps) -> dict[int, int]:
    """Sequence -> the number of prompt tokens that were computed."""
    counts: dict[int, int] = {}
    for row in (row for step in steps if isinstance(step, PrefillStep) for row in step.rows):
        counts[row.sequence] = counts.get(row.sequence, 0) + len(row.ids)
    return counts


def test_questions_on_one_document_compute_it_once():
    document = (5, IMAGE_TOKEN, *range(100, 130))
    work = [((*document, 200 + n, 201), (image("a"),), 2) for n in range(7)]
    steps = simulate(tight(**WIDE), 3, work).steps
    assert computed(steps) == {0: 34} | dict.fromkeys(range(1, 7), 2)
    assert sum(isinstance(step, VisionStep) for step in steps) == 1


def test_only_the_same_ids_and_the_same_pictures_are_found():
    ids, pictures = (1, 2, 3, IMAGE_TOKEN, *range(20, 28), IMAGE_TOKEN, 9), (image("a"), image("b"))
    work = [
        (ids, pictures, 1),
        (ids, pictures, 1),
        (ids, (image("a"), image("c")), 1),
        (ids, (image("c"), image("b")), 1),
        ((*ids[:5], 99, *ids[6:]), pictures, 1),
        ((7, *ids), pictures, 1),
    ]
    # Pages of 4: the first ends with the first picture, the fourth begins with the second.
    assert computed(simulate(tight(**WIDE), 1, work).steps) == {0: 14, 1: 2, 2: 2, 3: 14, 4: 10, 5: 15}
    assert set(computed(simulate(tight(**WIDE), 1, work, prefix_cache=False).steps).values()) == {14, 15}


def test_at_least_one_token_is_computed():
    assert computed(simulate(tight(**WIDE), 1, [((1,) * 16, (), 1)] * 2).steps) == {0: 16, 1: 4}


def test_pages_after_a_token_that_could_not_be_sampled_are_not_found():
    turn = (1, 2, *(answer(0, 2 + n) for n in range(2)))
    # The third token fails after the step that fills the page.
    served = simulate(tight(**WIDE), 1, [(turn[:2], (), 5), ((*turn, 3), (), 1)], spoiled={0})
    assert served.tokens[0][2] == NOT_FINITE and computed(served.steps)[1] == 5


def turns(engine, first: list[dict]) -> list[dict]:
    """The results of three turns of conversations: each sends the one before, its answer and new ids."""
    lines, results = [line | {"logprobs": 3, "max_new_tokens": 20} for line in first], []
    for _ in range(3):
        results.append(serve(engine, lines))
        lines = [
            line | {"input_ids": line["input_ids"] + results[-1][line["id"]].token_ids + line["input_ids"][-3:][:2] * 4}
            for line in lines
        ]
    return results


@pytest.mark.parametrize(
    "plan", [{"kv": "auto"}, {"kv": "int8", "prefill_tokens": [48]}, {"num_pages": 40, "batch": 2}], ids=str
)
def test_turns_of_conversations_do_not_change_by_a_bit(plan, checkpoint, requests):
    # Ids at the end of a line are repeated, so a line must not end with a picture.
    first = [line for line in requests("base") if line["id"] in CHATS]
    assert len(first) == len(CHATS)
    plan = {"batch": 8, "page_size": 16, "kernels": "native", "max_input_length": 400} | plan
    engine = start(checkpoint("base"), **plan)
    cached, fresh = turns(engine, first), turns(start(checkpoint("base"), **plan, prefix_cache=False), first)
    for n, (ours, theirs) in enumerate(zip(cached, fresh, strict=True)):
        for id, result in theirs.items():
            assert ours[id].token_ids == result.token_ids and ours[id].logprobs == result.logprobs
            assert result.cached_tokens == 0
            # What a prompt step computed is found. Answers are computed once more: decode steps give other bits.
            before = cached[n - 1][id].prompt_tokens if n else 0
            assert ours[id].cached_tokens == before // 16 * 16 or "num_pages" in plan
    assert holds_nothing(engine)


def test_many_questions_on_one_document_do_not_change_by_a_bit(checkpoint, requests):
    line = next(line for line in requests("base") if line["id"] == "image_255")
    lines = [line | {"id": n, "input_ids": line["input_ids"] + [n + 5, 7], "logprobs": 2} for n in range(12)]
    plan = {"batch": 8, "page_size": 16, "kernels": "native"}
    engine = start(checkpoint("base"), **plan)
    cached, fresh = serve(engine, lines), serve(start(checkpoint("base"), **plan, prefix_cache=False), lines)
    for id, result in fresh.items():
        assert cached[id].token_ids == result.token_ids and cached[id].logprobs == result.logprobs
        assert cached[id].cached_tokens == (240 if id else 0)


def test_a_failed_request_leaves_the_pages_that_it_shares(checkpoint, tmp_path):
    folder = with_row(checkpoint("base"), tmp_path / "checkpoint", 7, torch.nan)
    document = list(range(20, 60))
    lines = [{"id": n, "input_ids": document + [last], "max_new_tokens": 6} for n, last in enumerate([8, 7, 9, 8])]
    plan = {"batch": 4, "page_size": 16, "kernels": "native"}
    cached, fresh = (serve(start(folder, **plan, prefix_cache=on), lines) for on in (True, False))
    assert [cached[n].token_ids for n in range(4)] == [fresh[n].token_ids for n in range(4)]
    assert "not finite" in cached[1].error and cached[3].cached_tokens == 32


def test_a_deterministic_run_keeps_pages_only_where_the_split_of_a_prompt_changes_no_bit(checkpoint):
    for kernels, kept in (("plain", False), ("native", True)):
        assert resolved(run_of(checkpoint("base"), kernels=kernels, deterministic=True)).prefix_cache is kept
        assert resolved(run_of(checkpoint("base"), kernels=kernels)).prefix_cache
        assert not resolved(run_of(checkpoint("base"), kernels=kernels, prefix_cache=False)).prefix_cache
