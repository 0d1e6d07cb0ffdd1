"""task=bench: how fast each batch size and length is, beside what the machine allows and beside peers in the same run."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mllama_graph.measure import limits
from mllama_graph.measure import plots
from mllama_graph.model.checkpoint import model_of, write_random
from mllama_graph.core.config import Run
from mllama_graph.engine.engine import Engine
from mllama_graph.inputs.images import Tiles, tile_image
from mllama_graph.measure.limits import Limits
from mllama_graph.measure.peers import settings_of
from mllama_graph.measure.peers.process import Peer
from mllama_graph.plan.resolve import MADE_UP, plan_of, weights_of
from mllama_graph.inputs.processor import Request
from mllama_graph.engine.profiler import most_bytes
from mllama_graph.core.report import Progress, columns, markdown, write_result
from mllama_graph.plan.cost import kv_bytes, sizes, step_work, work
from mllama_graph.engine.scheduler import Sampling
from mllama_graph.measure.session import BENCH, write_csv, write_manifest
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.tasks.generate import finish_compiling

# Of the example that this engine replaces, in its order.
SEED_COLUMNS = ("batch", "input_len", "output_len", "embedding_len", "first_token_time(ms)", "non_first_token_time(ms)",
                "ResponseTime(ms)", "E2E Throughput Average(Tokens/s)")
OURS = "mllama_graph"
# Seconds until the threads of the engine whose turn it was no longer wait busily.
REST = 0.3
MS = 1e3


@dataclass(frozen=True)
class Case:
    """Requests that are measured together: `batch` of `length` text ids and `images` images each."""

    batch: int
    length: int
    images: int
    new: int


@dataclass
class Turns:
    """How far the measuring is."""

    progress: Progress
    total: int
    done: int = 0
    rest: float = 0.0

    def begin(self, what: str) -> None:
        self.progress.turns(self.done, self.total, what)
        time.sleep(self.rest)
        self.done += 1


@dataclass
class Timing:
    """Of one case, a value a repetition, in seconds; steps a value a decode step. `who` is the engine or a peer."""

    who: str
    image: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    # Drawing the first tokens: a part of prefill.
    sample: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    # The first token of a request whose images are known.
    again: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def main(run: Run) -> None:
    """Measure every case; writes the session (bench.csv, manifest.json, summary.md, plots) and prints its table."""
    task, settings = run.task, settings_of(run)
    cases = cases_of(run)
    shape, checkpoint = model_of(run)
    processor, progress = processor_of(run, shape, checkpoint), Progress()
    plan = plan_of(run, shape, task.images)
    engine = start_engine(run, plan, shape, checkpoint, processor, progress)
    rank = engine.ranks.rank
    with tempfile.TemporaryDirectory(prefix="mllama_graph-bench-") as aside:
        folder = checkpoint.folder if checkpoint else Path(aside)
        if settings and weights_of(run) in MADE_UP:
            progress.say("writing the random weights for the peers")
            write_random(shape, {"model_type": "mllama", **run.model.config}, run.seed, rank.precision.store, folder)
        peers = [Peer(setting, run, shape, folder, rank.device.type, rank.spec.threads, progress) for setting in settings]
        try:
            rows, found = [], []
            turns = Turns(progress, len(cases) * (task.repetitions + 1) * (1 + len(settings)), rest=REST if settings else 0.0)
            for case in cases:
                progress.say(f"batch {case.batch}, {case.length} text ids, {case.images} images each")
                timings, ceilings = _measure(engine, case, task.repetitions, peers, progress, turns)
                found.append(_middle(ceilings))
                rows += [_row(engine, case, timing, ceilings) for timing in timings]
            progress.turns(turns.total, turns.total, "")
        finally:
            for peer in peers:
                peer.close()
    finish_compiling(engine.ranks, progress)
    folder = Path(run.output_dir)
    write_csv(folder / BENCH, rows)
    write_manifest(folder, run, rank.device.type)
    write_result(folder, asdict(run), metrics={"limits": [asdict(c) for c in found], "cases": rows},
                 graphs=[asdict(record) for record in engine.ranks.graphs.records])
    print("\n" + columns(*_table(rows)), flush=True)
    progress.say(f"\n{write_report(folder, run.model.name, rows, engine.ranks.graphs.failed, progress)}")


def cases_of(run: Run) -> list[Case]:
    """Every case that a run measures; its limits are raised to hold them, and its graphs compiled before they run."""
    task = run.task
    run.batch = max(run.batch, *run.batch_sizes)
    run.max_input_length = max(run.max_input_length, *run.lengths)
    # Those that get their first token before others do decode meanwhile.
    run.max_output_length = max(run.max_output_length, task.new_tokens + max(run.batch_sizes))
    run.plan.compile = "never" if run.plan.compile == "never" else "wait"
    return [Case(batch, length, task.images, task.new_tokens) for batch in run.batch_sizes for length in run.lengths]


def requests_of(engine: Engine, case: Case, seed: int, pictures: int) -> tuple[list[Request], float]:
    """Random requests, and the seconds that preparing their images took; equal `pictures` are equal images."""
    shape, random = engine.ranks.shape, np.random.default_rng(seed)
    side = shape.vision.tile * int(shape.vision.max_tiles ** 0.5)
    painter, spent = np.random.default_rng(pictures), 0.0
    requests = []
    for number in range(case.batch):
        images: list[Tiles] = []
        for _ in range(case.images):
            picture = Image.fromarray(painter.integers(0, 256, (side, side, 3), dtype=np.uint8))
            start = time.perf_counter()
            images.append(tile_image(picture, shape.vision))
            spent += time.perf_counter() - start
        text = random.integers(0, shape.text.vocab, case.length - len(images)).tolist()
        ids = (*[shape.image_token] * len(images), *text)
        most = case.new + case.batch
        requests.append(Request(number, ids, tuple(images), tuple(range(len(images))), most, Sampling(), ignore_eos=True))
    return requests, spent


def _measure(engine: Engine, case: Case, repetitions: int, peers: list[Peer], progress: Progress,
             turns: Turns) -> tuple[list[Timing], list[Limits]]:
    """One run that is not counted, then repetitions in which the engine and each peer take turns; the limits of each.

    Limits are measured before and after a repetition's decode steps, since what memory gives may change at any time.
    """
    ours, theirs = Timing(OURS), {peer: Timing(peer.setting.name) for peer in peers}
    # Every case and repetition has pictures of its own: none is known before its first turn.
    ceilings, seeds = [], itertools.count(1000 * case.batch + 1_000_000 * case.length)
    device = engine.ranks.rank.device
    for repetition in range(repetitions + 1):
        turns.begin(f"{OURS}, batch {case.batch}, {case.length} ids")
        requests, spent = requests_of(engine, case, seed := next(seeds), seed)
        counted = Timing("") if repetition == 0 else ours
        counted.image.append(spent)
        around: list[Limits] = []
        look = lambda: around.append(limits.measure(device))  # noqa: E731
        serve(engine, requests, case.new, counted, before_decode=look)
        look()
        ceilings.append(_middle(around))
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
    return [ours, *theirs.values()], ceilings[1:]


def _middle(ceilings: list[Limits]) -> Limits:
    median = lambda name: statistics.median(getattr(ceiling, name) for ceiling in ceilings)  # noqa: E731
    return Limits(median("bytes_per_second"), median("flops"))


def serve(engine: Engine, requests: list[Request], new: int, timing: Timing, before_decode: Callable[[], None] = lambda: None) -> None:
    """Serve requests together, until all have a token and then decoded `new` - 1 more in one batch.

    The first token's time is that of the last request to get one, as a batch would wait.
    """
    start, stats, rank = time.perf_counter(), engine.stats, engine.ranks.rank
    vision, prefill, sample = stats.vision_seconds, stats.prefill_seconds, rank.sample_seconds
    numbers, without = [engine.submit(request) for request in requests], {request.id for request in requests}
    while without:
        without -= {delta.id for delta in engine.step()}
    timing.first.append(time.perf_counter() - start)
    timing.vision.append(stats.vision_seconds - vision)
    timing.prefill.append(stats.prefill_seconds - prefill)
    timing.sample.append(rank.sample_seconds - sample)
    before_decode()
    steps = []
    for _ in range(new - 1):
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    timing.steps += steps
    timing.whole.append(timing.first[-1] + sum(steps))
    for number in numbers:
        engine.abort(number)


def _row(engine: Engine, case: Case, timing: Timing, ceilings: list[Limits]) -> dict[str, object]:
    """A line of bench.csv. The floor is the larger of bytes / bandwidth and operations / peak.

    A share of it is that of a repetition, whose limits were measured around its decode steps.
    """
    ceiling = _middle(ceilings)
    rank, shape, plan = engine.ranks.rank, engine.ranks.shape, engine.ranks.plan
    widths = rank.precision.store.itemsize, rank.precision.compute.itemsize
    keys = case.batch * (case.length + case.new // 2)
    image_tokens = case.images * shape.vision.max_tiles * shape.vision.tokens
    image_keys = case.batch * image_tokens
    self_kv, image_kv = kv_bytes(shape, keys, image_keys, widths[1])
    moved, flops = step_work(shape, case.images > 0, case.batch, keys, image_keys, (keys, image_keys), case.batch, *widths)
    floor = lambda limits: max(moved / limits.bytes_per_second, flops / limits.flops)  # noqa: E731
    each = len(timing.steps) // len(ceilings)
    steps = [statistics.median(timing.steps[at * each:(at + 1) * each]) for at in range(len(ceilings))]
    share = lambda bound: round(statistics.median(bound(c) / s for c, s in zip(ceilings, steps)), 4)  # noqa: E731
    seen = case.length * case.length / 2, case.length * image_tokens
    prompt = step_work(shape, case.images > 0, case.length, case.length, image_tokens, seen, 1, *widths)
    first_floor = case.batch * (max(prompt[0] / ceiling.bytes_per_second, prompt[1] / ceiling.flops)
                                + case.images * work(shape, plan.page_size, plan.vision(), *widths)[1] / ceiling.flops)
    ms = lambda seconds: round(seconds * MS, 3)  # noqa: E731
    median = lambda times: ms(statistics.median(times)) if times else ""  # noqa: E731
    step, first, whole = median(timing.steps), median(timing.first), statistics.median(timing.whole)
    ours = timing.who == OURS
    return dict(zip(SEED_COLUMNS, (case.batch, case.length, case.new, image_tokens, first, step, ms(whole),
                                   round(case.batch * case.new / whole, 3)))) | {
        "engine": timing.who, "images": case.images, "image_ms": median(timing.image), "vision_ms": median(timing.vision),
        "prefill_ms": median(timing.prefill), "first_sample_ms": median(timing.sample),
        "first_token_ms_least": ms(min(timing.first)), "first_token_ms_most": ms(max(timing.first)),
        "first_token_again_ms": median(timing.again),
        "decode_ms_least": ms(min(timing.steps)), "decode_ms_most": ms(max(timing.steps)),
        "decode_tokens_per_s": round(case.batch * MS / step, 3),
        "decode_floor_ms": ms(floor(ceiling)), "decode_of_floor": share(floor),
        "first_token_floor_ms": ms(first_floor), "first_token_of_floor": round(first_floor * MS / first, 4),
        "read_of_limit": share(lambda limits: moved / limits.bytes_per_second),
        "flops_of_limit": share(lambda limits: flops / limits.flops),
        "decode_bytes": round(moved), "decode_flops": round(flops),
        "weight_bytes": sizes(shape).total * widths[0],
        "self_kv_bytes": self_kv, "image_kv_bytes": image_kv,
        "planned_bytes": engine.ranks.memory.total if ours else "",
        "most_bytes": most_bytes(rank.device.type) if ours else "",
        "read_gb_per_s": round(ceiling.bytes_per_second / 1e9, 3), "product_gflop_per_s": round(ceiling.flops / 1e9, 3)}


def _table(rows: list[dict[str, object]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("engine", "batch", "ids", "first token", "of it vision", "again", "a decode step", "least", "most", "floor", "of floor",
            "tokens/s"), [_line(row) for row in rows]


def _line(row: dict[str, object]) -> tuple[str, ...]:
    ms = lambda name: f"{row[name]:,.1f} ms" if row[name] != "" else "-"  # noqa: E731
    return (str(row["engine"]), str(row["batch"]), str(row["input_len"]), ms("first_token_time(ms)"), ms("vision_ms"),
            ms("first_token_again_ms"), ms("non_first_token_time(ms)"), ms("decode_ms_least"), ms("decode_ms_most"),
            ms("decode_floor_ms"), f"{100 * row['decode_of_floor']:.0f} %", f"{row['decode_tokens_per_s']:,.1f}")


def write_report(folder: Path, model: str, rows: list[dict[str, object]], uncompiled: list[str], progress: Progress) -> Path:
    """summary.md beside bench.csv, and plots over the batch sizes or lengths that were measured; the summary's path.

    `uncompiled`: the graphs whose steps had to run uncompiled.
    """
    reads, products = ([row[name] for row in rows] for name in ("read_gb_per_s", "product_gflop_per_s"))
    text = [f"# task=bench, {model}", "", "Medians. The floor of a step is the larger of bytes / bandwidth and operations / rate, "
            f"measured before and after each repetition's decode steps: {min(reads):.1f} to {max(reads):.1f} GB/s read, {min(products):,.0f} to "
            f"{max(products):,.0f} GFLOP/s of a product. Kept images spare the vision pass of the column *again*.", "",
            *markdown(*_table(rows)), "", *uncompiled_line(uncompiled)]
    for peer in {row["engine"]: None for row in rows if row["engine"] != OURS}:
        text += [f"- {line}" for line in _against(rows, peer)]
    for across, name in (("batch", "batch"), ("input_len", "text ids")):
        if len({row[across] for row in rows}) < 2:
            continue
        if not plots.available():
            progress.say(plots.MISSING)
            break
        for column, title, spread in (
                ("non_first_token_time(ms)", "a decode step, ms", ("decode_ms_least", "decode_ms_most")),
                ("first_token_time(ms)", "first token, ms", ("first_token_ms_least", "first_token_ms_most")),
                ("decode_tokens_per_s", "decoded tokens/s", ())):
            path = folder / plots.file_name(f"{title.split(',')[0]} by {across}")
            plots.lines(path, f"{model}: {title}", name, title, *_series(rows, across, column, spread))
            text += ["", f"![{title}]({path.name})"]
    path = folder / "summary.md"
    path.write_text("\n".join(text) + "\n", encoding="utf8")
    return path


def uncompiled_line(graphs: list[str]) -> list[str]:
    """Says of a report which of the engine's steps are not what it is measured for; nothing where all are."""
    return [f"**Could not be compiled, so these steps ran uncompiled: {'; '.join(graphs)}.**", ""] if graphs else []


def _against(rows: list[dict[str, object]], peer: str) -> Iterator[str]:
    """How many times sooner than a peer, a line a case."""
    case = lambda row: (row["batch"], row["input_len"], row["images"])  # noqa: E731
    ours = {case(row): row for row in rows if row["engine"] == OURS}
    for row in rows:
        if row["engine"] == peer:
            first, step = (row[name] / ours[case(row)][name] for name in ("first_token_time(ms)", "non_first_token_time(ms)"))
            yield f"{peer}, batch {row['batch']}, {row['input_len']} ids: first token {first:.2f}x, decode {step:.2f}x our time"


def _series(rows: list[dict[str, object]], across: str, column: str, spread: tuple[str, ...]) -> tuple[dict, list[str]]:
    """A line an engine and value of the other axis, with the floors of ours dashed."""
    other, unit = ("input_len", "ids") if across == "batch" else ("batch", "rows")
    many, series, floors = len({row[other] for row in rows}) > 1, {}, {}
    floor = {"non_first_token_time(ms)": "decode_floor_ms", "first_token_time(ms)": "first_token_floor_ms"}.get(column)
    for row in rows:
        name = f"{row['engine']}, {row[other]} {unit}" if many else str(row["engine"])
        series.setdefault(name, []).append((row[across], row[column], *(row[bound] for bound in spread)))
        if floor and row["engine"] == OURS:
            floors.setdefault(f"floor, {row[other]} {unit}" if many else "floor", []).append((row[across], row[floor]))
    return series | floors, list(floors)
