"""A chat and a file of requests on the command line: printed output, result files and exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SPECS
from commands import HOSTILE, QUICK, ROOT, assert_kept, interrupted, run
from engines import serve, start
from request_cases import random_image

# Two images of 90 x 60 pixels: without downscaling each needs 2 x 2 tiles of 56 pixels, with 50 tokens per tile.
TWO_IMAGES = 2 * 4 * 50


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n, name in enumerate(("a.png", "b 'q', (c)=d.png")):
        random_image(90, 60 + n, "RGB", np.random.default_rng(n)).save(folder / name)
    return folder


# ---- one chat


@pytest.fixture(scope="module")
def chat(checkpoint, pictures, tmp_path_factory):
    """A chat whose prompt, system message and image names hold characters with a meaning in Hydra's grammar."""
    return run(
        tmp_path_factory.mktemp("chat") / "out",
        *QUICK,
        f"weights={checkpoint('base')}",
        f"prompt={HOSTILE}",
        f"system=Be brief, 'please' ({HOSTILE[:9]}).",
        f"image={pictures}",
        "batch=2",
    )


def test_a_chat_of_hostile_characters_arrives_literally(chat, checkpoint, pictures):
    assert chat.code == 0, chat.err
    config = chat.result()["config"]
    assert config["prompt"] == HOSTILE and config["image"] == str(pictures)
    engine = start(checkpoint("base"), max_output_length=8)
    names = sorted(str(path) for path in pictures.iterdir())
    engine.submit(engine.processor.chat(0, HOSTILE, names, f"Be brief, 'please' ({HOSTILE[:9]})."))
    results = []
    engine.run(lambda delta: results.append(delta.result) if delta.result else None)
    assert chat.result()["token_ids"] == results[0].token_ids
    assert chat.result()["text"] == results[0].text
    assert chat.lines()[0]["prompt_tokens"] == results[0].prompt_tokens


def test_the_text_is_on_stdout_then_a_table_and_the_rest_on_stderr(chat):
    text = chat.result()["text"]
    assert chat.out.startswith(text + "\n")
    after = chat.out[len(text) :]
    for name in (
        "prompt tokens",
        "image tokens",
        "new tokens",
        "time to first token",
        "time per token",
        "tokens/s",
        "bytes read per step",
        "GB/s",
    ):
        assert re.search(rf"^ *{re.escape(name)}  +[\d.]+", after, re.MULTILINE), name
    assert "plan: prefill_tokens=" in chat.err and "weights: " in chat.err


def test_result_json_has_the_documented_fields(chat):
    result = chat.result()
    assert set(result) == {"status", "error", "config", "versions", "metrics", "graphs", "text", "token_ids"}
    assert (result["status"], result["error"], result["graphs"]) == ("ok", None, [])
    assert {"torch", "transformers", "hydra-core"} <= set(result["versions"])
    metrics, line = result["metrics"], chat.lines()[0]
    assert metrics["prompt_tokens"] == line["prompt_tokens"] and metrics["image_tokens"] == line["image_tokens"]
    assert metrics["new_tokens"] == len(result["token_ids"]) <= 8
    for name in (
        "time_to_first_token_ms",
        "time_per_output_token_ms",
        "tokens_per_second",
        "bytes_per_step",
        "gb_per_second",
        "memory_bytes",
    ):
        assert metrics[name] > 0, name


def test_a_single_chat_also_writes_results_jsonl(chat):
    [line] = chat.lines()
    assert {
        "id",
        "token_ids",
        "text",
        "finish_reason",
        "prompt_tokens",
        "image_tokens",
        "cached_tokens",
        "time_to_first_token_ms",
        "time_per_output_token_ms",
    } == set(line)
    assert line["token_ids"] == chat.result()["token_ids"] and line["finish_reason"] in ("stop", "length")
    assert line["image_tokens"] == TWO_IMAGES


def test_each_run_has_its_own_folder_and_images_are_separated_by_commas(checkpoint, pictures, tmp_path):
    """Without hydra.run.dir, a run writes to outputs/<date>/<time> in the working directory."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "run.py"),
            *QUICK,
            f"weights={checkpoint('base')}",
            "prompt=hi",
            f"image={pictures}/a.png,{pictures}/a.png",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("outputs/*/*/result.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}", str(path.parent.relative_to(tmp_path / "outputs")))
    assert {"result.json", "results.jsonl", "run.log", ".hydra"} <= {entry.name for entry in path.parent.iterdir()}
    assert json.loads(path.read_text())["metrics"]["image_tokens"] == TWO_IMAGES


# ---- a file of requests


def test_bad_lines_get_an_error_each_and_the_others_their_results_in_order(checkpoint, requests, tmp_path):
    image, embeddings = SPECS["base"].vocab, SPECS["base"].vocab + 8
    good = [
        line
        for line in requests("base")
        if line["id"] in ("text_16", "text_before_image_32", "messages_images", "chain_of_two_65", "prompt_text")
    ]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(Path(good[1]["images"][0]).read_bytes()[:300])
    bad = {
        "missing image": ({"prompt": "x", "images": ["nowhere.png"]}, "nowhere.png.*does not exist"),
        "corrupt image": ({"prompt": "x", "images": ["text.png"]}, "text.png"),
        "truncated image": ({"prompt": "x", "images": ["half.png"]}, "half.png"),
        "more tokens than images": (
            {"input_ids": [1, image, image], "images": good[1]["images"]},
            "2 .* tokens for 1 images",
        ),
        "no token for an image": ({"input_ids": [1, 2], "images": good[1]["images"]}, "0 .* tokens for 1 images"),
        "too long": ({"input_ids": [1] * 301}, "has 301 ids, max_input_length=300"),
        "too many new": ({"input_ids": [1] * 300, "max_new_tokens": 500}, "the plan holds"),
        "empty prompt": ({"prompt": ""}, "empty"),
        "no kind": ({"max_new_tokens": 3}, "exactly one of"),
        "empty ids": ({"input_ids": []}, "empty"),
        "id out of range": ({"input_ids": [embeddings]}, "ids run from 0"),
        "wrong option": ({"prompt": "x", "temperature": "hot"}, "temperature"),
        "overflow": ({"prompt": "x", "temperature": 1, "top_k": 2**70}, "top_k"),
        "long name": ({"prompt": "x", "images": ["n" * 5000]}, "picture 1 .nnn"),
        "null in name": ({"prompt": "x", "images": ["a\0b"]}, "picture 1 .a"),
        "bad uri": ({"prompt": "x", "images": ["data:image/png;base64,!"]}, "base64"),
        "list as id": ({"prompt": "x", "images": {"a": 1}}, "images must be"),
    }
    written, wanted = [], []
    for n, (name, (request, message)) in enumerate(bad.items()):
        if n % 4 == 0 and n // 4 < 4:
            written.append(json.dumps(good[n // 4]))
            wanted.append((good[n // 4]["id"], None))
        written.append(json.dumps({"id": name} | request))
        wanted.append((name, message))
    written += [
        "{not json",
        "",
        "[1, 2]",
        json.dumps(good[0]),
        json.dumps({"prompt": "no id", "max_new_tokens": 2}),
        json.dumps(good[4]),
    ]
    last = len(written)
    wanted += [
        (last - 5, "not valid JSON"),
        (last - 3, "not a JSON object"),
        (good[0]["id"], "used by an earlier line"),
        (last - 1, None),
        (good[4]["id"], None),
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(written) + "\n")
    done = run(
        tmp_path / "out",
        *QUICK,
        f"weights={checkpoint('base')}",
        f"requests={tmp_path / 'requests.jsonl'}",
        "batch=4",
        "max_output_length=100",
    )
    assert done.code == 0, done.err
    lines = done.lines()
    assert [line["id"] for line in lines] == [id for id, _ in wanted]
    expected = serve(start(checkpoint("base"), batch=2), good)
    for line, (id, message) in zip(lines, wanted):
        if message:
            assert line["finish_reason"] == "error" and re.search(message, line["error"]), line
            assert "\n" not in line["error"] and len(line["error"]) < 500
        else:
            assert "error" not in line
            if id in expected:
                assert (line["token_ids"], line["text"]) == (expected[id].token_ids, expected[id].text)
                assert ("logprobs" in line) == any("logprobs" in request for request in good if request["id"] == id)
    steps = [step for line in lines for step in line.get("logprobs", [])]
    assert steps and all(set(step) == {"id", "logprob", "top_ids", "top_logprobs"} for step in steps)
    assert done.result()["metrics"]["requests"] == len(good) + 1


def test_an_interrupt_keeps_every_finished_line(checkpoint, tmp_path):
    assert_kept(interrupted(tmp_path, 200, *QUICK, f"weights={checkpoint('base')}"), 200)
