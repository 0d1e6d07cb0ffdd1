"""task=bench: how fast each batch size and length is, beside what the machine allows and beside peers in the same run."""

import csv
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mllama_graph import limits
from mllama_graph.checkpoint import model_of, write_random
from mllama_graph.config import Run
from mllama_graph.engine import Engine
from mllama_graph.images import Tiles, tile_image
from mllama_graph.limits import Limits
from mllama_graph.peers import Peer, settings_of
from mllama_graph.preflight import MADE_UP, plan_of, weights_of
from mllama_graph.processor import Request
from mllama_graph.report import Progress, columns, write_result
from mllama_graph.roofline import kv_elements, sizes, step_work, work
from mllama_graph.scheduler import Sampling
from mllama_graph.start import processor_of, start_engine
from mllama_graph.tasks.generate import finish_compiling

# Of the example that this engine replaces, in its order.
SEED_COLUMNS = ("batch", "input_len", "output_len", "embedding_len", "first_token_time(ms)", "non_first_token_time(ms)",
                "ResponseTime(ms)", "E2E Throughput Average(Tokens/s)")
MS = 1e3


@dataclass(frozen=True)
class Case:
    """Requests that are measured together: `batch` of `length` text ids and `images` images each."""

    batch: int
    length: int
    images: int
    new: int


@dataclass
class Timing:
    """Of one case, a value a repetition, in seconds; steps a value a decode step. `who` is the engine or a peer."""

    who: str
    image: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    # The first token of a request whose images are known.
    again: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def main(run: Run) -> None:
    """Measure every case; writes bench.csv and result.json, and prints a table."""
    task = run.task
    cases = [Case(batch, length, task.images, task.new_tokens) for batch in run.batch_sizes for length in run.lengths]
    run.batch = max(run.batch, *run.batch_sizes)
    run.max_input_length = max(run.max_input_length, *run.lengths)
    run.max_output_length = max(run.max_output_length, task.new_tokens)
    run.plan.compile = "wait"
    shape, checkpoint = model_of(run)
    processor, progress = processor_of(run, shape, checkpoint), Progress()
    plan = plan_of(run, shape, task.images)
    engine = start_engine(run, plan, shape, checkpoint, processor, progress)
    rank = engine.ranks.rank
    with tempfile.TemporaryDirectory(prefix="mllama_graph-bench-") as aside:
        folder = checkpoint.folder if checkpoint else Path(aside)
        if run.peers and weights_of(run) in MADE_UP:
            progress.say("writing the random weights for the peers")
            write_random(shape, {"model_type": "mllama", **run.model.config}, run.seed, rank.precision.store, folder)
        peers = [Peer(setting, folder, rank.device.type, rank.spec.threads, progress) for setting in settings_of(run.peers)]
        try:
            rows, found = [], []
            for case in cases:
                progress.say(f"batch {case.batch}, {case.length} text ids, {case.images} images each")
                timings, ceiling = _measure(engine, case, task.repetitions, peers, progress)
                found.append(ceiling)
                rows += [_row(engine, case, timing, ceiling) for timing in timings]
        finally:
            for peer in peers:
                peer.close()
    path = Path(run.output_dir) / "bench.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("\n" + columns(("engine", "batch", "ids", "first token", "of them vision", "again", "a decode step", "least", "most",
                          "floor", "of floor"), [_line(row) for row in rows]))
    print("\nlimits measured beside each case: " + "; ".join(
        f"read {c.bytes_per_second / 1e9:.1f} GB/s, product {c.flops / 1e9:.0f} GFLOP/s" for c in found), flush=True)
    write_result(Path(run.output_dir), asdict(run), metrics={"limits": [asdict(c) for c in found], "cases": rows},
                 graphs=[asdict(record) for record in engine.ranks.graphs.records])
    finish_compiling(engine.ranks, progress)
    progress.say(f"\n{path}")


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
        requests.append(Request(number, ids, tuple(images), tuple(range(len(images))), case.new, Sampling(), ignore_eos=True))
    return requests, spent


def _measure(engine: Engine, case: Case, repetitions: int, peers: list[Peer], progress: Progress) -> tuple[list[Timing], Limits]:
    """One run that is not counted, then repetitions in which the engine and each peer take turns."""
    ours, theirs = Timing("mllama_graph"), {peer: Timing(peer.setting.name) for peer in peers}
    ceilings = []
    for repetition in range(repetitions + 1):
        requests, spent = requests_of(engine, case, repetition, repetition)
        counted = Timing("") if repetition == 0 else ours
        counted.image.append(spent)
        _serve(engine, requests, counted, again=False)
        _serve(engine, requests_of(engine, case, 100 + repetition, repetition)[0], counted, again=True)
        ceilings.append(limits.measure(engine.ranks.rank.device))
        for peer, timing in list(theirs.items()):
            told = peer.run([list(r.ids) for r in requests], [t.data for r in requests for t in r.images],
                            requests[0].images[0].aspect if case.images else 0, case.new)
            if told is None:
                progress.say(f"{peer.setting.name} can't run this case: {peer.fault}")
                theirs.pop(peer)
            elif repetition:
                timing.first.append(told["first"])
                timing.steps += told["steps"]
                timing.whole.append(told["first"] + sum(told["steps"]))
    counted = ceilings[1:] or ceilings
    median = lambda name: statistics.median(getattr(ceiling, name) for ceiling in counted)  # noqa: E731
    return [ours, *theirs.values()], Limits(median("bytes_per_second"), median("flops"))


def _serve(engine: Engine, requests: list[Request], timing: Timing, again: bool) -> None:
    """Serve requests together. The first token's time is that of the last request to get one, as a batch would wait."""
    start, stats = time.perf_counter(), engine.stats
    vision, prefill, without = stats.vision_seconds, stats.prefill_seconds, set(range(len(requests)))
    for request in requests:
        engine.submit(request)
    first = None
    while not engine.idle:
        before, steps = time.perf_counter(), stats.decode_steps
        for delta in engine.step():
            without.discard(delta.id)
        if not without and first is None:
            first = time.perf_counter() - start
        elif first is not None and stats.decode_steps > steps and engine.load == len(requests):
            timing.steps.append(time.perf_counter() - before)
    if again:
        timing.again.append(first)
        return
    timing.first.append(first)
    timing.whole.append(time.perf_counter() - start)
    timing.vision.append(stats.vision_seconds - vision)
    timing.prefill.append(stats.prefill_seconds - prefill)


def _row(engine: Engine, case: Case, timing: Timing, ceiling: Limits) -> dict[str, object]:
    """A line of bench.csv. The floor is the larger of bytes / bandwidth and operations / peak."""
    rank, shape, plan = engine.ranks.rank, engine.ranks.shape, engine.ranks.plan
    widths = rank.precision.store.itemsize, rank.precision.compute.itemsize
    keys = case.batch * (case.length + case.new // 2)
    image_tokens = case.images * shape.vision.max_tiles * shape.vision.tokens
    image_keys = case.batch * image_tokens
    moved, flops = step_work(shape, case.images > 0, case.batch, keys, image_keys, (keys, image_keys), case.batch, *widths)
    step_floor = max(moved / ceiling.bytes_per_second, flops / ceiling.flops)
    seen = case.length * case.length / 2, case.length * image_tokens
    prompt = step_work(shape, case.images > 0, case.length, case.length, image_tokens, seen, 1, *widths)
    first_floor = case.batch * (max(prompt[0] / ceiling.bytes_per_second, prompt[1] / ceiling.flops)
                                + case.images * work(shape, plan.page_size, plan.vision(), *widths)[1] / ceiling.flops)
    ms = lambda times: round(statistics.median(times) * MS, 3) if times else ""  # noqa: E731
    step, first = ms(timing.steps), ms(timing.first)
    whole = statistics.median(timing.whole)
    return dict(zip(SEED_COLUMNS, (case.batch, case.length, case.new, image_tokens, first, step, round(whole * MS, 3),
                                   round(case.batch * case.new / whole, 3)))) | {
        "engine": timing.who, "images": case.images, "image_ms": ms(timing.image), "vision_ms": ms(timing.vision),
        "prefill_ms": ms(timing.prefill), "first_token_again_ms": ms(timing.again),
        "decode_ms_least": round(min(timing.steps) * MS, 3), "decode_ms_most": round(max(timing.steps) * MS, 3),
        "decode_floor_ms": round(step_floor * MS, 3), "decode_of_floor": round(step_floor * MS / step, 4),
        "first_token_floor_ms": round(first_floor * MS, 3), "first_token_of_floor": round(first_floor * MS / first, 4),
        "decode_bytes": round(moved), "decode_flops": round(flops),
        "weight_bytes": sizes(shape).total * widths[0],
        "self_kv_bytes": keys * kv_elements(shape, len(shape.text.self_layers)) * widths[1],
        "image_kv_bytes": image_keys * kv_elements(shape, len(shape.text.cross_layers)) * widths[1],
        "read_gb_per_s": round(ceiling.bytes_per_second / 1e9, 3), "product_gflop_per_s": round(ceiling.flops / 1e9, 3)}


def _line(row: dict[str, object]) -> tuple[str, ...]:
    ms = lambda name: f"{row[name]:,.1f} ms" if row[name] != "" else "-"  # noqa: E731
    return (str(row["engine"]), str(row["batch"]), str(row["input_len"]), ms("first_token_time(ms)"), ms("vision_ms"),
            ms("first_token_again_ms"), ms("non_first_token_time(ms)"), ms("decode_ms_least"), ms("decode_ms_most"),
            ms("decode_floor_ms"), f"{100 * row['decode_of_floor']:.0f} %")
