"""task=bench: the speed of each batch size and length, beside the machine's limits and beside other engines."""

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, columns, write_result
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.engine.workload import cases_of, fill_pages, requests_of, serve
from mllama_graph.inputs.request import Request
from mllama_graph.measure import limits, neighbours
from mllama_graph.measure.bench_report import table, write_report
from mllama_graph.measure.bench_rows import BESIDE, OURS, Measured, middle, row_of
from mllama_graph.measure.limits import Limits
from mllama_graph.measure.peers.process import Peer
from mllama_graph.measure.session import BENCH, write_csv, write_manifest
from mllama_graph.measure.timing import Case, Timing
from mllama_graph.model.weights import write_random
from mllama_graph.plan.resolve import ResolvedRun
from mllama_graph.tasks.options import BenchOptions

# Seconds before a turn, after which the threads of the previous engine no longer spin.
REST = 0.3
# Marks a peer that can't serve images, where the case has some: its row is about the text without them.
TEXT_ONLY = " (text only)"


@dataclass
class Turns:
    """Progress of the measurements. `rest`: idle seconds before each turn."""

    progress: Progress
    total: int
    rest: float
    done: int = 0

    def begin(self, what: str) -> None:
        """Show that a turn begins, and rest."""
        self.progress.turns(self.done, self.total, what)
        time.sleep(self.rest)
        self.done += 1


def main(run: ResolvedRun) -> None:
    """Measure every case, write the session (bench.csv, manifest.json, summary.md, plots) and print its table."""
    options, progress, folder = run.options, Progress(), run.output_dir
    assert isinstance(options, BenchOptions)
    cases = cases_of(options)
    engine = start_engine(run, processor_of(run), progress)
    rank = engine.executor.rank
    if options.cached:
        fill_pages(engine)
    on = Measured(run.shape, run.plan, run.storage, run.memory.total, rank.backend.most_bytes)
    with _peers(run, options, engine, progress) as peers:
        rows, found = [], []
        total = len(cases) * (options.repetitions + 1) * (1 + len(peers))
        turns = Turns(progress, total * (2 if options.neighbours else 1), REST if peers else 0.0)
        for case in cases:
            progress.say(f"batch {case.batch}, {case.length} text ids, {case.images} images each")
            one = _Case(engine, case, options.neighbours, list(peers), progress, turns)
            one.measure(options.repetitions)
            found.append(middle(one.ceilings))
            rows += [row_of(on, served, timing, one.ceilings) for served, timing in one.timings.values()]
        progress.turns(turns.total, turns.total, "")
    engine.close(progress)
    write_csv(folder / BENCH, rows)
    write_manifest(folder, run.asked, run.device.name, torch.backends.cpu.get_cpu_capability(), rank.backend.name())
    write_result(
        folder, run.asked, metrics={"limits": [asdict(c) for c in found], "cases": rows}, graphs=engine.graph_records()
    )
    print("\n" + columns(*table(rows)), flush=True)
    progress.say(f"\n{write_report(folder, run.model, rows, engine.executor.graphs.failed, progress)}")


@contextlib.contextmanager
def _peers(run: ResolvedRun, options: BenchOptions, engine: Engine, progress: Progress) -> Iterator[list[Peer]]:
    """Run the processes of the other engines on the same weights; they end with the context."""
    settings, spec = options.settings(), engine.executor.rank.spec
    if settings and run.checkpoint and run.checkpoint.adapters:
        raise UserError("peers= and adapter=: the other engines load the base model. Drop one of them.")
    with tempfile.TemporaryDirectory(prefix="mllama_graph-bench-") as aside:
        folder = run.checkpoint.folder if run.checkpoint else Path(aside)
        if settings and run.checkpoint is None:
            progress.say("writing the random weights for the other engines")
            assert run.model_config is not None
            write_random(run.shape, {"model_type": "mllama", **run.model_config}, run.seed, spec.store, folder)
        pythons = options.pythons() | {"transformers": Path(sys.executable)}
        peers = [
            Peer(setting, pythons[setting.peer], run.shape, folder, spec.torch_device.type, spec.threads, progress)
            for setting in settings
        ]
        try:
            yield peers
        finally:
            for peer in peers:
                peer.close()


@dataclass
class _Case:
    """One case under measurement: each engine's times by name, and the limits by repetition.

    `busy`: how many processes keep a core busy in a second turn of each engine; 0: there is no second turn.
    """

    engine: Engine
    case: Case
    busy: int
    peers: list[Peer]
    progress: Progress
    turns: Turns
    timings: dict[str, tuple[Case, Timing]] = field(default_factory=dict)
    ceilings: list[Limits] = field(default_factory=list)

    def measure(self, repetitions: int) -> None:
        """One uncounted repetition, then repetitions in which each engine takes a turn, or two."""
        # Every case, repetition and turn has its own pictures, so that none is cached before its first turn.
        seeds = itertools.count(1000 * self.case.batch + 1_000_000 * self.case.length)
        for repetition in range(repetitions + 1):
            for beside in (0, self.busy) if self.busy else (0,):
                counted = repetition > 0
                with neighbours.busy(beside):
                    requests = self._our_turn(next(seeds), beside, counted)
                    for peer in list(self.peers):
                        self._peers_turn(peer, requests, beside, counted, repetitions - repetition)

    def _our_turn(self, seed: int, beside: int, counted: bool) -> list[Request]:
        self.turns.begin(f"{OURS}, batch {self.case.batch}, {self.case.length} ids")
        requests, spent = requests_of(self.engine, self.case, seed, seed)
        timing = self._timing(OURS, self.case, beside) if counted else Timing("")
        timing.image.append(spent)
        around: list[Limits] = []
        others = neighbours.Others()

        def look() -> None:
            backend, device = self.engine.executor.rank.backend, self.engine.executor.rank.spec.torch_device
            around.append(limits.measure(device, backend.name() is not None, backend.synchronize))

        if counted and not beside:
            # A floor is what the machine allows when nothing else runs.
            serve(self.engine, requests, self.case.new, timing, before_decode=look)
            look()
            self.ceilings.append(middle(around))
        else:
            serve(self.engine, requests, self.case.new, timing)
        timing.others.append(others.cores())
        serve(self.engine, requests_of(self.engine, self.case, seed + 500, seed)[0], 1, known := Timing(""))
        timing.again += known.first
        return requests

    def _peers_turn(self, peer: Peer, requests: list[Request], beside: int, counted: bool, left: int) -> None:
        self.turns.begin(f"{peer.setting.name}, batch {self.case.batch}, {self.case.length} ids")
        served, told = peer.case(self.case), peer.run(requests, self.case.new)
        name = peer.setting.name + ("" if served == self.case else TEXT_ONLY)
        if told is None:
            self.progress.say(f"{peer.setting.name} can't run this case: {peer.fault}")
            self.peers.remove(peer)
            self.timings = {who: timing for who, timing in self.timings.items() if not who.startswith(name)}
            self.turns.total -= left * (2 if self.busy else 1)
        elif counted:
            timing = self._timing(name, served, beside)
            timing.first.append(told["first"])
            timing.steps += told["steps"]
            timing.whole.append(told["first"] + sum(told["steps"]))

    def _timing(self, who: str, case: Case, beside: int) -> Timing:
        name = who + (f"{BESIDE}{beside}" if beside else "")
        return self.timings.setdefault(name, (case, Timing(name)))[1]
