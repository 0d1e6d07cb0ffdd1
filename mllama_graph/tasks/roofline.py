"""task=roofline: what a device allows a model at the most, from shapes and the figures of conf/hardware/. No weights."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mllama_graph.measure import limits
from mllama_graph.measure import plots
from mllama_graph.plan.buckets import Bucket, Plan, make_plan
from mllama_graph.core.config import HardwareChoice, Run, UserError
from mllama_graph.plan.resolve import MADE_UP, WIDTH, host_memory, plan_of, precision, shape_of_run, stored_in, weights_of
from mllama_graph.core.report import Progress, columns, markdown, write_result
from mllama_graph.plan.cost import GB, Floor, floor_of, kv_bytes, memory, sizes, step_work, work
from mllama_graph.measure.session import BENCH, MODELLED, read_csv, read_manifest, write_csv, write_manifest
from mllama_graph.model.shape import ModelShape

BATCHES = (1, 2, 4, 8, 16, 32, 64)
RANKS = (1, 2, 4, 8)
MS = 1e3
# Beyond this a batch is limited by something else.
MOST_ROWS = 4096


def main(run: Run) -> None:
    """Model and print; writes roofline.csv, summary.md, plots and result.json.

    Raises UserError where the tables can't be made.
    """
    if run.weights is None and run.model.weights is None:
        run.weights = "meta"
    shape, progress = shape_of_run(run), Progress()
    if run.task.measured:
        _same_device(Path(run.task.measured).expanduser(), run.hardware)
    hardware = _measured_here(run.hardware, progress)
    stored = stored_in(weights_of(run)) if weights_of(run) not in MADE_UP else "bf16"
    widths = tuple(WIDTH[name] for name in precision(run.dtype, hardware.device, stored))
    plan = plan_of(run, shape)
    buckets = [_bucket_row(shape, plan, bucket, widths, run.tp, hardware) for bucket in plan.buckets()]
    fits = [_fit_row(run, shape, ranks, widths, hardware) for ranks in RANKS if _divides(shape, ranks)]
    steps = [
        _step_row(run, shape, batch, length, widths, hardware)
        for length in run.lengths
        for batch in sorted({*BATCHES, *run.batch_sizes})
    ]
    tables = {
        f"A step of each full bucket, tp={run.tp}": buckets,
        f"Memory of a rank, batch {run.batch}, up to {plan.max_length} tokens a sequence": fits,
        f"Decode steps, tp={run.tp}, {run.task.images} images a request, halfway to {run.task.new_tokens} new tokens; MB of all ranks": steps,
    }
    if run.task.measured:
        tables[f"Measured, beside the floors of {hardware.name}"] = _distances(run, shape, widths, hardware)
    folder = Path(run.output_dir)
    heading = (
        f"{run.model.name}, tp={run.tp}, on {hardware.name}: {hardware.flops / 1e12:,.2f} TFLOP/s, "
        f"{hardware.memory_bytes_per_second / 1e9:,.1f} GB/s, {hardware.memory_bytes / 1e9:.0f} GB a rank"
        f"{' (measured now)' if hardware.device == 'cpu' else '; all modelled, nothing measured'}"
    )
    print(heading)
    for title, rows in tables.items():
        print(f"\n{title}\n" + columns(*_cells(rows)))
    write_csv(folder / "roofline.csv", [{"table": title, **row} for title, rows in tables.items() for row in rows])
    write_manifest(folder, run, "cpu" if hardware.device == "cpu" else MODELLED)
    shown = _plots(folder, run, hardware, plan, shape, widths, steps, progress)
    text = [f"# Roofline: {heading}"] + [
        line for title, rows in tables.items() for line in ("", f"## {title}", "", *markdown(*_cells(rows)))
    ]
    text += [f"\n![{path.stem}]({path.name})" for path in shown]
    (folder / "summary.md").write_text("\n".join(text) + "\n", encoding="utf8")
    write_result(folder, asdict(run), metrics={"hardware": asdict(hardware), "tables": tables})
    progress.say(f"\n{folder / 'summary.md'}")


def _same_device(folder: Path, hardware: HardwareChoice) -> None:
    """Raises UserError where a session is none, or was measured on another kind of device."""
    device = read_manifest(folder)["hardware"]["device"]
    if device != hardware.device:
        raise UserError(
            f"task.measured={folder} was measured on {device}, and hardware={hardware.name} is {hardware.device}. "
            "Use hardware= of the same device; conf/hardware/ lists them."
        )


def _measured_here(hardware: HardwareChoice, progress: Progress) -> HardwareChoice:
    """The device's figures; a CPU's are measured."""
    if hardware.device != "cpu":
        return hardware
    progress.say("measuring this CPU")
    found = limits.measure(torch.device("cpu"))
    return replace(
        hardware,
        flops=found.flops,
        memory_bytes_per_second=found.bytes_per_second,
        memory_bytes=float(host_memory()[0]),
    )


def _divides(shape: ModelShape, ranks: int) -> bool:
    try:
        shape.check_ranks(ranks)
    except UserError:
        return False
    return True


def _bucket_row(
    shape: ModelShape, plan: Plan, bucket: Bucket, widths: tuple[int, int], ranks: int, hardware: HardwareChoice
) -> dict[str, Any]:
    moved, flops = work(shape, plan.page_size, bucket, *widths)
    floor = floor_of(shape, plan.page_size, bucket, *widths, ranks, hardware)
    return {
        "bucket": str(bucket),
        "MB": round(moved / ranks / 1e6, 1),
        "GFLOP": round(flops / ranks / 1e9, 2),
        **_times(floor),
    }


def _times(floor: Floor) -> dict[str, Any]:
    return {
        "memory ms": round(floor.memory * MS, 4),
        "products ms": round(floor.products * MS, 4),
        "links ms": round(floor.links * MS, 4),
        "floor ms": round(floor.seconds * MS, 4),
        "bound by": floor.bound,
    }


def _fit_row(
    run: Run, shape: ModelShape, ranks: int, widths: tuple[int, int], hardware: HardwareChoice
) -> dict[str, Any]:
    """What a rank of `ranks` holds, and the largest batch of the run's longest requests, each with its images."""
    needed = memory(shape, _plan(run, shape, run.batch), *widths, ranks)
    share = _share(hardware, ranks)
    fits = lambda batch: memory(shape, _plan(run, shape, batch), *widths, ranks).total <= share  # noqa: E731
    low, high = 0, 1
    while high <= MOST_ROWS and fits(high):
        low, high = high, high * 2
    while high <= MOST_ROWS and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {
        "tp": ranks,
        "weights GB": round(needed.weights / GB, 2),
        "self K/V GB": round(needed.self_pages / GB, 2),
        "image K/V GB": round(needed.image_pages / GB, 2),
        "workspace GB": round(needed.workspace / GB, 2),
        "total GB": round(needed.total / GB, 2),
        "fits": "yes" if needed.total <= share else "no",
        "largest batch": f"{low:,} or more" if high > MOST_ROWS else low,
    }


def _plan(run: Run, shape: ModelShape, batch: int) -> Plan:
    """The plan of a batch whose every request has its images."""
    chosen = replace(run.plan, decode_batch=None, num_pages=None, num_images=max(batch * run.task.images, 1))
    return make_plan(replace(run, batch=batch, plan=chosen), shape, max(run.task.images, 1))


def _step_row(
    run: Run, shape: ModelShape, batch: int, length: int, widths: tuple[int, int], hardware: HardwareChoice
) -> dict[str, Any]:
    """A decode step of a batch at exactly its lengths."""
    keys, image_keys = _keys(run, shape, batch, length)
    moved, flops = step_work(shape, run.task.images > 0, batch, keys, image_keys, (keys, image_keys), batch, *widths)
    floor = _step_floor(run, shape, batch, moved, flops, widths, hardware)
    parts, (self_kv, image_kv) = sizes(shape), kv_bytes(shape, keys, image_keys, widths[1])
    read = parts.self_layers + parts.head + parts.cross_layers * (run.task.images > 0)
    held = parts.total * widths[0] + self_kv + image_kv
    return {
        "batch": batch,
        "ids": length,
        **_times(floor),
        "tokens/s": round(batch / floor.seconds, 1),
        "fits": "yes" if held / run.tp <= _share(hardware, run.tp) else "no",
        "weights MB": round(read * widths[0] / 1e6, 1),
        "self K/V MB": round(self_kv / 1e6, 1),
        "image K/V MB": round(image_kv / 1e6, 1),
    }


def _share(hardware: HardwareChoice, ranks: int) -> float:
    """Bytes that a rank has: those of a CPU share its memory."""
    return hardware.memory_bytes / (ranks if hardware.device == "cpu" else 1)


def _keys(run: Run, shape: ModelShape, batch: int, length: int) -> tuple[int, int]:
    return (
        batch * (length + run.task.new_tokens // 2),
        batch * run.task.images * shape.vision.max_tiles * shape.vision.tokens,
    )


def _step_floor(
    run: Run,
    shape: ModelShape,
    batch: int,
    moved: float,
    flops: float,
    widths: tuple[int, int],
    hardware: HardwareChoice,
) -> Floor:
    sums = floor_of(
        shape,
        run.plan.page_size,
        Bucket("decode", batch, batch, 1, int(run.task.images > 0)),
        *widths,
        run.tp,
        hardware,
    )
    return Floor(moved / hardware.memory_bytes_per_second / run.tp, flops / hardware.flops / run.tp, sums.links)


def _distances(run: Run, shape: ModelShape, widths: tuple[int, int], hardware: HardwareChoice) -> list[dict[str, Any]]:
    """The decode steps of a session, beside what this device would allow."""
    folder = Path(run.task.measured).expanduser()
    manifest = read_manifest(folder)
    if manifest["config"]["model"]["name"] != run.model.name:
        raise UserError(
            f"task.measured={folder} measured model={manifest['config']['model']['name']}, and this is "
            f"model={run.model.name}. Give the same model."
        )
    rows = []
    for row in read_csv(folder / BENCH):
        batch, length, images = int(row["batch"]), int(row["input_len"]), int(row["images"])
        asked = replace(run, task=replace(run.task, images=images, new_tokens=int(row["output_len"])))
        floor = _step_row(asked, shape, batch, length, widths, hardware)["floor ms"]
        step = float(row["non_first_token_time(ms)"])
        rows.append(
            {
                "engine": row["engine"],
                "batch": batch,
                "ids": length,
                "images": images,
                "a decode step ms": step,
                "floor ms": floor,
                "of floor": f"{100 * floor / step:.1f} %",
            }
        )
    return rows


def _cells(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return tuple(rows[0]), [
        tuple(f"{value:,}" if isinstance(value, (int, float)) else str(value) for value in row.values()) for row in rows
    ]


def _plots(
    folder: Path,
    run: Run,
    hardware: HardwareChoice,
    plan: Plan,
    shape: ModelShape,
    widths: tuple[int, int],
    steps: list[dict[str, Any]],
    progress: Progress,
) -> list[Path]:
    if not plots.available():
        progress.say(plots.MISSING)
        return []
    title = f"{run.model.name}, tp={run.tp}, {hardware.name} (modelled)"
    by_length: dict[str, list[dict[str, Any]]] = {}
    for row in steps:
        by_length.setdefault(f"{row['ids']} ids", []).append(row)
    over = lambda name: {length: [(row["batch"], row[name]) for row in rows] for length, rows in by_length.items()}  # noqa: E731
    paths = [folder / f"{name}.png" for name in ("latency_by_batch", "tokens_by_batch", "bytes_split", "roofline")]
    plots.lines(paths[0], f"Floor of a decode step: {title}", "batch", "ms", over("floor ms"))
    plots.lines(paths[1], f"Most decoded tokens: {title}", "batch", "tokens/s", over("tokens/s"))
    first = next(iter(by_length.values()))
    plots.stacked(
        paths[2],
        f"Bytes of a decode step, {first[0]['ids']} ids: {title}",
        "MB",
        [f"batch {row['batch']}" for row in first],
        {name: [row[f"{name} MB"] for row in first] for name in ("weights", "self K/V", "image K/V")},
    )
    points = {}
    for bucket in plan.buckets():
        moved, flops = work(shape, plan.page_size, bucket, *widths)
        points[str(bucket)] = flops / moved
    plots.roofline(paths[3], f"Roofline of a rank: {title}", hardware.memory_bytes_per_second, hardware.flops, points)
    return paths
