"""task=batch and the class behind it. The tests of the cluster need the extra `ray`, which CI does not install."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from commands import QUICK, ROOT, command_line, run

from mllama_graph.core.errors import RankFailed, UserError
from mllama_graph.engine.results import Result
from mllama_graph.scale.answers import FAULT, KEY, LINE, LOST, NUMBER, Answers, id_of, request_of
from mllama_graph.scale.attempts import ALONE, TOGETHER, Attempts
from mllama_graph.tasks.batch_options import BatchOptions

TINY = ROOT / "mllama_graph" / "tiny"
SCENE = TINY / "scene.png"
PICTURE = SCENE.read_bytes()
ASKED = {"prompt": "What do you see?"}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'mllama_graph[ray]'")

ROWS = {
    "a line": (
        {NUMBER: 3, LINE: b'{"prompt": "a", "extra": 1}', FAULT: None, "row": "f:3"},
        {"prompt": "a", "extra": 1},
        "3",
    ),
    "a line with an id": ({NUMBER: 3, LINE: b'{"prompt": "a", "id": [1]}', FAULT: None}, {"prompt": "a"}, "[1]"),
    "columns": ({"prompt": "a", "id": 7, "top_k": None, "other": 1}, {"prompt": "a"}, "7"),
    "a picture": ({"image": b"x", "row": "f:0"}, {"images": [b"x"], "prompt": "default"}, "f:0"),
    "a struct": ({"image": {"bytes": b"x", "path": None}, **ASKED}, {"images": [b"x"], **ASKED}, ""),
    "messages as JSON": ({"messages": '[{"role": "user"}]'}, {"messages": [{"role": "user"}]}, ""),
    "a sample": ({KEY: "k", "jpg": b"x", "txt": b"a"}, {"images": [b"x"], "prompt": "a"}, "k"),
    "a sample with fields": (
        {KEY: "k", "b.png": b"y", "a.png": b"x", "json": b'{"prompt": "a", "seed": 1}', "txt": None},
        {"images": [b"x", b"y"], "prompt": "a", "seed": 1},
        "k",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_becomes_a_request_with_an_id(row):
    given, fields, id = ROWS[row]
    found = request_of(given, "default")
    assert {name: value for name, value in found.items() if name != "id"} == fields and id_of(given) == id


@pytest.mark.parametrize(
    "row, reason",
    [
        ({NUMBER: 2, LINE: b"{", FAULT: None}, "line 2 is not valid JSON"),
        ({NUMBER: 2, LINE: None, FAULT: "line 2 is longer than 256 MiB."}, "longer than"),
        ({NUMBER: 2, LINE: b'{"prompt": "\\ud800"}', FAULT: None}, "lone surrogate"),
        ({KEY: "k", "json": b"[1]"}, "not a JSON object"),
        ({"messages": "[{"}, "messages is not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_row_that_is_no_request_gives_its_reason(row, reason):
    with pytest.raises(UserError, match=reason):
        request_of(row)
    id_of(row)


GIVEN = {"input": "none.jsonl", "output": "out"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, "task=batch needs input=. Give the rows to read."),
        ({"input": "none.jsonl"}, "task=batch needs output=."),
        (GIVEN | {"replicas": 0}, "replicas=0 must be at least 1."),
        (GIVEN | {"format": "csv"}, "task.format=csv is not one of parquet, json."),
    ],
    ids=str,
)
def test_options_that_can_not_run_are_refused(options, reason):
    with pytest.raises(UserError, match=reason.replace(".", r"\.")):
        BatchOptions(**options).check()


def test_a_run_without_ray_or_without_rows_is_refused_in_one_line(tmp_path):
    known = importlib.util.find_spec("ray") is not None
    reason = "input=none.jsonl is neither a file nor a folder." if known else "pip install 'mllama_graph[ray]'"
    done = run(tmp_path / "run", "task=batch", "input=none.jsonl", "output=out")
    assert done.code == 2 and reason in done.one_line_error()


LOSES_A_RANK = """
import os, signal, threading
from pathlib import Path
from mllama_graph.scale.answers import Answers

class Table:
    def to_pylist(self):
        return [{"input_ids": [1, 2, 3], "max_new_tokens": 5000, "ignore_eos": True}]

# Without native libraries, which would have to be built first.
keys = {"backend": "eager", "backend.kernels": "plain", "collectives": "distributed"}
answers = Answers("tiny", tp=2, timeout=4, max_output_length=5000, extend_context=True, **keys)
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
[rank] = [int(pid) for pid in children if b"\\0RANK=1\\0" in Path(f"/proc/{pid}/environ").read_bytes()]
threading.Timer(0.5, os.kill, (rank, signal.SIGKILL)).start()
answers(Table())
"""


def test_a_replica_that_loses_a_rank_ends_so_that_ray_starts_another(tmp_path):
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOSES_A_RANK], capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=100
    )
    assert done.returncode == LOST, done.stderr


class Ended(BaseException):
    """Stands for the end of the process, after which Ray serves the rows again in another one."""


class Table:
    def __init__(self, names):
        self._rows = [{"row": name, "prompt": name} for name in names]

    def to_pylist(self):
        return self._rows


class Deadly:
    """In place of LLM: the row `deadly` ends the process, whatever else is served with it."""

    def generate(self, requests):
        prompts = [request()["prompt"] for request in requests]
        if "deadly" in prompts:
            raise Ended
        return [Result(None, [1], prompt, "stop") for prompt in prompts]


def test_a_row_that_ends_its_process_gets_an_error_after_a_few_attempts_and_its_neighbours_answers(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("mllama_graph.scale.answers.LLM", lambda *_, **__: Deadly())
    monkeypatch.setattr("mllama_graph.scale.answers.table_of", lambda rows, results, keep: results)
    ends, names = 0, ["a", "deadly", "b"]
    while True:
        assert ends < 10
        try:
            found = Answers(attempts=tmp_path / "counts")(Table(names))
            break
        except Ended:
            ends += 1
    assert ends == TOGETHER + ALONE
    assert [result.text for result in found] == ["a", "", "b"] and found[0].error is found[2].error is None
    assert found[1].error == "the row ended the process that served it 2 times; it is not served again."
    # Of the three rows together, and of the one alone.
    assert len(list((tmp_path / "counts").iterdir())) == 2
    assert Answers(attempts=tmp_path / "counts")(Table(["a", "b"]))[1].text == "b"


def test_a_start_that_ends_its_process_is_tried_a_few_times_and_a_later_one_counts_anew(tmp_path, monkeypatch):
    outcomes = [Ended, Ended, None, Ended, Ended, Ended]

    def start(*_, **__):
        if outcome := outcomes.pop(0):
            raise outcome

    monkeypatch.setattr("mllama_graph.scale.answers.LLM", start)
    for outcome in list(outcomes):
        with pytest.raises(outcome) if outcome else nullcontext():
            Answers(attempts=tmp_path, starts=3)
    with pytest.raises(RankFailed, match="has ended 3 times while its engine started; it is not started again"):
        Answers(attempts=tmp_path, starts=3)
    assert not outcomes


def test_a_row_that_is_served_alone_has_no_neighbour_in_its_process(tmp_path):
    attempts, order = Attempts(tmp_path), []

    def serve(name, alone):
        with attempts.counted([name], 2, alone):
            order.append(f"begin {name}")
            time.sleep(0.05)
            order.append(f"end {name}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, "abcd", (False, True, False, True)))
    for name in "bd":
        begun = order.index(f"begin {name}")
        assert order[begun + 1] == f"end {name}"
    assert not list(tmp_path.iterdir())


# ---- with Ray


def lines(count: int) -> list[dict]:
    """Requests of a few tokens: half of them with a picture, and some that can't be served."""
    made = [{"prompt": "What can you do?", "max_new_tokens": 4 + n % 5} for n in range(count)]
    for n in range(0, count, 2):
        made[n] |= {"images": [str(SCENE)], **ASKED}
    made[5] |= {"prompt": ""}
    return made


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(output: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def batch(folder: Path, source: Path, *more: str):
    """A run of task=batch without compilation."""
    keys = [key for key in QUICK if key != "model=custom"]
    output = folder / "output"
    return run(folder / "run", "task=batch", f"input={source}", f"output={output}", "batch=4", *keys, *more), output


@needs_ray
def test_results_are_those_of_a_requests_file_and_rows_that_are_there_are_not_served_again(tmp_path):
    source = written(tmp_path / "requests.jsonl", lines(24))
    keys = [key for key in QUICK if key != "model=custom"]
    alone = run(tmp_path / "alone", f"requests={source}", "batch=4", *keys)
    done, output = batch(tmp_path, source, "replicas=2", "task.rows=4")
    assert done.code == 0, done.err
    found = {row["id"]: row for row in results(output)}
    assert len(found) == len(results(output)) == 24
    for line in alone.lines():
        row = found[str(line["id"])]
        assert (row["text"], row["token_ids"], row["error"]) == (line["text"], line["token_ids"], line.get("error"))
    # A second run with more rows serves only those; the earlier ones keep their times.
    written(source, lines(26))
    again, _ = batch(tmp_path, source, "task.rows=4")
    assert again.code == 0 and "2 rows served, 0 of them with an error; 24 were there before" in again.err, again.err
    later = {row["id"]: row for row in results(output)}
    assert len(later) == len(results(output)) == 26 and all(later[id] == row for id, row in found.items())
    other, _ = batch(tmp_path, source, "seed=1")
    assert "seed=0, not 1" in other.one_line_error()


@needs_ray
def test_parquet_and_webdataset_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table({"id": ["p", "q"], "image": [PICTURE, b"no picture"]}), source / "a.parquet")
    with tarfile.open(source / "b.tar", "w") as archive:
        for name, data in (("x/1.png", PICTURE), ("x/1.txt", b"What do you see?"), ("2.json", b'{"prompt": ""}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    done, output = batch(tmp_path, source, "prompt=What do you see?", "task.format=json")
    assert done.code == 0, done.err
    found = [json.loads(line) for path in output.glob("*.json") for line in path.read_text().splitlines()]
    rows = {row["row"]: row for row in found}
    assert rows.keys() == {"a.parquet:0", "a.parquet:1", "b.tar:x/1", "b.tar:2"} and len(found) == 4
    assert rows["a.parquet:0"]["text"] == rows["b.tar:x/1"]["text"] != "" and rows["a.parquet:0"]["id"] == "p"
    assert "picture" in rows["a.parquet:1"]["error"] and "prompt has no text" in rows["b.tar:2"]["error"]


CLUSTER = """
import os, sys
from pathlib import Path
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
second = cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.readline()
raylet = second.all_processes["raylet"][0].process.pid
children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
there = sum(b"Answers" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)
cluster.remove_node(second, allow_graceful=False)
print(f"removed a node with {there} replica", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@needs_ray
def test_a_node_that_is_killed_loses_the_time_of_its_rows_and_no_row(tmp_path):
    count = 160
    source = written(tmp_path / "requests.jsonl", lines(count))
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=-1, stdout=-1, stderr=-3, text=True)
    address = next(line for line in cluster.stdout if ":" in line and " " not in line.strip()).strip()
    keys = [f"input={source}", f"output={tmp_path / 'output'}", "replicas=2", "batch=4", "task.rows=4"]
    quick = [key for key in QUICK if key != "model=custom"]
    command = command_line(tmp_path / "run", "task=batch", *keys, *quick, f"task.address={address}")
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    try:
        until = time.monotonic() + 200
        while len(list((tmp_path / "output").glob("*.parquet"))) < 8:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.1)
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline() == "removed a node with 1 replica\n"
        there = len(results(tmp_path / "output"))
        assert there < count
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        cluster.communicate("\n", timeout=60)
    finally:
        process.kill()
        cluster.kill()
    found = results(tmp_path / "output")
    assert sorted(row["row"] for row in found) == sorted(f"requests.jsonl:{n + 1}" for n in range(count))
    assert sum(row["error"] is not None for row in found) == 1


@needs_ray
def test_a_driver_that_is_killed_is_followed_by_one_that_serves_the_rest(tmp_path):
    count = 120
    source = written(tmp_path / "requests.jsonl", lines(count))
    quick = [key for key in QUICK if key != "model=custom"]
    keys = ["task=batch", f"input={source}", f"output={tmp_path / 'output'}", "batch=4", "task.rows=4", *quick]
    process = subprocess.Popen(
        command_line(tmp_path / "run", *keys), stdout=-3, stderr=-3, cwd=tmp_path, start_new_session=True
    )
    until = time.monotonic() + 200
    while len(list((tmp_path / "output").glob("*.parquet"))) < 4:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run(tmp_path / "again", *keys)
    assert done.code == 0, done.err
    found = results(tmp_path / "output")
    assert sorted(row["row"] for row in found) == sorted(f"requests.jsonl:{n + 1}" for n in range(count))
