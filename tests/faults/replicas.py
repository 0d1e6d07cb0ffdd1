"""Two replicas of the tiny model behind a router or Ray Serve, under load: kills, restarts, throughput, affinity.

    python tests/faults/replicas.py haproxy|vllm-router|ray-serve kill|roll|affinity|speed [key=value ...]

Prints one line of JSON, and exits with 1 where a claim of docs/faults.md does not hold. haproxy and vllm-router must be
on the path; ray-serve needs the extra `ray`. Keys go to the replicas.
"""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from load import Engines, Ids, cpu_seconds
from PIL import Image

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
START_SECONDS = 120
KEYS = ["batch=8", "threads=1", "backend=eager", "max_output_length=400", "extend_context=true"]


def picture(number: int) -> str:
    """A picture of one colour as a data: URI."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (number * 20 % 256, number * 50 % 256, 90)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def wait(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise SystemExit(f"{what} took more than {seconds} s")
        time.sleep(0.05)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


class Processes:
    """Replicas as processes of task=serve behind haproxy or vllm-router."""

    def __init__(self, router: str, keys: list[str], folder: Path):
        self.router, self.keys, self.folder = router, keys, folder
        self.ports = [free_port(), free_port()]
        self.replicas: list[subprocess.Popen[bytes]] = []
        for number in (0, 1):
            self.replicas.append(self._replica(number))
        wait(lambda: all(healthy(f"http://127.0.0.1:{port}") for port in self.ports), "starting the replicas")
        port, self.admin = free_port(), folder / "admin"
        self.url, addresses = f"http://127.0.0.1:{port}", [f"127.0.0.1:{port}" for port in self.ports]
        if router == "haproxy":
            variables = {"ROUTER": f"127.0.0.1:{port}", "REPLICA_1": addresses[0], "REPLICA_2": addresses[1]}
            command = ["haproxy", "-f", str(DEPLOY / "router-haproxy.cfg")]
        else:
            variables, command = {}, [str(DEPLOY / "router-vllm.sh"), str(port), *(f"http://{at}" for at in addresses)]
        log = (folder / "router.log").open("wb")
        self.process = subprocess.Popen(
            command, env=os.environ | variables | {"ADMIN": str(self.admin)}, stdout=log, stderr=log
        )
        wait(lambda: healthy(self.url), "starting the router")

    def _replica(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "run.py"), "task=serve", f"port={self.ports[number]}", *self.keys]
        log = (self.folder / f"replica-{number}.log").open("ab")
        return subprocess.Popen(
            [*command, f"hydra.run.dir={self.folder}/replica-{number}"], stdout=log, stderr=log, cwd=self.folder
        )

    def kill(self) -> None:
        """Kill the first replica without notice."""
        self.replicas[0].kill()

    def start_again(self) -> None:
        self.replicas[0].wait()
        self.replicas[0] = self._replica(0)
        wait(lambda: healthy(f"http://127.0.0.1:{self.ports[0]}"), "starting the replica again")

    def roll(self) -> None:
        """Restart one replica after the other, as docs/batch.md says."""
        for number in (0, 1):
            self._route(number, False)
            self.replicas[number].send_signal(signal.SIGTERM)
            self.replicas[number].wait(60)
            self.replicas[number] = self._replica(number)
            wait(lambda port=self.ports[number]: healthy(f"http://127.0.0.1:{port}"), "restarting a replica")
            self._route(number, True)

    def _route(self, number: int, on: bool) -> None:
        """Tell the router to send no new requests to a replica, or to send some again."""
        if self.router == "haproxy":
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(str(self.admin))
                state = "ready" if on else "drain"
                admin.sendall(f"set server replicas/replica-{number + 1} state {state}\n".encode())
                admin.recv(1000)
        else:
            action = "add_worker" if on else "remove_worker"
            address = f"http://127.0.0.1:{self.ports[number]}"
            done = httpx.post(f"{self.url}/{action}", params={"url": address}, timeout=30)
            assert done.status_code == 200, done.text
        time.sleep(1)

    def served(self) -> list[int]:
        """The number of requests that each replica has answered."""
        found = []
        for number in (0, 1):
            log = self.folder / f"replica-{number}" / "access.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            found.append(sum('"/v1/' in line for line in lines))
        return found

    def stop(self) -> None:
        for process in (self.process, *self.replicas):
            process.kill()
            process.wait()


class RayServe:
    """Replicas of the Ray Serve application on a cluster of this process."""

    def __init__(self, router: str, keys: list[str], folder: Path):
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
        import ray
        from ray import serve

        from mllama_graph.scale.ray_serve import application

        self.serve, self.application = serve, application
        pairs = [key.split("=", 1) for key in keys]
        self.args = {name: int(value) if value.isdigit() else value for name, value in pairs}
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self._run(0)

    def _run(self, version: int) -> None:
        # A changed argument makes Ray Serve replace the replicas.
        built = self.application(self.args | {"seed": version})
        built._bound_deployment._deployment_config.num_replicas = 2
        self.serve.run(built, name="mllama_graph", route_prefix="/")
        wait(lambda: healthy(self.url), "starting the replicas")

    def kill(self) -> None:
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
        raylets = set(re.findall(rf"^\s*(\d+)\s+{os.getpid()}\s.*raylet", listed, re.MULTILINE))
        found = re.findall(r"^\s*(\d+)\s+(\d+)\s+ray::ServeReplica", listed, re.MULTILINE)
        os.kill(next(int(pid) for pid, parent in found if parent in raylets), signal.SIGKILL)

    def start_again(self) -> None:
        """Ray Serve does it."""

    def roll(self) -> None:
        self._run(1)

    def stop(self) -> None:
        import ray

        self.serve.shutdown()
        ray.shutdown()


class Load:
    """Clients that ask about a picture again and again, each in a session of its own; `outcomes` has all answers."""

    def __init__(self, url: str, clients: int, tokens: int):
        self.url, self.tokens = url, tokens
        # (begin, end, what went wrong or None)
        self.outcomes: list[tuple[float, float, str | None]] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        image = {"type": "image_url", "image_url": {"url": picture(number)}}
        asked = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "What do you see?"}]}]}
        with httpx.Client(timeout=120, headers={"x-session-id": f"session-{number}"}) as client:
            while not self._ended.is_set():
                body = asked | {"max_tokens": self.tokens, "ignore_eos": True}
                begin, wrong = time.monotonic(), None
                try:
                    answer = client.post(f"{self.url}/v1/chat/completions", json=body)
                    if answer.status_code != 200:
                        wrong = f"{answer.status_code} {answer.text[:100]}"
                except httpx.HTTPError as error:
                    wrong = type(error).__name__
                self.outcomes.append((begin, time.monotonic(), wrong))

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(150)


def kill(front: Any) -> tuple[dict[str, Any], bool]:
    """A replica is killed under load: only requests that were open then are lost, and not all of those."""
    load = Load(front.url, 8, 60)
    time.sleep(4)
    killed = time.monotonic()
    front.kill()
    time.sleep(5)
    front.start_again()
    time.sleep(1)
    load.end()
    open_then = [outcome for outcome in load.outcomes if outcome[0] <= killed < outcome[1]]
    lost = [outcome for outcome in load.outcomes if outcome[2]]
    late = [outcome for outcome in lost if outcome[0] > killed]
    told = {
        "requests": len(load.outcomes),
        "open at the kill": len(open_then),
        "lost": len(lost),
        "begun later": len(late),
    }
    return told | {"why": sorted({str(outcome[2]) for outcome in lost})}, not late and len(lost) < len(open_then)


def roll(front: Any) -> tuple[dict[str, Any], bool]:
    """All replicas are restarted under load: no request is lost."""
    load = Load(front.url, 4, 30)
    time.sleep(3)
    begun = time.monotonic()
    front.roll()
    seconds = time.monotonic() - begun
    time.sleep(2)
    load.end()
    lost = [outcome[2] for outcome in load.outcomes if outcome[2]]
    during = sum(begun < outcome[1] < begun + seconds for outcome in load.outcomes)
    return {
        "requests": len(load.outcomes),
        "during the restart": during,
        "lost": len(lost),
        "why": sorted(set(lost)),
    }, not lost


def affinity(front: Any) -> tuple[dict[str, Any], bool]:
    """A session meets its picture: each picture is encoded once, by one of the replicas."""
    clients = 8
    load = Load(front.url, clients, 8)
    time.sleep(4)
    load.end()
    hits = images = 0.0
    for port in front.ports:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        found = dict(re.findall(r"^mllama_graph:mm_cache_(hits|queries)_total\S* (\S+)", text, re.MULTILINE))
        hits, images = hits + float(found["hits"]), images + float(found["queries"])
    told = {"requests": front.served(), "pictures": clients, "encoded": round(images - hits)}
    return told, min(told["requests"]) > 0 and images - hits == clients


def speed(front: Any) -> tuple[dict[str, Any], bool]:
    """Tokens per second of two replicas, and of the second one alone, in turns: prompts of 1,500 ids, 8 new tokens.

    The ceiling: two engines without HTTP, as a multiple of one (`engines`), and the part of the CPU time that is the
    engines' (`share`), since two replicas share the cores with HTTP, router and clients, and one does not.
    """
    processes = [*(process.pid for process in front.replicas), front.process.pid]

    def used() -> list[float]:
        """CPU seconds so far: both engines' threads, the replicas' other threads, the router, the clients."""
        first, second, router = map(cpu_seconds, processes)
        return [first[0] + second[0], first[1] + second[1], sum(router), time.process_time()]

    load, turns, spent = Ids(front.url.removeprefix("http://"), 24), {2: [], 1: []}, {2: [], 1: []}
    for replicas in (2, 1) * 3:
        front._route(0, replicas == 2)
        time.sleep(1.5)
        begin, before = time.monotonic(), used()
        time.sleep(6)
        until, after = time.monotonic(), used()
        turns[replicas].append((begin, until))
        spent[replicas].append([(b - a) / (until - begin) for a, b in zip(before, after)])
    load.end()
    engines = Engines(front.keys)
    alone = [(engines.rate(1, 60), engines.rate(2, 60)) for _ in range(2)]
    engines.end()
    # Only now have the answers ended that cross the edges of a turn.
    found = {replicas: [load.rate(*turn) for turn in taken] for replicas, taken in turns.items()}
    rates = {replicas: median(values) for replicas, values in found.items()}
    cores = {replicas: [round(median(part), 2) for part in zip(*parts)] for replicas, parts in spent.items()}
    one, two = (median(values) for values in zip(*alone))
    told = {
        "two": round(rates[2]),
        "one": round(rates[1]),
        "ratio": round(rates[2] / max(rates[1], 1e-9), 2),
        "wrong": load.wrong[:1],
        "engines alone": [round(one), round(two), round(two / one, 2)],
        "cores of engines, HTTP, router, clients": cores,
        "share": round(cores[2][0] / sum(cores[2]), 3),
        "turns": {replicas: [round(value) for value in values] for replicas, values in found.items()},
    }
    return told, not load.wrong and rates[2] >= 1.8 * rates[1]


if __name__ == "__main__":
    name, action, *given = sys.argv[1:]
    names = {key.partition("=")[0] for key in given}
    keys = [*(key for key in KEYS if key.partition("=")[0] not in names), *given]
    with tempfile.TemporaryDirectory() as made:
        front = (RayServe if name == "ray-serve" else Processes)(name, keys, Path(made))
        try:
            told, holds = {"kill": kill, "roll": roll, "affinity": affinity, "speed": speed}[action](front)
        finally:
            front.stop()
    print(json.dumps({"router": name, "action": action, "holds": holds} | told), flush=True)
    os._exit(0 if holds else 1)
