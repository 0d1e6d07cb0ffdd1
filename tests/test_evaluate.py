"""task=evaluate: counts of right answers, and its controls without the right images."""

import json

import pytest
from commands import QUICK, run
from engines import serve, start


@pytest.fixture(scope="module")
def answered(checkpoint, requests, tmp_path_factory):
    """A requests file of prompts with images and the engine's own answers as references, one of them made wrong."""
    folder = tmp_path_factory.mktemp("answered")
    by_id = {line["id"]: line for line in requests("base")}
    images = [by_id[name]["images"] for name in ("bos_image", "text_before_image_32", "grey_26", "image_last_33")]
    lines = [
        {"id": n, "prompt": f"What is {n}?", "images": given, "max_new_tokens": 12, "kind": "ab"[n % 2]}
        for n, given in enumerate(images)
    ] + [{"id": 4, "prompt": "Hello", "max_new_tokens": 12, "kind": "text"}]
    results = serve(start(checkpoint("base")), lines)
    for line in lines:
        line["answer"] = ["something else", results[line["id"]].text]
    lines[1]["answer"] = "wrong"
    (folder / "requests.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"id": 9, "prompt": "no answer"}\n'
    )
    return folder / "requests.jsonl"


def test_exact_match_counts_each_kind_and_falls_without_the_right_images(answered, checkpoint, tmp_path):
    done = run(
        tmp_path / "out", *QUICK, "task=evaluate", f"weights={checkpoint('base')}", f"requests={answered}", "batch=3"
    )
    assert done.code == 0, done.err
    scores = done.result()["metrics"]["exact_match"]
    assert scores["right %"] == {"a": 100.0, "b": 50.0, "text": 100.0, "all": 80.0}
    # Random weights answer every image differently, so that only the line without one stays right.
    for control in ("images exchanged", "images unseen"):
        assert scores[control] == {"a": 0.0, "b": 0.0, "text": 100.0, "all": 20.0}, control
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [p["right"] for p in predictions] == [True, False, True, True, True]
    assert predictions[1]["answer"] == ["wrong"] and predictions[1]["kind"] == "b"
    assert "all" in done.out and "80.0" in done.out


def test_a_file_without_answers_is_refused(checkpoint, tmp_path):
    (tmp_path / "requests.jsonl").write_text('{"prompt": "x"}\n')
    done = run(
        tmp_path / "out",
        *QUICK,
        "task=evaluate",
        f"weights={checkpoint('base')}",
        f"requests={tmp_path / 'requests.jsonl'}",
    )
    assert done.code == 2 and "no line with an answer" in done.err and "Traceback" not in done.err
    done = run(tmp_path / "none", *QUICK, "task=evaluate", f"weights={checkpoint('base')}")
    assert done.code == 2 and "needs requests=FILE.jsonl with an answer on each line" in done.err
