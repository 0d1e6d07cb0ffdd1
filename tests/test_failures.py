"""A failure ends a run with ranks soon, with one error line, and leaves no process or shared memory behind."""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import LIMITS, command_line

# All processes of a run end within these seconds after a failure, even on a busy machine.
END_SECONDS = 30


@dataclass
class Running:
    """A run with two ranks in progress, which would continue for minutes."""

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
    """A run with one short request that has finished, and others in progress."""
    lines = [{"input_ids": [1, 2, 3], "max_new_tokens": 2, "id": "short"}] + [
        {"input_ids": [1, n], "max_new_tokens": 30000, "ignore_eos": True, "id": n} for n in range(3)
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = subprocess.Popen(
        command_line(
            tmp_path / "out",
            *LIMITS,
            f"weights={checkpoint('half')}",
            f"requests={path}",
            "backend=eager",
            "batch=4",
            "tp=2",
            "timeout=4",
            "max_output_length=30000",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    run, until = Running(process, tmp_path / "out"), time.monotonic() + 120
    while not run.finished() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert run.finished(), process.communicate(timeout=5) if process.poll() is not None else "nothing finished"
    yield run
    process.kill()


def ended(running: Running, ranks: dict[int, int], code: int) -> str:
    """Check that the run ends in time, leaves nothing behind and keeps the finished request; returns its error line."""
    out, err = running.process.communicate(timeout=END_SECONDS)
    assert running.process.returncode == code, err
    assert "Traceback" not in out + err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    for pid in ranks.values():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z"
    assert not list(Path("/dev/shm").glob(f"mllama_graph-{running.process.pid}-*"))
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


def processes_with(variable: str) -> list[int]:
    """Ids of the processes, without zombies, that have `variable` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_an_interrupt_ends_the_compilers_too(tp, checkpoint, empty_store, tmp_path):
    mark = f"MARK_OF_THIS_TEST={os.urandom(8).hex()}"
    process = subprocess.Popen(
        command_line(
            tmp_path / "out",
            *LIMITS,
            f"weights={checkpoint('half')}",
            f"graph_cache={empty_store}",
            f"tp={tp}",
            "plan.compile=wait",
            "prompt=hi",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict([mark.split("=")]),
        start_new_session=True,
    )
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
