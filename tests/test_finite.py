"""Logits that are not finite are an error of their request alone, and results are always JSON by its standard."""

import json
import shutil

import pytest
import torch
from checkpoints import SPECS
from commands import served
from engines import GRAPH_PLAN, GRAPH_SPEC, holds_nothing, serve, start, tokens_of
from safetensors.torch import load_file, save_file
from test_engine import few
from test_ranks import written

from mllama_graph.core.report import strict_json

# Values of a row that a fine-tune which diverged, or an overflow in fp16, leaves in a checkpoint.
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def with_row(source, folder, id: int, value: float):
    """A copy of a checkpoint where the embedding of one id is not finite."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if name.endswith("embed_tokens.weight"):
                weights[name][id] = value
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sound(checkpoint, requests):
    """(lines, their tokens on a sound checkpoint, an id in none of them)."""
    lines = [line for line in few(requests) if "input_ids" in line]
    expected = tokens_of(start(checkpoint("base"), batch=8), lines)
    used = {id for ids in expected.values() for id in ids} | {id for line in lines for id in line["input_ids"]}
    return lines, expected, next(id for id in range(1, SPECS["base"].vocab) if id not in used)


def bad_lines(id: int) -> list[dict]:
    options = [{}, {"temperature": 1.0}, {"logprobs": 3}, {"temperature": 0.7, "top_k": 9, "logprobs": 2, "seed": 4}]
    return [
        {"id": f"bad {n}", "input_ids": [3] * before + [id] + [4] * after, "max_new_tokens": 9} | more
        for n, more in enumerate(options)
        for before, after in [(2 + n, 19 * n)]
    ]


OVERLAPPED = {"overlap": True, "candidates": 8}


@pytest.mark.parametrize(
    "kernels, value, how", [("plain", "nan", {}), ("plain", "-inf", OVERLAPPED), ("native", "inf", {})]
)
def test_a_request_without_finite_logits_fails_and_leaves_its_neighbours_alone(
    kernels, value, how, checkpoint, sound, tmp_path
):
    lines, expected, bad = sound
    folder = with_row(checkpoint("base"), tmp_path / "checkpoint", bad, VALUES[value])
    # So few pages that those of a failed request are used again at once.
    engine = start(folder, kernels=kernels, batch=4, page_size=16, num_pages=40, **how)
    failing = bad_lines(bad)
    mixed = [line for pair in zip(failing * 3, lines) for line in pair] + lines[len(failing) * 3 :]
    results = {line["id"]: [] for line in mixed}
    for line in mixed:
        engine.submit(engine.processor.request(line))
    engine.run(lambda delta: results[delta.id].append(delta.result) if delta.result else None)
    assert {line["id"]: results[line["id"]][0].token_ids for line in lines} == expected
    for result in (result for line in failing for result in results[line["id"]]):
        assert result.finish_reason == "error" and result.token_ids == [] and result.logprobs is None
        assert result.error.startswith("logits are not finite at step 1: ")
    assert holds_nothing(engine)


def test_the_error_names_the_step_of_the_token(checkpoint, sound, tmp_path):
    lines, expected, _ = sound
    line = next(line for line in lines if line["id"] == "text_64")
    ids = expected["text_64"]
    id = next(id for id in ids[2:] if id not in line["input_ids"])
    engine = start(with_row(checkpoint("base"), tmp_path / "checkpoint", id, torch.nan))
    [result] = serve(engine, [line]).values()
    # The id is fed to the step after the one that gave it; steps count from 1.
    assert result.error.startswith(f"logits are not finite at step {ids.index(id) + 2}: ")


def test_an_image_that_is_not_finite_spoils_only_its_own_requests(checkpoint, requests):
    by_id = {line["id"]: line for line in requests("base")}
    pictured, text = by_id["bos_image"], by_id["text_64"]
    other = by_id["grey_26"]
    expected = tokens_of(start(checkpoint("base"), batch=4), [other, text])
    # Pages of 64 that the images don't fill, and so few that the second image takes those of the first.
    engine = start(checkpoint("base"), batch=4, page_size=64, num_images=1, max_images=1)
    tokens_of(engine, [pictured])
    for layer in engine.executor.rank.image_pages:
        for data in layer:
            data.fill_(torch.nan)
    together = serve(engine, [pictured | {"id": "again"}, text])
    assert "not finite" in together["again"].error and together["text_64"].token_ids == expected["text_64"]
    assert tokens_of(engine, [other]) == {"grey_26": expected["grey_26"]}


def test_compiled_graphs_and_three_ranks_fail_in_the_same_way(checkpoint, warm, tmp_path):
    folder = with_row(checkpoint(GRAPH_SPEC), tmp_path / "checkpoint", 7, torch.nan)
    lines = [{**line, "input_ids": [7 if id == 7 else 3 for id in line["input_ids"]][:20]} for line in bad_lines(7)]
    lines.append({"id": "sound", "input_ids": [1, 2, 3], "max_new_tokens": 4, "logprobs": 1})
    engine = start(folder, **GRAPH_PLAN, backend="inductor", compile="never", graph_cache=str(warm[0]))
    results = serve(engine, lines)
    failed = {id: result.error for id, result in results.items() if result.error}
    assert set(failed) == {f"bad {n}" for n in range(4)} and all("at step 1" in error for error in failed.values())
    assert results["sound"].token_ids
    done = served(
        tmp_path / "out",
        f"weights={folder}",
        f"requests={written(tmp_path / 'requests.jsonl', lines)}",
        "backend=eager",
        "batch=3",
        "tp=3",
    )
    by_id = {line["id"]: line for line in done["lines"]}
    assert {id: line["error"] for id, line in by_id.items() if "error" in line} == failed
    assert by_id["sound"]["token_ids"] == results["sound"].token_ids


def test_json_has_no_number_that_is_not_finite():
    def refuse(name):
        raise AssertionError(name)

    given = {"a": [1.5, torch.nan, (torch.inf, "NaN")], "b": {"c": -torch.inf}, "d": None}
    assert json.loads(strict_json(given), parse_constant=refuse) == {
        "a": [1.5, None, [None, "NaN"]],
        "b": {"c": None},
        "d": None,
    }
