"""What a killed node costs task=batch: the same rows on a simulated cluster of two nodes, with and without a kill.

    python tests/faults/node.py [rows]

Prints one line of JSON: seconds from the first written block to the end, and how long the kill made the run. Needs the
extra `ray`. The rows come from tests/test_batch.py.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from commands import command_line  # noqa: E402
from test_batch import CLUSTER, results, written  # noqa: E402

TOKENS, ROWS = 40, 8


def timed(folder: Path, count: int, kill: bool) -> tuple[float, int, int]:
    """Seconds of a run from its first block on, the rows that were there at the kill, and the rows at the end."""
    folder.mkdir()
    request = {"input_ids": [5, 6, 7], "max_new_tokens": TOKENS, "ignore_eos": True}
    source, output = written(folder / "requests.jsonl", [request] * count), folder / "output"
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=-1, stdout=-1, stderr=-3, text=True)
    address = next(line for line in cluster.stdout if ":" in line and " " not in line.strip()).strip()
    keys = [f"input={source}", f"output={output}", "replicas=2", "batch=4", f"task.rows={ROWS}", "backend=eager"]
    command = command_line(folder / "run", "task=batch", *keys, "threads=1", f"task.address={address}")
    process = subprocess.Popen(command, stdout=-3, stderr=-3, cwd=folder)

    def until(blocks: int) -> None:
        while len(list(output.glob("*.parquet"))) < blocks and process.poll() is None:
            time.sleep(0.05)

    try:
        until(1)
        begun = time.monotonic()
        until(count // ROWS // 2)
        if kill:
            cluster.stdin.write("\n")
            cluster.stdin.flush()
            cluster.stdout.readline()
        there = len(results(output))
        assert process.wait(250) == 0
        return time.monotonic() - begun, there, len({row["row"] for row in results(output)})
    finally:
        process.kill()
        cluster.kill()


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 480
    with tempfile.TemporaryDirectory() as made:
        plain, _, whole = timed(Path(made) / "plain", count, False)
        killed, there, rows = timed(Path(made) / "killed", count, True)
    holds = whole == rows == count
    told = {"rows": rows, "undisturbed_s": round(plain, 1), "with_kill_s": round(killed, 1), "there_at_kill": there}
    print(json.dumps({"fault": "node", "holds": holds} | told), flush=True)
    sys.exit(not holds)
