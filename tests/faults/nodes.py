"""task=batch on a Ray cluster of two nodes on this machine: a node is killed, or a row or a start ends its process.

    python tests/faults/nodes.py kill|row|start [rows=280] [key=value ...]

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

from mllama_graph.scale.attempts import STARTS  # noqa: E402

KEYS = ["replicas=2", "batch=4", "threads=1", "backend=eager", "dtype=fp32", "max_output_length=100"]
TOKENS = 100

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
        if CRASHES:
            from mllama_graph.scale import answers
            # In place of the engine, whose start ends the process.
            answers.LLM = lambda *_, **__: (self.note("begun", 1), os._exit(1))
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
    """A run of task=batch over `lines` on a cluster of its own. `crashes`: each start of an engine ends its process."""

    def __init__(self, folder: Path, lines: list[dict[str, Any]], keys: list[str], crashes: bool = False):
        self.folder, self.output = folder, folder / "output"
        folder.mkdir()
        source = folder / "requests.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=-1, stdout=-1, stderr=-3, text=True)
        address = next(line for line in self.cluster.stdout if ":" in line and " " not in line.strip()).strip()
        given = [f"input={source}", f"output={self.output}", f"task.address={address}", *keys]
        values = {"ROOT": str(ROOT), "NOTES": str(folder / "notes"), "CRASHES": crashes}
        program = COMMAND
        for name, value in values.items():
            program = program.replace(name, repr(value))
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

        code, err = self.failed()
        assert code == 0, err
        return [row for path in sorted(self.output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]

    def failed(self) -> tuple[int, str]:
        """Wait for the end of the run, and return its exit code and what it said."""
        try:
            _, err = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
            self.cluster.stdin.close()
            self.cluster.wait(60)
        return self.process.returncode, err


def whole(rows: list[dict[str, Any]], count: int) -> bool:
    """Whether each row is there once."""
    return sorted(row["row"] for row in rows) == sorted(f"requests.jsonl:{n + 1}" for n in range(count))


def kill(folder: Path, keys: list[str], count: int) -> tuple[dict[str, Any], bool]:
    """A node is killed when a quarter is served. Its cost: the time since then, less that of as many rows before.

    The `count` rows must last longer than Ray takes to notice, and a replica to start. Lost rows are those that were
    begun more than once. While a new replica starts, half of the throughput is missing.
    """
    lines = [{"input_ids": [1 + n % 90] * 8, "max_new_tokens": TOKENS, "ignore_eos": True} for n in range(count)]
    run = Batch(folder / "run", lines, keys)
    run.wait_for(count / 4)
    there, killed = run.served(), time.time()
    run.kill_a_node()
    rows = run.end()
    # Since the first row has begun: rows end in bursts, one for each block.
    each, left = (killed - min(at for _, at in run.notes("begun"))) / there, count - there
    rest = max(at for _, at in run.notes("served")) - killed
    delay = rest - left * each
    lost = sum(count for count, _ in run.notes("begun")) - count
    starts = run.notes("started")
    took, at = max(starts, key=lambda note: note[1])
    told = {
        "rows": count,
        "results": len(rows),
        "starts of replicas": len(starts),
        "ms per row": round(1e3 * each, 1),
        "lost rows": round(lost),
        "lost rows x time per row, s": round(lost * each, 2),
        "until the new replica served, s": round(at - killed, 2),
        "of that its engine's start, s": round(took, 2),
        "rows after the kill": left,
        "their time, s": round(rest, 2),
        "delay, s": round(delay, 2),
    }
    return told, whole(rows, count) and len(starts) > 2 and delay <= lost * each + (at - killed) + 1


def row(folder: Path, keys: list[str], count: int) -> tuple[dict[str, Any], bool]:
    """A row ends the process that serves it, each time: it gets an error, all other rows are answered."""
    deadly = 17
    lines = [{"id": f"{n}", "prompt": "What can you do?", "max_new_tokens": 4} for n in range(count)]
    lines[deadly]["id"] = "deadly"
    run = Batch(folder / "run", lines, keys)
    rows = run.end()
    wrong = {row["id"]: row["error"] for row in rows if row["error"]}
    told = {"rows": count, "starts of replicas": len(run.notes("started")), "errors": wrong}
    return told, whole(rows, count) and wrong.keys() == {"deadly"} and len(run.notes("started")) <= 6


def start(folder: Path, keys: list[str], count: int) -> tuple[dict[str, Any], bool]:
    """The start of each engine ends its process: the run ends with one line after a few of them."""
    run = Batch(folder / "run", [{"prompt": "What can you do?"}] * count, keys, crashes=True)
    begun = time.monotonic()
    code, err = run.failed()
    [*_, said] = err.splitlines()
    starts = len(run.notes("begun"))
    told = {"exit code": code, "starts": starts, "seconds": round(time.monotonic() - begun, 1), "said": said}
    return told, code == 1 and starts == STARTS * 2 and "while its engine started" in said and "Traceback" not in err


if __name__ == "__main__":
    action, *given = sys.argv[1:]
    names = {key.partition("=")[0] for key in given}
    keys = [*(key for key in [*KEYS, "task.rows=4"] if key.partition("=")[0] not in names), *given]
    run, count = {"kill": (kill, 280), "row": (row, 40), "start": (start, 4)}[action]
    count = next((int(key.removeprefix("rows=")) for key in keys if key.startswith("rows=")), count)
    keys = [key for key in keys if not key.startswith("rows=")]
    with tempfile.TemporaryDirectory() as made:
        told, holds = run(Path(made), keys, count)
    print(json.dumps({"action": action, "holds": holds} | told), flush=True)
    sys.exit(not holds)
