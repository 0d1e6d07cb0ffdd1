"""Runs of run.py as processes of their own, with ranks, and what the processes of a session share."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[1]
LIMITS = ["model=custom", "dtype=fp32", "max_input_length=300", "max_output_length=100", "plan.page_size=16"]


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


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns: made by the first process of a session that asks, and kept at `path` for the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            made = make()
            path.write_bytes(pickle.dumps(made))
        return pickle.loads(path.read_bytes())
