"""A run's folder: earlier results are kept, one run at a time, resume=true compares, and refused batches say why."""

import json
import re
import signal
import subprocess

import pytest
from commands import QUICK, ROOT, command_line, run
from engines import start
from filelock import FileLock

from mllama_graph.core.errors import UserError
from mllama_graph.engine.offline import line_hash, serve_lines
from mllama_graph.engine.result_file import Results, check_settings, write_settings
from mllama_graph.inputs.request_file import read_lines

SOUND = {"input_ids": [3, 4, 5], "max_new_tokens": 2}


@pytest.fixture(scope="module")
def engine(checkpoint):
    return start(checkpoint("base"), batch=2, max_output_length=4)


def batch(engine, requests: list, folder, resume=False):
    """The ids in results.jsonl after a batch, and the lines that the user was told."""
    path, told = folder / "requests.jsonl", []
    path.write_text("\n".join(map(json.dumps, requests)))
    results = Results(folder / "results.jsonl", resume).open(told.append)
    serve_lines(engine, read_lines(path), folder, results, 2)
    results.close()
    return ids(results.path), told


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_results_of_an_earlier_run_are_kept_under_a_number(engine, tmp_path):
    for n, name in enumerate("abc"):
        found, told = batch(engine, [SOUND | {"id": name}], tmp_path)
        assert found == [name] and len(told) == (n > 0)
    assert "results.jsonl is kept as results.2.jsonl" in told[0]
    assert ids(tmp_path / "results.1.jsonl") == ["a"] and ids(tmp_path / "results.2.jsonl") == ["b"]


def test_a_resumed_batch_moves_the_results_that_it_does_not_keep(engine, tmp_path):
    batch(engine, [SOUND | {"id": name} for name in "abc"], tmp_path)
    found, [told] = batch(engine, [SOUND | {"id": "d"}, SOUND | {"id": "b"}], tmp_path, resume=True)
    assert found == ["d", "b"] and "2 earlier results belong to no line" in told and "results.1.jsonl" in told
    assert ids(tmp_path / "results.1.jsonl") == ["a", "c"]


def test_a_file_without_an_earlier_line_is_recognised_before_anything_is_changed(engine, tmp_path):
    batch(engine, [SOUND, SOUND | {"id": "b"}], tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    hashes = [line_hash(line) for line in read_lines(tmp_path / "requests.jsonl")]
    results = Results(tmp_path / "results.jsonl", resume=True)
    assert results.has_earlier and results.fits(["other", hashes[1]]) and not results.fits(["other", None])
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert not Results(tmp_path / "none.jsonl", resume=True).has_earlier


def test_resuming_compares_what_results_depend_on(tmp_path):
    settings = {"weights": "/a", "adapter": None, "temperature": 0.0}
    check_settings(tmp_path, settings)
    write_settings(tmp_path, settings)
    check_settings(tmp_path, settings | {"seed": 1})
    for key, value, message in (
        ("temperature", 0.5, "temperature=0.5, but the results in .* were made with temperature=0.0. Use that, or an"),
        ("adapter", "/b:1", "adapter=/b:1, but the results in .* were made with adapter=null"),
    ):
        with pytest.raises(UserError, match=message):
            check_settings(tmp_path, settings | {key: value})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json can't be read as JSON"):
        check_settings(tmp_path, settings)


def test_a_batch_on_the_command_line(checkpoint, tmp_path):
    """One folder through a refused batch, a served one, a second run at once, and resumed ones."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("good", "bad", "other")}
    paths["good"].write_text(json.dumps(SOUND) + "\n[1]\n")
    paths["bad"].write_text('{"input_ids": []}\n[1]\n')
    paths["other"].write_text(json.dumps(SOUND | {"id": "other"}))

    def serve(name, *given):
        return run(
            tmp_path / "out", *QUICK, f"weights={checkpoint('base')}", f"requests={paths[name]}", "batch=2", *given
        )

    refused = serve("bad")
    assert refused.code == 2 and refused.result()["status"] == "error" and len(refused.lines()) == 2
    assert "bad.jsonl could be served. The first error: " in refused.one_line_error()
    assert "empty" in refused.one_line_error()

    served = serve("good")
    assert served.code == 0 and "the first error: line 2 is not a JSON object" in served.err
    assert "is kept as results.1.jsonl" in served.err and served.result()["status"] == "ok"

    with FileLock(tmp_path / "out" / ".lock"):
        second = serve("good")
    assert second.code == 2 and "out is in use by another run" in second.one_line_error()
    assert second.result() == served.result() and second.lines() == served.lines()

    for name, given, message in (
        ("good", "seed=7", "seed=7, but the results in .*out were made with seed=0"),
        ("other", "seed=0", "has results of no line of requests=.*other.jsonl"),
    ):
        done = serve(name, "resume=true", given)
        assert done.code == 2 and re.search(message, done.one_line_error())
        assert "weights: " not in done.err and done.lines() == served.lines()


OTHER_KINDS = {
    "an array": (b'[{"prompt": "a"}, {"prompt": "b"}]', "is a JSON array.*jq -c '.\\[\\]'"),
    "an array in lines": (b'\xef\xbb\xbf[\n{"prompt": "a"}\n]', "is a JSON array"),
    "a document in lines": (b'{\n  "prompt": "a"\n}', "holds JSON over several lines.*jq -c '.'"),
    "a document from its first key": (b'{"prompt": "a",\n "id": 1}', "holds JSON over several lines"),
    "a picture": ((ROOT / "mllama_graph" / "tiny" / "scene.png").read_bytes(), "is a PNG picture. Give it as image="),
}


@pytest.mark.parametrize("content, message", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_file_that_holds_no_requests_is_recognised(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        next(read_lines(tmp_path / "file"))


@pytest.mark.parametrize("first", [b"[1]", b'[{"a": 1}]', b'{"prompt": "a",', b"{", b""])
def test_an_odd_first_line_does_not_refuse_the_file(first, tmp_path):
    sound = [] if first == b"{" else [b'{"prompt": "a"}']
    (tmp_path / "file").write_bytes(b"\n".join([first, *sound]))
    assert [line for _, line in read_lines(tmp_path / "file")][-1].strip() == (sound[-1] if sound else first)


# ---- ended from outside


def test_a_closed_pipe_ends_the_run_without_a_message(checkpoint, tmp_path):
    process = subprocess.Popen(
        command_line(tmp_path / "out", *QUICK, f"weights={checkpoint('base')}", "prompt=hi"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141, err
    assert "error" not in err and "Traceback" not in err and "BrokenPipe" not in err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["error"] == "the reader of the output has ended"


def test_an_interrupt_ends_a_sweep_in_one_line(checkpoint, tmp_path):
    process = subprocess.Popen(
        command_line(tmp_path / "out", "-m", *QUICK, f"weights={checkpoint('base')}", "seed=1,2,3", "prompt=hi"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("plan:"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    said = "".join(said) + err
    assert process.returncode == 130, said
    assert "error: interrupted.\n" in said and "job 2" not in said and "results.jsonl" not in said
    assert "Error executing job" not in said + out and "Traceback" not in said + out
