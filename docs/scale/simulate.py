"""Which replica should a router choose? A simulated day of traffic: pip install simpy matplotlib, then

    python docs/scale/simulate.py

writes routing.csv, routing.png and affinity.png beside this file, the same for the same SEED. Service times are those
of service.py (modelled, one 910B per replica). The traffic is made up, and TRAFFIC says how. A day is squeezed into 10
minutes: rates follow the day's wave 144 times as fast, while service times and the pauses of users are real seconds.
"""

import bisect
import csv
import hashlib
import heapq
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import quantiles

import simpy
from service import BATCH, NPU, Replica

SEED, HERE = 20261128, Path(__file__).parent
# A replica takes no request of its own pictures while it has BOUND times the mean of unfinished requests, and SLACK.
# Without slack, a fleet with one or two requests per replica would hardly follow the hash at all.
BOUND, SLACK = 1.25, 4
TIMES = Replica(NPU)
# Requests per second and replica over the day, and the load at which numbers of replicas are compared.
LOADS, LOAD = (2.0, 4.0, 5.0), 4.0


@dataclass(frozen=True)
class Traffic:
    """Sessions of users: each shows a picture and asks about it, often more than once. Lengths in tokens.

    load: requests per second and replica, averaged over the day. wave: the peak is 1 + wave times the average.
    popular: the share of sessions about one of `known` pictures, drawn by Zipf's law; all others show a new one.
    """

    seconds: float = 600
    load: float = LOAD
    wave: float = 0.6
    turns: float = 3.0
    pause: float = 20.0
    popular: float = 0.4
    known: int = 3000
    zipf: float = 1.1
    question: float = 40.0
    answer: float = 64.0
    longest: int = 512


TRAFFIC = Traffic()


@dataclass
class Request:
    """A turn of a session. `past`: tokens of the turns before."""

    session: int
    picture: int
    past: int
    question: int
    answer: int
    done: simpy.Event
    begun: float = 0.0
    first: float = 0.0
    hit: bool = False


@dataclass
class Server:
    """A replica: prompts come first, one at a time; between them, all running requests decode together."""

    env: simpy.Environment
    times: Replica = TIMES
    waiting: list[Request] = field(default_factory=list)
    # Decode steps so far, and the running requests by the step that ends them.
    steps: int = 0
    running: list[tuple[int, int, Request]] = field(default_factory=list)
    # Pictures whose K/V is held, by last use; and the tokens of sessions.
    pictures: OrderedDict[int, None] = field(default_factory=OrderedDict)
    sessions: OrderedDict[int, int] = field(default_factory=OrderedDict)
    busy: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        self.arrived = self.env.event()
        self.env.process(self.run())

    @property
    def load(self) -> int:
        """Unfinished requests."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        if not self.arrived.triggered:
            self.arrived.succeed()

    def run(self) -> Iterator[simpy.Event]:
        while True:
            if self.waiting and len(self.running) < BATCH:
                yield from self.prompt(self.waiting.pop(0))
            elif self.running:
                yield from self.decode()
            else:
                self.arrived = self.env.event()
                yield self.arrived

    def prompt(self, request: Request) -> Iterator[simpy.Event]:
        """Encode the picture unless it is held, and prefill what is not held of the session."""
        request.hit = request.picture in self.pictures
        # The prefix cache needs both: a text that follows an evicted picture is computed again.
        held = self.sessions.get(request.session, 0) if request.hit else 0
        seconds = 0.0 if request.hit else self.times.vision
        left = request.past + request.question - held
        seconds += self.times.prefill(-(-left // 16) * 16, held // 64 * 64)
        keep(self.pictures, request.picture, None, self.times.pictures_held)
        keep(self.sessions, request.session, request.past + request.question + request.answer, BATCH)
        self.busy += seconds
        yield self.env.timeout(seconds)
        request.first = self.env.now
        self.count += 1
        heapq.heappush(self.running, (self.steps + request.answer - 1, self.count, request))
        self.end()

    def decode(self) -> Iterator[simpy.Event]:
        """Decode until a request ends, or, where there is room, until one arrives."""
        step, begun = self.times.decode(len(self.running), 192), self.env.now
        steps = self.running[0][0] - self.steps
        self.arrived = self.env.event()
        room = len(self.running) < BATCH
        yield self.env.timeout(steps * step) | self.arrived if room else self.env.timeout(steps * step)
        # A step that has begun is finished.
        made = min(steps, math.ceil((self.env.now - begun) / step - 1e-9))
        yield self.env.timeout(max(0.0, begun + made * step - self.env.now))
        self.steps += made
        self.busy += made * step
        self.end()

    def end(self) -> None:
        while self.running and self.running[0][0] <= self.steps:
            heapq.heappop(self.running)[2].done.succeed()


def keep(cache: OrderedDict, key: int, value: object, most: int) -> None:
    """Keep an entry of a cache that forgets the least recently used."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > most:
        cache.popitem(last=False)


# ---- policies

Policy = Callable[[Request, list[Server]], Server]


class Ring:
    """Consistent hashing: a key goes to the next of each server's points on a ring, of which each server has many."""

    def __init__(self, servers: int, points: int = 100):
        self.points = sorted((self.hash(f"{s}/{p}"), s) for s in range(servers) for p in range(points))
        self.where = [at for at, _ in self.points]

    @staticmethod
    def hash(key: str) -> int:
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())

    def servers(self, key: int) -> Iterator[int]:
        """The servers of a key: its own first, then those that take its place."""
        start = bisect.bisect(self.where, self.hash(str(key)))
        for n in range(len(self.points)):
            yield self.points[(start + n) % len(self.points)][1]


def policies(servers: int, rng: random.Random) -> dict[str, Policy]:
    """The policies by name. The bounded one is consistent hashing with bounded loads (Mirrokni et al., 2016)."""
    ring, turn = Ring(servers), iter(range(10**9))

    def bounded(request: Request, all_: list[Server]) -> Server:
        most = SLACK + math.ceil(BOUND * (sum(server.load for server in all_) + 1) / len(all_))
        return next(all_[n] for n in ring.servers(request.picture) if all_[n].load < most)

    return {
        "random": lambda request, all_: rng.choice(all_),
        "round robin": lambda request, all_: all_[next(turn) % len(all_)],
        "least loaded": lambda request, all_: min(all_, key=lambda server: server.load),
        "session hash": lambda request, all_: all_[next(ring.servers(request.session))],
        "picture hash": lambda request, all_: all_[next(ring.servers(request.picture))],
        "picture hash, bounded": bounded,
    }


# ---- a day


def day(name: str, servers: int, traffic: Traffic = TRAFFIC, seed: int = SEED) -> dict[str, float | str]:
    """Serve a day's traffic with a policy, and return its figures. All policies get the same sessions."""
    env, rng = simpy.Environment(), random.Random(seed)
    fleet = [Server(env) for _ in range(servers)]
    choose = policies(servers, random.Random(seed + 1))[name]
    popular = list(accumulate((n + 1) ** -traffic.zipf for n in range(traffic.known)))
    done: list[Request] = []
    given: Counter[int] = Counter()

    def session(number: int, own: random.Random) -> Iterator[simpy.Event]:
        is_known = own.random() < traffic.popular
        picture = bisect.bisect(popular, own.random() * popular[-1]) if is_known else traffic.known + number
        past = 0
        for _ in range(1 + int(own.expovariate(1 / (traffic.turns - 0.5)))):
            question = 1 + int(own.expovariate(1 / traffic.question))
            answer = 1 + min(traffic.longest, int(own.expovariate(1 / traffic.answer)))
            request = Request(number, picture, past, question, answer, env.event(), env.now)
            chosen = choose(request, fleet)
            given[fleet.index(chosen)] += 1
            chosen.add(request)
            yield request.done
            done.append(request)
            past += question + answer
            yield env.timeout(own.expovariate(1 / traffic.pause))

    def arrivals() -> Iterator[simpy.Event]:
        number, peak = 0, traffic.load * servers / traffic.turns * (1 + traffic.wave)
        while True:
            yield env.timeout(rng.expovariate(peak))
            # The day's wave, lowest at its beginning and end.
            now = 1 - traffic.wave * math.cos(2 * math.pi * env.now / traffic.seconds)
            number += 1
            if rng.random() * (1 + traffic.wave) < now:
                env.process(session(number, random.Random(seed * 1000003 + number)))

    env.process(arrivals())
    env.run(traffic.seconds)
    waits = sorted(1e3 * (request.first - request.begun) for request in done)
    cut = quantiles(waits, n=1000)
    return {
        "policy": name,
        "replicas": servers,
        "requests": len(done),
        "pictures found %": round(100 * sum(request.hit for request in done) / len(done), 1),
        "first token p50 ms": round(cut[499]),
        "first token p99 ms": round(cut[989]),
        "busy %": round(100 * sum(server.busy for server in fleet) / servers / traffic.seconds, 1),
        "busiest of mean": round(max(given.values()) * servers / given.total(), 2),
    }


def check() -> tuple[float, float]:
    """Mean seconds to the first token of a replica whose requests all take as long, and the mean of theory (M/D/1).

    The Pollaczek-Khinchine formula, at 70 % load.
    """
    env, rng, requests = simpy.Environment(), random.Random(SEED), []
    server, each = Server(env), TIMES.vision + TIMES.prefill(48)

    def arrivals() -> Iterator[simpy.Event]:
        for number in range(40000):
            yield env.timeout(rng.expovariate(0.7 / each))
            requests.append(Request(number, number, 0, 48, 1, env.event(), env.now))
            server.add(requests[-1])

    env.process(arrivals())
    env.run()
    found = sum(request.first - request.begun for request in requests) / len(requests)
    return found, each + 0.7 * each / (2 * (1 - 0.7))


def main() -> None:
    """Run all policies on 8 replicas at three loads, and some on more replicas; write the table and the plots."""
    found, theory = check()
    print(f"M/D/1 at 70 % load: {1e3 * found:.0f} ms simulated, {1e3 * theory:.0f} ms in theory")
    assert abs(found / theory - 1) < 0.05, "the replica's queue is wrong"
    names = list(policies(1, random.Random()))
    by_load = [{"load": load, **day(name, 8, Traffic(load=load))} for load in LOADS for name in names]
    few = ("least loaded", "session hash", "picture hash", "picture hash, bounded")
    by_size = [{"load": LOAD, **day(name, servers, Traffic(seconds=300))} for servers in (2, 4, 8, 16) for name in few]
    with (HERE / "routing.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(by_load[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(by_load + by_size)
    for row in by_load + by_size:
        print(" | ".join(str(value) for value in row.values()))
    plot(by_load, by_size, few)


def plot(by_load: list[dict], by_size: list[dict], few: tuple[str, ...]) -> None:
    """Write routing.png and affinity.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def lines(path: str, rows: list[dict], x: str, y: str, names: list[str], log: bool, title: str) -> None:
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=90)
        for name, mark in zip(names, "ox^sDv"):
            points = [(row[x], row[y]) for row in rows if row["policy"] == name]
            axes.plot(*zip(*points, strict=True), marker=mark, label=name)
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.set_yscale("log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(HERE / path, metadata={"Software": None})

    names = list(dict.fromkeys(row["policy"] for row in by_load))
    lines("routing.png", by_load, "load", "first token p99 ms", names, True, "8 replicas (simulated, modelled times)")
    lines(
        "affinity.png",
        by_size,
        "replicas",
        "pictures found %",
        list(few),
        False,
        f"load {LOAD} (simulated, modelled times)",
    )


if __name__ == "__main__":
    main()
