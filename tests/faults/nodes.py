"""task=batch on a Ray cluster of two nodes on this machine: a node is killed, or a row ends its process.

    python tests/faults/nodes.py kill|row [key=value ...]

Needs the extra `ray`. Prints one line of JSON, and exits with 1 where a claim of docs/faults.md does not hold. `kill`
compares the time that a killed node costs with that of the rows it lost. Keys go to the run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from commands import command_line  # noqa: E402

KEYS = ["replicas=2", "batch=4", "threads=1", "backend=eager", "dtype=fp32", "max_output_length=100"]
COUNT, TOKENS = 320, 100

CLUSTER = """
import os, sys
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
# docs/batch.md: how soon the head notices that a node is gone.
os.environ.setdefault("RAY_health_check_period_ms", "1000")
os.environ.setdefault("RAY_health_check_failure_threshold", "3")
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
second = cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
if sys.stdin.readline().strip():
    cluster.remove_node(second, allow_graceful=False)
    print("removed", flush=True)
    sys.stdin.readline()
cluster.shutdown()
"""
# The command line with a class of answers that notes in NOTES when rows begin and end, and dies of a row.
COMMAND = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
from mllama_graph import cli
from mllama_graph.scale import batch
from mllama_graph.scale.answers import LINE, Answers

class Noting(Answers):
    def __init__(self, *args, **keys):
        begun = time.time()
        super().__init__(*args, **keys)
        self.note("started", time.time() - begun)

    def note(self, what, count):
        with open(NOTES, "a") as file:
            file.write(f"{what} {count} {time.time()}\\n")

    def _served(self, rows):
        self.note("begun", len(rows))
        if any(b"deadly" in (row[LINE] or b"") for row in rows):
            os._exit(1)
        found = super()._served(rows)
        self.note("served", len(rows))
        return found

batch.Answers = Noting
sys.exit(cli.main())
"""


class Batch:
    """A run of task=batch over `lines` on a cluster of its own."""

    def __init__(self, folder: Path, lines: list[dict[str, Any]], keys: list[str]):
        self.folder, self.output = folder, folder / "output"
        folder.mkdir()
        source = folder / "requests.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=-1, stdout=-1, stderr=-3, text=True)
        address = next(line for line in self.cluster.stdout if ":" in line and " " not in line.strip()).strip()
        given = [f"input={source}", f"output={self.output}", f"task.address={address}", *keys]
        program = COMMAND.replace("ROOT", repr(str(ROOT))).replace("NOTES", repr(str(folder / "notes")))
        [_, _, *arguments] = command_line(folder / "run", "task=batch", *given)
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], cwd=folder, stdout=-1, stderr=-1, text=True, env=variables
        )

    def notes(self, what: str) -> list[tuple[float, float]]:
        """(count, time) of all notes of a kind so far."""
        path = self.folder / "notes"
        words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(float(count), float(at)) for word, count, at in words if word == what]

    def served(self) -> float:
        """Rows served so far."""
        return sum(count for count, _ in self.notes("served"))

    def wait_for(self, rows: float) -> None:
        until = time.monotonic() + 200
        while self.served() < rows:
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate()
            time.sleep(0.01)

    def kill_a_node(self) -> None:
        self.cluster.stdin.write("now\n")
        self.cluster.stdin.flush()
        assert self.cluster.stdout.readline() == "removed\n"

    def end(self) -> list[dict[str, Any]]:
        """Wait for the end of the run, and return its results."""
        import pyarrow.parquet as pq

        try:
            out, err = self.process.communicate(timeout=300)
            assert self.process.returncode == 0, err
        finally:
            self.process.kill()
            self.cluster.stdin.close()
            self.cluster.wait(60)
        return [row for path in sorted(self.output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def whole(rows: list[dict[str, Any]], count: int) -> bool:
    """Whether each row is there once."""
    return sorted(row["row"] for row in rows) == sorted(f"requests.jsonl:{n + 1}" for n in range(count))


def kill(folder: Path, keys: list[str]) -> tuple[dict[str, Any], bool]:
    """A node is killed when half is served. Its cost: the time since then, less that of as many rows before.

    Lost rows are those that were begun more than once. While a new replica starts, half of the throughput is missing.
    """
    lines = [{"input_ids": [1 + n % 90] * 8, "max_new_tokens": TOKENS, "ignore_eos": True} for n in range(COUNT)]
    run = Batch(folder / "run", lines, keys)
    run.wait_for(COUNT / 8)
    first, at_first = run.served(), time.time()
    run.wait_for(COUNT / 2)
    there, killed = run.served(), time.time()
    run.kill_a_node()
    rows = run.end()
    each, left = (killed - at_first) / (there - first), COUNT - there
    delay = max(at for _, at in run.notes("served")) - killed - left * each
    lost = sum(count for count, _ in run.notes("begun")) - COUNT
    starts = run.notes("started")
    took, at = max(starts, key=lambda note: note[1])
    told = {
        "rows": COUNT,
        "results": len(rows),
        "starts of replicas": len(starts),
        "ms per row": round(1e3 * each, 1),
        "lost rows": round(lost),
        "lost rows x time per row, s": round(lost * each, 2),
        "until the new replica served, s": round(at - killed, 2),
        "of that its engine's start, s": round(took, 2),
        "delay, s": round(delay, 2),
    }
    return told, whole(rows, COUNT) and len(starts) > 2 and delay <= lost * each + (at - killed) + 1


def row(folder: Path, keys: list[str]) -> tuple[dict[str, Any], bool]:
    """A row ends the process that serves it, each time: it gets an error, all other rows are answered."""
    count, deadly = 40, 17
    lines = [{"id": f"{n}", "prompt": "What can you do?", "max_new_tokens": 4} for n in range(count)]
    lines[deadly]["id"] = "deadly"
    run = Batch(folder / "run", lines, keys)
    rows = run.end()
    wrong = {row["id"]: row["error"] for row in rows if row["error"]}
    told = {"rows": count, "starts of replicas": len(run.notes("started")), "errors": wrong}
    return told, whole(rows, count) and wrong.keys() == {"deadly"} and len(run.notes("started")) <= 6


if __name__ == "__main__":
    action, *given = sys.argv[1:]
    names = {key.partition("=")[0] for key in given}
    keys = [*(key for key in [*KEYS, "task.rows=4"] if key.partition("=")[0] not in names), *given]
    with tempfile.TemporaryDirectory() as made:
        told, holds = {"kill": kill, "row": row}[action](Path(made), keys)
    print(json.dumps({"action": action, "holds": holds} | told), flush=True)
    sys.exit(not holds)
