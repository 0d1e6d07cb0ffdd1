"""Tensor-parallel ranks as real processes: the same tokens, and an end to every failure."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from engines import GRAPH_PLAN, arguments, serve, start
from test_engine import LOGPROB, few

ROOT = Path(__file__).parents[1]
LIMITS = ["model=custom", "dtype=fp32", "max_input_length=300", "max_output_length=100", "plan.page_size=16"]
# Processes of a run end within this long of a failure, on a machine whose cores are taken.
END_SECONDS = 30


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def command(folder: Path, *given: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *LIMITS, f"hydra.run.dir={folder}", *given]


def run(folder: Path, *given: str, code: int = 0, **variables: str) -> dict:
    """run.py to its end; result.json and results.jsonl."""
    done = subprocess.run(command(folder, *given), capture_output=True, text=True, env=environment(**variables),
                          cwd=folder.parent, timeout=400)
    assert done.returncode == code, done.stderr + "".join(p.read_text() for p in folder.glob("ranks/*.log"))
    assert "Traceback" not in done.stdout + done.stderr
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return json.loads((folder / "result.json").read_text()) | {"lines": lines, "err": done.stderr}


@pytest.fixture(scope="module")
def file(tmp_path_factory, requests):
    """file(spec, changes as JSON) -> a requests file: all requests, those of FEW where changes are given."""

    @cache
    def write(name: str, changes: str = "") -> Path:
        lines = [line | json.loads(changes) for line in few(requests, name)] if changes else requests(name)
        path = tmp_path_factory.mktemp("requests") / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def wrong(lines: list[dict], results: dict) -> list:
    """Requests whose tokens are not those of one rank, or whose log-probabilities are off."""
    faults = []
    for line in lines:
        one = results[line["id"]]
        if line["token_ids"] != one.token_ids:
            faults.append(line["id"])
        for ours, theirs in zip(line.get("logprobs") or [], one.logprobs or [], strict=True):
            if max(abs(a - b) for a, b in zip([ours["logprob"], *ours["top_logprobs"]],
                                              [theirs["logprob"], *theirs["top_logprobs"]])) > LOGPROB:
                faults.append((line["id"], "log-probabilities"))
    return faults


# ---- the same tokens


@pytest.mark.parametrize("name, tp", [("half", 2), ("wide", 4), ("cross_first", 8)])
def test_every_request_gives_the_tokens_of_one_rank(name, tp, checkpoint, requests, file, tmp_path):
    # The engine of one rank is held to the oracle in test_engine.py; no seed of these specs has a near tie.
    lines = requests(name) if tp < 8 else few(requests, name)
    given = file(name) if tp < 8 else file(name, "{}")
    one = serve(start(checkpoint(name), batch=8, page_size=16), lines)
    done = run(tmp_path / "out", f"weights={checkpoint(name)}", f"requests={given}", "backend=eager", "batch=8", f"tp={tp}")
    assert len(done["lines"]) == len(lines)
    assert not wrong(done["lines"], one)
    assert len(list((tmp_path / "out" / "ranks").glob("*.log"))) == tp
    assert not list(Path("/dev/shm").glob("mllama_graph-*"))


def test_sampled_text_is_that_of_one_rank(checkpoint, requests, file, tmp_path):
    changes = json.dumps({"temperature": 0.9, "top_p": 0.9, "seed": 7})
    more = json.dumps({"temperature": 0.8, "top_k": 20, "seed": 8, "logprobs": 3})
    for n, change in enumerate((changes, more)):
        one = serve(start(checkpoint("half"), batch=8), [line | json.loads(change) for line in few(requests, "half")])
        done = run(tmp_path / f"out{n}", f"weights={checkpoint('half')}", f"requests={file('half', change)}", "backend=eager",
                   "batch=3", "tp=2")
        assert not wrong(done["lines"], one)


def test_compiled_graphs_are_shared_by_the_ranks_and_found_again(checkpoint, requests, file, tmp_path):
    name, plan = "half", arguments(GRAPH_PLAN | {"pages": [25], "max_input_length": 300, "max_output_length": 100})
    lines = [line for line in few(requests, name) if line["id"] in ("text_64", "chain_of_three_48", "same_image_twice_49")]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = [part for part in plan if not part.startswith(("plan.images", "max_images"))] + ["plan.images=[4]", "max_images=4"]
    one = serve(start(checkpoint(name), batch=8), lines)
    given = [f"weights={checkpoint(name)}", f"requests={path}", "tp=2", f"graph_cache={tmp_path / 'graphs'}", *plan]
    for compile, source in (("wait", "compiled"), ("never", "hit")):
        done = run(tmp_path / compile, *given, f"plan.compile={compile}")
        assert not wrong(done["lines"], one)
        assert done["graphs"] and {graph["source"] for graph in done["graphs"]} == {source}
    entries = list((tmp_path / "graphs").glob("*/graph.pt2"))
    assert len(entries) == len(done["graphs"]), "ranks compile graphs of their own"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_runs_at_two_ranks(dtype, checkpoint, requests, file, tmp_path):
    one = serve(start(checkpoint("half"), batch=8), few(requests, "half"))
    done = run(tmp_path / "out", f"weights={checkpoint('half')}", f"requests={file('half', '{}')}", "backend=eager", "batch=8",
               "tp=2", f"dtype={dtype}")
    # As at one rank (test_engine.py): rounding may flip a late token, not many first ones.
    assert sum(line["token_ids"][0] == one[line["id"]].token_ids[0] for line in done["lines"]) >= len(done["lines"]) - 1


def test_deterministic_runs_are_equal_to_the_last_bit(checkpoint, file, tmp_path):
    given = [f"weights={checkpoint('half')}", f"requests={file('half', json.dumps({'logprobs': 3}))}", "backend=eager", "batch=4",
             "tp=2", "dtype=bf16", "deterministic=true"]
    first, second = (run(tmp_path / name, *given)["lines"] for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one["token_ids"] == other["token_ids"] and one["logprobs"] == other["logprobs"]


def test_gloo_serves_where_shared_memory_is_not_wanted(checkpoint, requests, file, tmp_path):
    one = serve(start(checkpoint("half"), batch=8), few(requests, "half"))
    done = run(tmp_path / "out", f"weights={checkpoint('half')}", f"requests={file('half', '{}')}", "backend=eager", "batch=8",
               "tp=2", "collectives=distributed")
    assert not wrong(done["lines"], one)


def test_processes_of_torchrun_join_instead_of_spawning(checkpoint, requests, file, tmp_path):
    one = serve(start(checkpoint("half"), batch=8), few(requests, "half"))
    given = [f"weights={checkpoint('half')}", f"requests={file('half', '{}')}", "backend=eager", "batch=8", "tp=2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=20041", "--standalone",
         *command(tmp_path / "out", *given)[1:]],
        capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert not wrong(lines, one)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "a rank other than 0 wrote a folder of its own"


# ---- failures


@dataclass
class Running:
    """A run in progress with two ranks, which would go on for minutes."""

    process: subprocess.Popen
    folder: Path

    def ranks(self) -> dict[int, int]:
        """rank -> process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for child in children:
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            found |= {int(v.removeprefix("RANK=")): int(child) for v in variables if v.startswith("RANK=")}
        return found

    def finished(self) -> list[dict]:
        path = self.folder / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def running(checkpoint, tmp_path):
    """A run with one short request that has finished, and others that go on."""
    lines = [{"input_ids": [1, 2, 3], "max_new_tokens": 2, "id": "short"}] + [
        {"input_ids": [1, n], "max_new_tokens": 30000, "ignore_eos": True, "id": n} for n in range(3)]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = subprocess.Popen(
        command(tmp_path / "out", f"weights={checkpoint('half')}", f"requests={path}", "backend=eager", "batch=4", "tp=2",
                "timeout=4", "max_output_length=30000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)
    run, until = Running(process, tmp_path / "out"), time.monotonic() + 120
    while not run.finished() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert run.finished(), process.communicate(timeout=5) if process.poll() is not None else "nothing finished"
    yield run
    process.kill()


def ended(running: Running, ranks: dict[int, int], code: int) -> str:
    """The run ends soon, with an error of one line; nothing is left of it, and the finished request is there."""
    out, err = running.process.communicate(timeout=END_SECONDS)
    assert running.process.returncode == code, err
    assert "Traceback" not in out + err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    for pid in ranks.values():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z"
    assert not list(Path("/dev/shm").glob("mllama_graph-*"))
    assert [result["id"] for result in running.finished()] == ["short"]
    assert json.loads((running.folder / "result.json").read_text())["error"] == line.removeprefix("error: ")
    return line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(running, rank):
    ranks = running.ranks()
    os.kill(ranks[rank], signal.SIGKILL)
    assert f"rank {rank} was killed by SIGKILL" in ended(running, ranks, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(running, rank):
    ranks = running.ranks()
    os.kill(ranks[rank], signal.SIGSTOP)
    line = ended(running, ranks, 1)
    assert f"rank {1 - rank}: rank {rank} " in line and "4 s" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_run(running, number):
    ranks = running.ranks()
    running.process.send_signal(number)
    assert "interrupted; finished requests are in" in ended(running, ranks, 130)


def test_a_killed_supervisor_takes_its_ranks_with_it(running):
    ranks = running.ranks()
    running.process.kill()
    until = time.monotonic() + END_SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


# ---- shapes alone


def test_shapes_alone_are_traced_on_every_rank(tmp_path):
    done = run(tmp_path / "out", "model=mid", "weights=meta", "tp=4", "plan.prefill_tokens=[32]", "plan.pages=[25]",
               "plan.images=[4]", "dtype=bf16")
    metrics = done["metrics"]
    assert len(done["graphs"]) == metrics["graphs"] and {graph["source"] for graph in done["graphs"]} == {"traced"}
    held, replicated = metrics["rank_weight_bytes"], sum(metrics["replicated_bytes"].values())
    assert len(held) == 4 and sum(held) == metrics["model_weight_bytes"] + 3 * replicated


# ---- compilers


def processes_with(variable: str) -> list[int]:
    """Processes that were started with this in their environment, zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_an_interrupt_ends_the_compilers_too(tp, checkpoint, tmp_path):
    mark = f"MARK_OF_THIS_TEST={os.urandom(8).hex()}"
    process = subprocess.Popen(
        command(tmp_path / "out", f"weights={checkpoint('half')}", f"graph_cache={tmp_path / 'graphs'}", f"tp={tp}",
                "plan.compile=wait", "prompt=hi"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment(**dict([mark.split("=")])), start_new_session=True)
    for line in process.stderr:
        if line.startswith("compiling"):
            break
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=END_SECONDS)
    assert process.returncode == 130
    until = time.monotonic() + END_SECONDS
    while processes_with(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_with(mark)
