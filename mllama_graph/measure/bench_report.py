"""The report of task=bench: its table, summary.md and plots."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mllama_graph.core.report import Progress, markdown
from mllama_graph.measure import plots
from mllama_graph.measure.bench_rows import BESIDE, OURS, Row
from mllama_graph.measure.neighbours import NOTABLE_CORES

HEAD = (
    "engine",
    "batch",
    "ids",
    "first token",
    "vision part",
    "same image again",
    "decode step",
    "min",
    "99 %",
    "floor",
    "floor reached",
    "tokens/s",
)
# Plots over batch sizes or lengths: (column, title, columns of the minimum and the maximum).
FIGURES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("non_first_token_time(ms)", "decode step, ms", ("decode_ms_least", "decode_ms_most")),
    ("first_token_time(ms)", "first token, ms", ("first_token_ms_least", "first_token_ms_most")),
    ("decode_tokens_per_s", "decoded tokens/s", ()),
)
FLOORS = {"non_first_token_time(ms)": "decode_floor_ms", "first_token_time(ms)": "first_token_floor_ms"}


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and cells of the table that is printed and written to summary.md."""
    return HEAD, [_cells(row) for row in rows]


def _cells(row: Row) -> tuple[str, ...]:
    def ms(name: str) -> str:
        return f"{row[name]:,.1f} ms" if row[name] != "" else "-"

    return (
        str(row["engine"]),
        str(row["batch"]),
        str(row["input_len"]),
        ms("first_token_time(ms)"),
        ms("vision_ms"),
        ms("first_token_again_ms"),
        ms("non_first_token_time(ms)"),
        ms("decode_ms_least"),
        ms("decode_ms_99th"),
        ms("decode_floor_ms"),
        f"{100 * row['decode_of_floor']:.0f} %",
        f"{row['decode_tokens_per_s']:,.1f}",
    )


def write_report(folder: Path, model: str, rows: Sequence[Row], uncompiled: list[str], progress: Progress) -> Path:
    """Write summary.md beside bench.csv, and plots over batch and length where they vary. Returns the summary's path.

    `uncompiled`: the graphs that could not be compiled, so that their steps ran uncompiled.
    """
    reads, products = ([row[name] for row in rows] for name in ("read_gb_per_s", "product_gflop_per_s"))
    text = [
        f"# task=bench, {model}",
        "",
        "Medians. The floor of a step is the larger of bytes / bandwidth and operations / rate (bytes / bandwidth "
        "alone where layers round activations to int8, whose products are faster than the one that is measured), "
        f"measured before and after each repetition's decode steps: {min(reads):.1f} to {max(reads):.1f} GB/s read, "
        f"{min(products):,.0f} to {max(products):,.0f} GFLOP/s of a product. *Floor reached* is the floor divided by "
        "the measured step. *Same image again* is a first token whose images are cached, so that no vision step runs.",
        "",
        *markdown(*table(rows)),
        "",
        *uncompiled_line(uncompiled),
        *_noise(rows),
    ]
    for peer in {row["engine"]: None for row in rows if row["engine"] != OURS}:
        text += [f"- {line}" for line in _against(rows, peer)]
    for across, name in (("batch", "batch"), ("input_len", "text ids")):
        if len({row[across] for row in rows}) < 2:
            continue
        if not plots.available():
            progress.say(plots.MISSING)
            break
        for column, title, spread in FIGURES:
            path = folder / plots.file_name(f"{title.split(',')[0]} by {across}")
            plots.lines(path, f"{model}: {title}", name, title, *_series(rows, across, column, spread))
            text += ["", f"![{title}]({path.name})"]
    path = folder / "summary.md"
    path.write_text("\n".join(text) + "\n", encoding="utf8")
    return path


def uncompiled_line(graphs: list[str]) -> list[str]:
    """Lines for a report that list the graphs that could not be compiled; empty where there are none."""
    return [f"**Could not be compiled, so these steps ran uncompiled: {'; '.join(graphs)}.**", ""] if graphs else []


def _noise(rows: Sequence[Row]) -> list[str]:
    """Lines that say how much of the machine other processes took, where that is notable."""
    taken = max((row["others_cores"] for row in rows if row["engine"] == OURS), default=0.0)
    if taken < NOTABLE_CORES:
        return []
    return [
        f"**The machine was not quiet: other processes took up to {taken:.1f} cores while this engine was timed.**",
        "",
    ]


def _against(rows: Sequence[Row], who: str) -> Iterator[str]:
    """One line per case: the times of another engine as multiples of ours, those beside busy processes of ours there.

    Our own times beside busy processes are multiples of those without.
    """

    def case(row: Row) -> tuple[Any, ...]:
        return row["batch"], row["input_len"], row["images"]

    name = who.partition(BESIDE)[0]
    base = OURS if name == OURS else OURS + who[len(name) :]
    ours = {case(row): row for row in rows if row["engine"] == base}
    for row in rows:
        if row["engine"] == who and case(row) in ours:
            first, step = (
                row[name] / ours[case(row)][name] for name in ("first_token_time(ms)", "non_first_token_time(ms)")
            )
            yield (
                f"{who}, batch {row['batch']}, {row['input_len']} ids: first token {first:.2f}x, "
                f"decode {step:.2f}x the time of {base}"
            )


def _series(
    rows: Sequence[Row], across: str, column: str, spread: tuple[str, ...]
) -> tuple[dict[str, list[Any]], list[str]]:
    """One line per engine and value of the other axis, and the names of the dashed lines, which are our floors."""
    other, unit = ("input_len", "ids") if across == "batch" else ("batch", "rows")
    many = len({row[other] for row in rows}) > 1
    series: dict[str, list[Any]] = {}
    floors: dict[str, list[Any]] = {}
    for row in rows:
        name = f"{row['engine']}, {row[other]} {unit}" if many else str(row["engine"])
        series.setdefault(name, []).append((row[across], row[column], *(row[bound] for bound in spread)))
        if column in FLOORS and row["engine"] == OURS:
            floors.setdefault(f"floor, {row[other]} {unit}" if many else "floor", []).append(
                (row[across], row[FLOORS[column]])
            )
    return series | floors, list(floors)
