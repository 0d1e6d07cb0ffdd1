"""task=roofline: the floors of a model's steps on a device, from shapes and conf/hardware/. Needs no weights.

Hardware with figures for plan/latency.py also has modelled latencies, which are longer than the floors.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mllama_graph.core.config import TorchairChoice
from mllama_graph.core.devices import CPU, DEVICES, NPU_SIM
from mllama_graph.core.dtypes import BYTES, PAGE_BYTES
from mllama_graph.core.errors import UserError
from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.core.machine import available_memory
from mllama_graph.core.report import Progress, columns, markdown, write_result
from mllama_graph.measure import limits, plots
from mllama_graph.measure.session import BENCH, MODELLED, read_csv, read_manifest, write_csv, write_manifest
from mllama_graph.model.formats import Storage, page_bytes
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cost import GB, Floor, floor_of, kv_bytes, sizes, step_work, work
from mllama_graph.plan.forms import form_of
from mllama_graph.plan.latency import Latency, Model, latency_of
from mllama_graph.plan.memory import Memory, memory
from mllama_graph.plan.resolve import RANDOM_DTYPE, ResolvedRun
from mllama_graph.tasks.options import RooflineOptions

BATCHES = (1, 2, 4, 8, 16, 32, 64)
RANKS = (1, 2, 4, 8)
MS = 1e3
# The search for the largest batch stops here, since memory is no longer what limits it.
MOST_ROWS = 4096

Row = dict[str, Any]


class Roofline:
    """The tables of one model on one kind of hardware. `storage`: as that hardware would store it."""

    def __init__(self, run: ResolvedRun, options: RooflineOptions, hardware: HardwareChoice):
        self.run, self.options, self.hardware, self.shape, self.plan = run, options, hardware, run.shape, run.plan
        stored = run.checkpoint.stored if run.checkpoint else RANDOM_DTYPE
        precision = DEVICES[hardware.device].precision(run.asked["dtype"], run.kv, stored)
        page = page_bytes(PAGE_BYTES[precision.kv], run.shape.text.head_width)
        self.storage = Storage(BYTES[precision.store], BYTES[precision.compute], page, run.storage.formats)
        self.calibrated = hardware.calibration.cores > 0
        # As on the newest CANN: this host may have none.
        form = form_of(TorchairChoice(**run.asked["backend"]["torchair"]), NPU_SIM)
        self.model = Model(run.shape, self.storage, run.tp, hardware, form)

    def bucket_row(self, bucket: Bucket) -> Row:
        """The floor of a full bucket, and its modelled latency, per rank."""
        moved, flops = work(self.shape, self.plan.page_size, bucket, self.storage)
        floor = floor_of(self.shape, self.plan.page_size, bucket, self.storage, self.run.tp, self.hardware)
        return {
            "bucket": str(bucket),
            "MB": round(moved / self.run.tp / 1e6, 1),
            "GFLOP": round(flops / self.run.tp / 1e9, 2),
            **_times(floor),
            **(_modelled(latency_of(self.model, self.plan.page_size, bucket)) if self.calibrated else {}),
        }

    def fit_row(self, ranks: int) -> Row:
        """The memory of one of `ranks` ranks, and the largest batch of the longest requests, with images, that fits."""
        batch, images = self.run.limits.batch, self.options.images
        share = self._share(ranks)

        def needed(batch: int) -> Memory:
            return memory(self.shape, self.run.planned(batch, images), self.storage, ranks)

        low, high = 0, 1
        while high <= MOST_ROWS and needed(high).total <= share:
            low, high = high, high * 2
        while high <= MOST_ROWS and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle).total <= share else (low, middle)
        held = needed(batch)
        return {
            "tp": ranks,
            "weights GB": round(held.weights / GB, 2),
            "self K/V GB": round(held.self_pages / GB, 2),
            "image K/V GB": round(held.image_pages / GB, 2),
            "workspace GB": round(held.workspace / GB, 2),
            "total GB": round(held.total / GB, 2),
            "fits": "yes" if held.total <= share else "no",
            "largest batch": f"{low:,} or more" if high > MOST_ROWS else low,
        }

    def step_row(self, batch: int, length: int, images: int, new_tokens: int) -> Row:
        """The floor of a batch's decode step, and its modelled latency, halfway through its new tokens."""
        run, shape, rate = self.run, self.shape, self.hardware
        keys = batch * (length + new_tokens // 2)
        image_keys = batch * images * shape.vision.max_tiles * shape.vision.tokens
        moved, flops = step_work(shape, images > 0, batch, keys, image_keys, (keys, image_keys), batch, self.storage)
        # All-reduces don't depend on the lengths.
        links = floor_of(
            shape, self.plan.page_size, Bucket("decode", batch, batch, 1, int(images > 0)), self.storage, run.tp, rate
        ).links
        floor = Floor(moved / rate.memory_bytes_per_second / run.tp, flops / rate.flops / run.tp, links)
        parts, (self_kv, image_kv) = sizes(shape, self.storage), kv_bytes(shape, keys, image_keys, self.storage)
        read = parts.self_layers + parts.head + parts.cross_layers * (images > 0)
        held = parts.total + self_kv + image_kv
        modelled = self.model.decode(batch, keys / batch, image_keys / batch) if self.calibrated else None
        return {
            "batch": batch,
            "ids": length,
            **_times(floor),
            **(_modelled(modelled) if modelled else {}),
            "tokens/s": round(batch / (modelled or floor).seconds, 1),
            "fits": "yes" if held / run.tp <= self._share(run.tp) else "no",
            "weights MB": round(read / 1e6, 1),
            "self K/V MB": round(self_kv / 1e6, 1),
            "image K/V MB": round(image_kv / 1e6, 1),
        }

    def distances(self, session: Path) -> list[Row]:
        """The measured decode steps of a session, beside their floors on this hardware.

        Raises UserError where the session measured another model.
        """
        measured = read_manifest(session)["config"]["model"]["name"]
        if measured != self.run.model:
            raise UserError(
                f"task.measured={session} measured model={measured}, and this is model={self.run.model}. "
                "Give the same model."
            )
        rows = []
        for row in read_csv(session / BENCH):
            batch, length, images = int(row["batch"]), int(row["input_len"]), int(row["images"])
            found = self.step_row(batch, length, images, int(row["output_len"]))
            floor, step = found["floor ms"], float(row["non_first_token_time(ms)"])
            rows.append(
                {
                    "engine": row["engine"],
                    "batch": batch,
                    "ids": length,
                    "images": images,
                    "decode step ms": step,
                    "floor ms": floor,
                    "floor reached": f"{100 * floor / step:.1f} %",
                    **({"latency ms": found["latency ms"]} if self.calibrated else {}),
                }
            )
        return rows

    def plots(self, folder: Path, steps: list[Row], progress: Progress) -> list[Path]:
        """Write the plots and return their paths; none where matplotlib is not installed."""
        if not plots.available():
            progress.say(plots.MISSING)
            return []
        title = f"{self.run.model}, tp={self.run.tp}, {self.hardware.name} (modelled)"
        kind, bound = ("latency", "") if self.calibrated else ("floor", ", upper bound")
        by_length: dict[str, list[Row]] = {}
        for row in steps:
            by_length.setdefault(f"{row['ids']} ids", []).append(row)

        def over_batch(name: str) -> dict[str, list[tuple[Any, Any]]]:
            return {length: [(row["batch"], row[name]) for row in rows] for length, rows in by_length.items()}

        paths = [folder / f"{name}.png" for name in ("latency_by_batch", "tokens_by_batch", "bytes_split", "roofline")]
        plots.lines(paths[0], f"Decode step, {kind}: {title}", "batch", "ms", over_batch(f"{kind} ms"))
        plots.lines(paths[1], f"Decode throughput{bound}: {title}", "batch", "tokens/s", over_batch("tokens/s"))
        first = next(iter(by_length.values()))
        plots.stacked(
            paths[2],
            f"Bytes of a decode step, {first[0]['ids']} ids: {title}",
            "MB",
            [f"batch {row['batch']}" for row in first],
            {name: [row[f"{name} MB"] for row in first] for name in ("weights", "self K/V", "image K/V")},
        )
        points = {}
        for bucket in self.plan.buckets():
            moved, flops = work(self.shape, self.plan.page_size, bucket, self.storage)
            points[str(bucket)] = flops / moved
        plots.roofline(
            paths[3], f"Roofline of a rank: {title}", self.hardware.memory_bytes_per_second, self.hardware.flops, points
        )
        return paths

    def _share(self, ranks: int) -> float:
        """The memory of one rank in bytes; ranks on a CPU share its memory."""
        return self.hardware.memory_bytes / (ranks if self.hardware.device == CPU.name else 1)


def main(run: ResolvedRun) -> None:
    """Compute and print the tables, and write roofline.csv, summary.md, plots and result.json.

    Raises UserError where task.measured= can't be compared with this model or hardware.
    """
    options, progress, folder = run.options, Progress(), run.output_dir
    assert isinstance(options, RooflineOptions)
    session = Path(options.measured).expanduser() if options.measured else None
    if session:
        _same_device(session, run.hardware)
    hardware, on_cpu = _measured_here(run.hardware, progress), run.hardware.device == CPU.name
    model = Roofline(run, options, hardware)
    steps = [
        model.step_row(batch, length, options.images, options.new_tokens)
        for length in options.lengths
        for batch in sorted({*BATCHES, *options.batch_sizes})
    ]
    tables = {
        f"A step of each full bucket, tp={run.tp}": [model.bucket_row(bucket) for bucket in run.plan.buckets()],
        f"Memory of a rank, batch {run.limits.batch}, up to {run.plan.max_length} tokens per sequence": [
            model.fit_row(ranks) for ranks in RANKS if _divides(run.shape, ranks)
        ],
        f"Decode steps, tp={run.tp}, {options.images} images per request, halfway to {options.new_tokens} new tokens; "
        "MB of all ranks": steps,
    }
    if session:
        tables[f"Measured, beside the floors of {hardware.name}"] = model.distances(session)
    heading = (
        f"{run.model}, tp={run.tp}, on {hardware.name}: {hardware.flops / 1e12:,.2f} TFLOP/s, "
        f"{hardware.memory_bytes_per_second / 1e9:,.1f} GB/s, {hardware.memory_bytes / 1e9:.0f} GB per rank"
        f"{' (measured now)' if on_cpu else '; all modelled, nothing measured'}"
    )
    print(heading)
    for title, rows in tables.items():
        print(f"\n{title}\n" + columns(*_cells(rows)))
    write_csv(folder / "roofline.csv", [{"table": title, **row} for title, rows in tables.items() for row in rows])
    write_manifest(folder, run.asked, CPU.name if on_cpu else MODELLED, torch.backends.cpu.get_cpu_capability(), None)
    text = [f"# Roofline: {heading}"]
    for title, rows in tables.items():
        text += ["", f"## {title}", "", *markdown(*_cells(rows))]
    text += [f"\n![{path.stem}]({path.name})" for path in model.plots(folder, steps, progress)]
    (folder / "summary.md").write_text("\n".join(text) + "\n", encoding="utf8")
    write_result(folder, run.asked, metrics={"hardware": asdict(hardware), "tables": tables})
    progress.say(f"\n{folder / 'summary.md'}")


def _same_device(folder: Path, hardware: HardwareChoice) -> None:
    """Raises UserError where the folder holds no session, or a session of another kind of device."""
    device = read_manifest(folder)["hardware"]["device"]
    if device != hardware.device:
        raise UserError(
            f"task.measured={folder} was measured on {device}, and hardware={hardware.name} is {hardware.device}. "
            "Use hardware= of the same device; conf/hardware/ lists them."
        )


def _measured_here(hardware: HardwareChoice, progress: Progress) -> HardwareChoice:
    """The hardware's figures; those of a CPU are measured now."""
    if hardware.device != CPU.name:
        return hardware
    progress.say("measuring this CPU")
    found = limits.measure(torch.device(CPU.name), False, lambda: None)
    return replace(
        hardware,
        flops=found.flops,
        memory_bytes_per_second=found.bytes_per_second,
        memory_bytes=float(available_memory()[0]),
    )


def _divides(shape: ModelShape, ranks: int) -> bool:
    try:
        shape.check_ranks(ranks)
    except UserError:
        return False
    return True


def _times(floor: Floor) -> Row:
    return {
        "memory ms": round(floor.memory * MS, 4),
        "products ms": round(floor.products * MS, 4),
        "links ms": round(floor.links * MS, 4),
        "floor ms": round(floor.seconds * MS, 4),
        "bound by": floor.bound,
    }


def _modelled(latency: Latency) -> Row:
    return {
        "linear ms": round(latency.products * MS, 4),
        "attention ms": round(latency.attention * MS, 4),
        "vector ms": round(latency.vector * MS, 4),
        "all-reduces ms": round(latency.all_reduces * MS, 4),
        "latency ms": round(latency.seconds * MS, 4),
        "cores": latency.described_cores,
    }


def _cells(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, (int, float)) else str(value)

    return tuple(rows[0]), [tuple(cell(value) for value in row.values()) for row in rows]
