"""A sweep's folder: the progress of the sweep, and a summary of what its jobs measured."""

import json
import math
import os
from pathlib import Path
from typing import Any

from mllama_graph.core.report import markdown
from mllama_graph.measure import plots
from mllama_graph.measure.session import overrides, write_csv

SUMMARY = "summary"
# Metrics of a job in summary.md: title -> names in result.json, which differ by task. summary.csv has all metrics.
SHOWN = {
    "start to first token s": ("start_to_first_token_s",),
    "first token ms": ("time_to_first_token_ms", "first_token_time(ms)"),
    "decode step ms": ("time_per_output_token_ms", "non_first_token_time(ms)"),
    "tokens/s": ("tokens_per_second", "decode_tokens_per_s"),
    "exact match %": ("exact_match_percent",),
    "KL divergence": ("kl_mean",),
    "top-1 agreement %": ("top1_agreement_percent",),
}


def standing(sweep: Path, number: int, total: int, begun: float, now: float) -> str:
    """The progress of a sweep of `total` jobs as job `number` (from 0) starts; `begun` and `now` are in seconds."""
    done = len(list(sweep.glob("*/result.json")))
    left = f", about {_duration((now - begun) / done * (total - done))} left" if done else ""
    return f"job {number + 1} of {total}{left}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def write_summary(sweep: Path) -> Path:
    """Write summary.csv, summary.md and plots over the swept keys for all jobs that have ended; called after each."""
    rows = [row for job in jobs_of(sweep) for row in _rows(*job)]
    aside = sweep / f".{SUMMARY}.{os.getpid()}"
    write_csv(aside, rows)
    aside.replace(sweep / f"{SUMMARY}.csv")
    swept = _swept(rows)
    shown = {title: names for title, names in SHOWN.items() if any(_metric(row, names) is not None for row in rows)}
    text = [
        "# Sweep",
        "",
        *markdown(("job", *(name for name, _ in swept), "status", *shown), [_line(row, swept, shown) for row in rows]),
        "",
    ]
    text += [f"- job {row['job']}: {row['error']}" for row in rows if row["error"]]
    if not plots.available():
        text += ["", plots.MISSING]
    else:
        text += [f"\n![{name}]({path.name})" for name, path in _plots(sweep, rows, swept)]
    aside.write_text("\n".join(text) + "\n", encoding="utf8")
    return aside.replace(sweep / f"{SUMMARY}.md")


def jobs_of(sweep: Path) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
    """(number, overrides, result.json) of the jobs that have ended, in order."""
    jobs = []
    for path in sweep.glob("*/result.json"):
        number = path.parent.name.split("_", 1)[0]
        words = (word.partition("=") for word in overrides(path.parent))
        given = {key.lstrip("+~"): value for key, _, value in words}
        jobs.append((int(number) if number.isdigit() else 0, given, json.loads(path.read_text(encoding="utf8"))))
    return sorted(jobs, key=lambda job: job[0])


def _rows(number: int, given: dict[str, str], result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for a job, or one row for each case that it measured."""
    head = {"job": number, **given, "status": result["status"], "error": result["error"] or ""}
    metrics = {name: value for name, value in result["metrics"].items() if isinstance(value, (int, float))}
    return [{**head, **metrics, **case} for case in result["metrics"].get("cases", [{}])]


def _swept(rows: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The keys that differ among jobs (overrides and the axes of cases), with their values."""
    overridden = [
        name for name in dict.fromkeys(n for row in rows for n in row) if name not in ("job", "status", "error")
    ]
    axes = ("batch", "input_len", "engine")
    found = []
    for name in overridden:
        values = list(dict.fromkeys(row[name] for row in rows if name in row))
        if len(values) > 1 and (name in axes or all(isinstance(value, str) for value in values)):
            found.append((name, values))
    return found


def _line(
    row: dict[str, Any], swept: list[tuple[str, list[Any]]], shown: dict[str, tuple[str, ...]]
) -> tuple[str, ...]:
    cells = [_number(_metric(row, names)) for names in shown.values()]
    return (str(row["job"]), *(str(row.get(name, "-")) for name, _ in swept), str(row["status"]), *cells)


def _metric(row: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((row[name] for name in names if isinstance(row.get(name), (int, float))), None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if not 0 < abs(value) < 0.1 else f"{value:.2g}"


def _plots(sweep: Path, rows: list[dict[str, Any]], swept: list[tuple[str, list[Any]]]) -> list[tuple[str, Path]]:
    """Write one plot per metric: lines over the first numeric swept key, else one bar per combination."""
    across = next((name for name, values in swept if all(_is_number(value) for value in values)), None)
    made = []
    for shown, names in SHOWN.items():
        measured = [(row, value) for row in rows if (value := _metric(row, names)) is not None]
        path = sweep / plots.file_name(shown)
        series: dict[str, list] = {}
        for row, value in measured:
            label = ", ".join(
                f"{row.get(name, '-')}" if name == "engine" else f"{name}={row.get(name, '-')}"
                for name, _ in swept
                if name != across
            )
            series.setdefault(label or shown, []).append((float(row.get(across) or 0) if across else 0.0, value))
        if not measured or not swept:
            continue
        if across:
            plots.lines(path, shown, across, shown, {label: sorted(points) for label, points in series.items()})
        else:
            plots.stacked(path, shown, shown, list(series), {shown: [points[0][1] for points in series.values()]})
        made.append((shown, path))
    return made


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
