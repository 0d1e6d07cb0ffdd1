"""Plots of a session, as PNG files. matplotlib is optional; without it, reports have tables only."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MISSING = "no plots: matplotlib is not installed (pip install -e '.[plots]')"
WIDTH, HEIGHT, DPI = 8.0, 4.0, 110

# The points of a line: (x, y) in order, or (x, y, minimum, maximum).
Points = Sequence[tuple[float, ...]]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def file_name(title: str) -> str:
    """The file name of a plot."""
    return f"{title.replace('/', ' per ').replace(' ', '_')}.png"


def lines(
    path: Path, title: str, across: str, up: str, series: Mapping[str, Points], dashed: Sequence[str] = ()
) -> None:
    """Draw a line per name, dashed for floors (`dashed`). With minimum and maximum, a band shows the spread."""
    axes = _axes(title, across, up)
    for name, points in series.items():
        if not points:
            continue
        x, y = [point[0] for point in points], [point[1] for point in points]
        (drawn,) = axes.plot(x, y, "--" if name in dashed else "o-", label=name, linewidth=1.5, markersize=4)
        if len(points[0]) == 4:
            axes.fill_between(
                x, [p[2] for p in points], [p[3] for p in points], color=drawn.get_color(), alpha=0.15, linewidth=0
            )
    axes.set_ylim(bottom=0)
    _ticks(axes, [point[0] for points in series.values() for point in points])
    _legend(axes)
    _save(axes, path)


def stacked(path: Path, title: str, up: str, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Draw a bar per name, with its parts stacked."""
    axes = _axes(title, "", up)
    base = [0.0] * len(names)
    for part, values in parts.items():
        axes.bar(names, values, bottom=base, label=part, width=0.6)
        base = [below + value for below, value in zip(base, values)]
    axes.tick_params(axis="x", labelrotation=30 if max(map(len, names)) > 6 else 0, labelsize=8)
    _legend(axes)
    _save(axes, path)


def roofline(path: Path, title: str, bytes_per_second: float, flops: float, points: Mapping[str, float]) -> None:
    """Draw the bandwidth and compute roofs, and on them each name at its operations per byte."""
    axes = _axes(title, "operations per byte", "operations per second")
    ridge = flops / bytes_per_second
    across = [min(ridge, *points.values()) / 4, ridge, max(ridge, *points.values()) * 4]
    axes.plot(across, [min(flops, x * bytes_per_second) for x in across], color="black", linewidth=1.5)
    for name, intensity in points.items():
        axes.plot([intensity], [min(flops, intensity * bytes_per_second)], "x", label=name, markersize=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _legend(axes)
    _save(axes, path)


def _axes(title: str, across: str, up: str) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    colours = list(matplotlib.colormaps["tab20"](range(20)))
    axes = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained").subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.title.set_fontsize(10)
    axes.set_prop_cycle(color=[*colours[::2], *colours[1::2]])
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _legend(axes: Any) -> None:
    """Place the legend beside the plot, where it hides nothing."""
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _ticks(axes: Any, values: Sequence[float]) -> None:
    """Set a tick at each measured value if there are at most 12."""
    places = sorted(set(values))
    if len(places) <= 12:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()


def _save(axes: Any, path: Path) -> None:
    axes.figure.savefig(path)
