"""Runs run.py in a process of its own and collects its output, files and exit code."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """A finished run: exit code, stdout, stderr, output folder and duration."""

    code: int
    out: str
    err: str
    folder: Path
    seconds: float

    def result(self, job: str = ".") -> dict[str, Any]:
        """result.json of a run, or of one job of a sweep."""
        return json.loads((self.folder / job / "result.json").read_text())

    def lines(self) -> list[dict[str, Any]]:
        """The lines of results.jsonl."""
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]

    def one_line_error(self) -> str:
        """The single error line on stderr; a stack trace may be in run.log only."""
        assert "Traceback" not in self.err + self.out
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0].removeprefix("error: ")


def command_line(folder: Path, *arguments: str) -> list[str]:
    """The command that starts run.py, or a sweep (-m), with its output in `folder`."""
    where = "sweep" if "-m" in arguments else "run"
    return [sys.executable, str(ROOT / "run.py"), *arguments, f"hydra.{where}.dir={folder}"]


def run(folder: Path, *arguments: str, cwd: Path | None = None) -> Done:
    """Execute a run to its end, started outside of the repository."""
    begun = time.perf_counter()
    done = subprocess.run(
        command_line(folder, *arguments), capture_output=True, text=True, cwd=cwd or folder.parent, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr, folder, time.perf_counter() - begun)


def interrupted(tmp_path: Path, requests: int, *arguments: str) -> Done:
    """A run of many requests of 100 tokens each, interrupted by SIGINT after the third has finished."""
    lines = [{"id": n, "input_ids": [n + 1] * 20, "max_new_tokens": 100, "ignore_eos": True} for n in range(requests)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "out"
    command = command_line(folder, f"requests={tmp_path / 'requests.jsonl'}", "max_output_length=100", *arguments)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        results, until = folder / "results.jsonl", time.monotonic() + 120
        while not (results.exists() and results.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until, "three requests took more than 120 s"
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
