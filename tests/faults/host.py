"""Faults of one host that need root or other programs: a full disk, a slow rank, another clock, a cut network.

    python tests/faults/host.py disk|slow|clock|network ...

Prints one line of JSON per fault, and exits with 1 where a claim of docs/faults.md does not hold. `disk` and `network`
need root (mount, ip netns); `clock` needs the program faketime.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from commands import command_line, run  # noqa: E402

KEYS = ["backend=eager", "max_output_length=40"]


def requests_file(folder: Path, count: int, tokens: int) -> Path:
    path = folder / "requests.jsonl"
    lines = [{"input_ids": [1 + n] * 8, "max_new_tokens": tokens, "ignore_eos": True} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(folder: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in (folder / "results.jsonl").read_text().splitlines()]


def disk(folder: Path) -> tuple[dict, bool]:
    """The disk of the results becomes full in the middle of a run; with room, `resume=true` serves the rest."""
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], check=True)
    try:
        source, keys = requests_file(folder, 300, 40), ["batch=32", *KEYS]
        full = run(small / "run", f"requests={source}", *keys, cwd=folder)
        there = (small / "run" / "results.jsonl").read_text().count("\n")
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        again = run(small / "run", f"requests={source}", "resume=true", *keys, cwd=folder)
        whole = len(texts(small / "run"))
    finally:
        subprocess.run(["umount", small], check=True)
    told = {
        "exit code": full.code,
        "error": full.err.splitlines()[-1][:160],
        "results there": there,
        "at the end": whole,
    }
    return told, full.code != 0 and "Traceback" not in full.err and again.code == 0 and whole == 300


def slow(folder: Path) -> tuple[dict, bool]:
    """A rank stands still for 4 s: the run waits for it, and its tokens are those of an undisturbed run."""
    source, keys = requests_file(folder, 12, 40), ["tp=2", "batch=4", "timeout=30", *KEYS]
    plain = run(folder / "plain", f"requests={source}", *keys)
    process = subprocess.Popen(command_line(folder / "slow", f"requests={source}", *keys), cwd=folder, stderr=-3)
    results, until = folder / "slow" / "results.jsonl", time.monotonic() + 60
    while not (results.exists() and results.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [stopped] = [int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(4)
    running = process.poll() is None
    os.kill(stopped, signal.SIGCONT)
    code = process.wait(100)
    equal = texts(folder / "plain") == texts(folder / "slow")
    return {
        "exit code": code,
        "stopped while running": running,
        "tokens equal": equal,
    }, plain.code == code == 0 and equal


STORE = """
import os, sys, time
from pathlib import Path
from mllama_graph.graphs.store import GraphStore

store = GraphStore(Path(sys.argv[1]))
store.sweep()
if not store.has("key"):
    with store.lock("key"), store.workspace() as workspace:
        (workspace / "built").write_bytes(b"package")
        store.add("key", {"a": 1}, workspace / "built")
print(time.time(), store.find("key")[0] is not None, store.find("key")[1])
"""


def clock(folder: Path) -> tuple[dict, bool]:
    """Hosts whose clocks are a day ahead and a day behind share a graph store while another host compiles into it."""
    from mllama_graph.graphs.store import GraphStore

    found, store = [], folder / "store"
    with GraphStore(store).workspace() as workspace:
        for shift in ("+1d", "-1d"):
            command = ["faketime", "-f", shift, sys.executable, "-c", STORE, str(store)]
            # File times are the server's, not the host's.
            variables = os.environ | {"NO_FAKE_STAT": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, env=variables)
            seconds, there, fault = done.stdout.split()
            days = round((float(seconds) - time.time()) / 86400)
            found.append({"clock (days)": days, "entry found": there, "fault": fault, "kept": workspace.is_dir()})
    told = [(one["clock (days)"], one["entry found"], one["kept"]) for one in found]
    return {"hosts": found}, told == [(1, "True", True), (-1, "True", True)]


def network(folder: Path) -> tuple[dict, bool]:
    """The network of a replica is cut for 5 s while it streams: no answer is lost, and each is whole."""
    space, ours, theirs = "mllama-fault", "10.231.7.1", "10.231.7.2"
    inside = ["ip", "netns", "exec", space]
    for command in (
        ["ip", "netns", "add", space],
        ["ip", "link", "add", "mf0", "type", "veth", "peer", "name", "mf1", "netns", space],
        ["ip", "addr", "add", f"{ours}/30", "dev", "mf0"],
        ["ip", "link", "set", "mf0", "up"],
        [*inside, "ip", "addr", "add", f"{theirs}/30", "dev", "mf1"],
        [*inside, "ip", "link", "set", "mf1", "up"],
    ):
        subprocess.run(command, check=True)
    keys = ["task=serve", "host=0.0.0.0", "port=8000", "batch=4", "backend=eager", "max_output_length=2000"]
    process = subprocess.Popen([*inside, *command_line(folder / "serve", *keys)], cwd=folder, stderr=-3)
    try:
        url, until = f"http://{theirs}:8000", time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        counts, wrong = [], []

        def client() -> None:
            body = {"prompt": [1, 2, 3], "max_tokens": 1500, "ignore_eos": True, "stream": True}
            try:
                with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                    lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
                counts.append((len(lines), lines[-1]))
            except httpx.HTTPError as error:
                wrong.append(type(error).__name__)

        clients = [threading.Thread(target=client) for _ in range(4)]
        begun = time.monotonic()
        for one in clients:
            one.start()
        time.sleep(1)
        open_then = sum(one.is_alive() for one in clients)
        # Packets are lost without a notice, as where a switch is restarted.
        subprocess.run(["ip", "link", "set", "mf0", "down"], check=True)
        time.sleep(5)
        subprocess.run(["ip", "link", "set", "mf0", "up"], check=True)
        for one in clients:
            one.join(90)
        seconds = time.monotonic() - begun
    finally:
        process.terminate()
        process.wait(30)
        subprocess.run(["ip", "netns", "del", space], check=True)
    ended = [line for _, line in counts]
    told = {"streams": 4, "open at the cut": open_then, "lost": wrong, "seconds": round(seconds, 1)}
    return told, open_then > 0 and not wrong and ended == ["data: [DONE]"] * 4


if __name__ == "__main__":
    failed = 0
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as made:
            told, holds = {"disk": disk, "slow": slow, "clock": clock, "network": network}[name](Path(made))
        print(json.dumps({"fault": name, "holds": holds} | told), flush=True)
        failed += not holds
    sys.exit(failed > 0)
