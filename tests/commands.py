"""Runs run.py in processes of its own and collects their results; caches values for all processes of a test session."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[1]
# How long each of the three fuzz tests runs; they draw the same cases in every run of the same length.
FUZZ_SECONDS = float(os.environ.get("MLLAMA_GRAPH_FUZZ_SECONDS", "10"))
# Small and quick: no compiler, and limits that hold the cases.
QUICK = ["backend=eager", "dtype=fp32", "max_input_length=300", "max_output_length=8", "model=custom"]
# Characters with a meaning in Hydra's grammar.
HOSTILE = r"""a,b 'c' "d" (e) f=g [h] {i: j} ${x} ${oc.env:HOME} \ \" \${y} 图里有什么？ -m ~k +l @m % # end\\"""
# Limits that hold the cases of request_cases.py, for runs with ranks.
LIMITS = ["model=custom", "dtype=fp32", "max_input_length=300", "max_output_length=100", "plan.page_size=16"]


@dataclass(frozen=True)
class Done:
    """A finished run: exit code, stdout, stderr, output folder and duration."""

    code: int
    out: str
    err: str
    folder: Path
    seconds: float

    def result(self, job="."):
        return json.loads((self.folder / job / "result.json").read_text())

    def lines(self):
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]

    def one_line_error(self) -> str:
        """The single error line on stderr; a stack trace may be in run.log only."""
        assert "Traceback" not in self.err + self.out
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0].removeprefix("error: ")


def command_line(folder: Path, *arguments: str) -> list[str]:
    """The command that starts run.py with its output in `folder`."""
    where = "sweep" if "-m" in arguments else "run"
    return [sys.executable, str(ROOT / "run.py"), *arguments, f"hydra.{where}.dir={folder}"]


def run(folder: Path, *arguments: str, cwd: Path | None = None, **variables: str) -> Done:
    """Execute a run to its end, started outside of the repository."""
    begun = time.perf_counter()
    done = subprocess.run(
        command_line(folder, *arguments),
        capture_output=True,
        text=True,
        cwd=cwd or folder.parent,
        env=os.environ | variables,
        # Two ranks of a simulated NPU that compile took more than 400 s on a busy machine.
        timeout=1200,
    )
    return Done(done.returncode, done.stdout, done.stderr, folder, time.perf_counter() - begun)


def served(folder: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """result.json and, as `lines`, results.jsonl of a run with LIMITS, which must succeed."""
    done = run(folder, *LIMITS, *arguments, **variables)
    assert done.code == 0, done.err + "".join(path.read_text() for path in folder.glob("ranks/*.log"))
    assert "Traceback" not in done.out + done.err
    return done.result() | {"lines": done.lines() if (folder / "results.jsonl").exists() else []}


def interrupted(tmp_path, requests: int, *arguments: str) -> Done:
    """A run of many requests of 100 tokens each, interrupted by SIGINT after the third has finished."""
    lines = [{"id": n, "input_ids": [n + 1] * 20, "max_new_tokens": 100, "ignore_eos": True} for n in range(requests)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command_line(folder, f"requests={tmp_path / 'requests.jsonl'}", "max_output_length=100", *arguments),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        results, until = folder / "results.jsonl", time.monotonic() + 120
        while not (results.exists() and results.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return Done(process.returncode, out, err, folder, 0)


def assert_kept(done: Done, requests: int) -> None:
    """Check that the interrupt ended the run and that results.jsonl holds every finished request complete."""
    assert done.code == 130
    assert "interrupted" in done.one_line_error()
    kept = done.lines()
    assert 3 <= len(kept) < requests
    assert all(len(line["token_ids"]) == 100 for line in kept)
    assert done.result()["status"] == "error"


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The value of make(), computed by the first process of a test session and stored at `path` for the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            made = make()
            path.write_bytes(pickle.dumps(made))
        return pickle.loads(path.read_bytes())
