"""task=bench: the speed of each batch size and length, beside the machine's limits and beside other engines."""

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, columns, write_result
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.engine.workload import cases_of, requests_of, serve
from mllama_graph.measure import limits
from mllama_graph.measure.bench_report import table, write_report
from mllama_graph.measure.bench_rows import OURS, Measured, middle, row_of
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
    on = Measured(run.shape, run.plan, run.storage, run.memory.total, rank.backend.most_bytes)
    with _peers(run, options, engine, progress) as peers:
        rows, found = [], []
        total = len(cases) * (options.repetitions + 1) * (1 + len(peers))
        turns = Turns(progress, total, REST if peers else 0.0)
        for case in cases:
            progress.say(f"batch {case.batch}, {case.length} text ids, {case.images} images each")
            timings, ceilings = _measure(engine, case, options.repetitions, peers, progress, turns)
            found.append(middle(ceilings))
            rows += [row_of(on, served, timing, ceilings) for served, timing in timings]
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


def _measure(
    engine: Engine, case: Case, repetitions: int, peers: list[Peer], progress: Progress, turns: Turns
) -> tuple[list[tuple[Case, Timing]], list[Limits]]:
    """Measure a case: one uncounted repetition, then repetitions in which each engine takes a turn.

    Returns each engine's times with what it served of the case, and limits by repetition. Limits are measured before
    and after a repetition's decode steps, since memory bandwidth may change at any time.
    """
    ours, theirs = Timing(OURS), {peer: Timing(peer.setting.name) for peer in peers}
    for peer, timing in theirs.items():
        timing.who += "" if peer.case(case) == case else TEXT_ONLY
    # Every case and repetition has its own pictures, so that none is cached before its first turn.
    seeds = itertools.count(1000 * case.batch + 1_000_000 * case.length)
    ceilings: list[Limits] = []
    backend, device = engine.executor.rank.backend, engine.executor.rank.spec.torch_device

    def look(found: list[Limits]) -> None:
        found.append(limits.measure(device, backend.name() is not None, backend.synchronize))

    for repetition in range(repetitions + 1):
        turns.begin(f"{OURS}, batch {case.batch}, {case.length} ids")
        requests, spent = requests_of(engine, case, seed := next(seeds), seed)
        counted = Timing("") if repetition == 0 else ours
        counted.image.append(spent)
        around: list[Limits] = []
        serve(engine, requests, case.new, counted, before_decode=partial(look, around))
        look(around)
        ceilings.append(middle(around))
        serve(engine, requests_of(engine, case, seed + 500, seed)[0], 1, known := Timing(""))
        counted.again += known.first
        for peer, timing in list(theirs.items()):
            turns.begin(f"{peer.setting.name}, batch {case.batch}, {case.length} ids")
            told = peer.run(requests, case.new)
            if told is None:
                progress.say(f"{peer.setting.name} can't run this case: {peer.fault}")
                theirs.pop(peer)
                turns.total -= repetitions - repetition
            elif repetition:
                timing.first.append(told["first"])
                timing.steps += told["steps"]
                timing.whole.append(told["first"] + sum(told["steps"]))
    return [(case, ours), *((peer.case(case), timing) for peer, timing in theirs.items())], ceilings[1:]
