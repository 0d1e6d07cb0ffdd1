"""A cheap load of prompts of ids, and engines without HTTP: what the throughput of replicas is compared with.

Two cores hold two replicas, the router and the clients: a client's CPU time is taken from the replicas. Bodies are
therefore made before the load begins, and answers are not parsed but for their count of tokens.
"""

import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Ids of a prompt, new tokens of an answer, and prompts that a client sends in turn: more than a replica can keep.
IDS, NEW, PROMPTS = 1500, 8, 24

ENGINE = """
import json, random, sys, time
sys.path.insert(0, ROOT)
from mllama_graph import LLM
keys = dict(pair.split("=", 1) for pair in sys.argv[1:])
keys = {name: int(value) if value.isdigit() else {"true": True}.get(value, value) for name, value in keys.items()}
ids = random.Random(0)
with LLM("tiny", quiet=True, **keys) as llm:
    def serve(count):
        asked = [{"input_ids": ids.choices(range(3, 250), k=IDS), "max_new_tokens": NEW, "ignore_eos": True}
                 for _ in range(count)]
        begun = time.monotonic()
        assert not any(result.error for result in llm.generate(asked))
        return time.monotonic() - begun
    serve(8)
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        print(count * (IDS + NEW) / serve(count), flush=True)
"""


class Ids:
    """Clients that complete random prompts one after the other. `outcomes`: (begin, end, tokens) of each answer."""

    def __init__(self, host: str, clients: int):
        self._host, self._ended = host, threading.Event()
        self.outcomes: list[tuple[float, float, int]] = []
        self.wrong: list[str] = []
        numbers = random.Random(1)
        bodies = [[self._body(numbers) for _ in range(PROMPTS)] for _ in range(clients)]
        self._threads = [threading.Thread(target=self._client, args=(own,), daemon=True) for own in bodies]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _body(numbers: random.Random) -> bytes:
        prompt = numbers.choices(range(3, 250), k=IDS)
        return json.dumps({"prompt": prompt, "max_tokens": NEW, "ignore_eos": True}, separators=(",", ":")).encode()

    def _client(self, bodies: list[bytes]) -> None:
        client, number = http.client.HTTPConnection(self._host, timeout=120), 0
        while not self._ended.is_set():
            begin = time.monotonic()
            client.request("POST", "/v1/completions", bodies[number % len(bodies)])
            answer = client.getresponse().read()
            if found := re.search(rb'"total_tokens":(\d+)', answer):
                self.outcomes.append((begin, time.monotonic(), int(found[1])))
            else:
                self.wrong.append(answer[:100].decode())
            number += 1

    def rate(self, begin: float, until: float) -> float:
        """Tokens per second; an answer that crosses an edge counts by the part of its time that lies inside."""
        return sum(
            tokens * max(0.0, min(ended, until) - max(begun, begin)) / (ended - begun)
            for begun, ended, tokens in list(self.outcomes)
        ) / (until - begin)

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(150)


class Engines:
    """Two engines in processes of their own, without HTTP."""

    def __init__(self, keys: list[str]):
        program = ENGINE.replace("ROOT", repr(str(ROOT))).replace("IDS", str(IDS)).replace("NEW", str(NEW))
        self._processes = [
            subprocess.Popen([sys.executable, "-c", program, *keys], stdin=-1, stdout=-1, text=True) for _ in range(2)
        ]
        for process in self._processes:
            assert process.stdout.readline() == "ready\n"

    def rate(self, engines: int, count: int) -> float:
        """Tokens per second of one engine or of both at the same time, each with `count` requests."""
        chosen = self._processes[:engines]
        for process in chosen:
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return sum(float(process.stdout.readline()) for process in chosen)

    def end(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait(60)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds so far of a process: of its busiest thread, and of all others."""
    ticks = []
    for path in Path(f"/proc/{pid}/task").iterdir():
        fields = (path / "stat").read_text().rpartition(")")[2].split()
        ticks.append(sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"))
    return max(ticks), sum(ticks) - max(ticks)
