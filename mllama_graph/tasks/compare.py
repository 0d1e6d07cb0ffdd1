"""task=compare: what became faster or slower between two sessions of task=bench, given the spread of both."""

from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, columns, markdown, write_result
from mllama_graph.measure.session import BENCH, read_csv, read_manifest
from mllama_graph.plan.resolve import ResolvedTask
from mllama_graph.tasks.options import CompareOptions

# Figure -> its columns (median, minimum, maximum); the last two are empty where no spread is recorded.
FIGURES = {
    "first token": ("first_token_time(ms)", "first_token_ms_least", "first_token_ms_most"),
    "same image again": ("first_token_again_ms", "", ""),
    "vision": ("vision_ms", "", ""),
    "decode step": ("non_first_token_time(ms)", "decode_ms_least", "decode_ms_most"),
}
CASE = ("engine", "batch", "input_len", "output_len", "images")
HEAD = (
    "engine",
    "batch",
    "ids",
    "new",
    "images",
    "figure",
    "a ms",
    "b ms",
    "b / a",
    "spread of a",
    "spread of b",
    "verdict",
)
# A relative change up to this counts as noise where no spread is recorded.
UNMEASURED_NOISE = 0.05


def main(run: ResolvedTask) -> None:
    """Print and write the comparison of all cases that both sessions have.

    Raises UserError where a folder holds no session, hardware differs, or the sessions have no case in common.
    """
    options = run.options
    assert isinstance(options, CompareOptions)
    if options.a is None or options.b is None:
        raise UserError("task=compare needs two sessions: a=FOLDER b=FOLDER.")
    folders = [Path(options.a).expanduser(), Path(options.b).expanduser()]
    manifests = [read_manifest(folder) for folder in folders]
    differing = _differences(*(manifest["hardware"] for manifest in manifests))
    if differing and not options.across_hardware:
        raise UserError(
            f"the sessions ran on different hardware ({'; '.join(differing)}), so their ratios don't compare the "
            "engine alone. Use task.across_hardware=true to compare them anyway."
        )
    a, b = ({tuple(row[name] for name in CASE): row for row in read_csv(folder / BENCH)} for folder in folders)
    rows = [line for case in a if case in b for line in _lines(case, a[case], b[case])]
    if not rows:
        raise UserError(
            f"{folders[0]} and {folders[1]} have no case in common: the same engine, batch, ids, new tokens and images."
        )
    progress = Progress()
    changed = _differences(
        *({**manifest["versions"], "commit": manifest["commit"], **_flat(manifest["config"])} for manifest in manifests)
    )
    notes = [f"hardware: {line}" for line in differing] + changed
    if only := [name for name, one, other in (("a", a, b), ("b", b, a)) for case in one if case not in other]:
        notes.append(f"cases in only one session: {only.count('a')} in a, {only.count('b')} in b")
    print(columns(HEAD, rows))
    told = {name: sum(row[-1] == name for row in rows) for name in ("faster", "slower", "within the noise")}
    counts = ", ".join(f"{count} {name}" for name, count in told.items())
    print(f"\n{counts}", flush=True)
    for note in notes:
        progress.say(f"differs: {note}")
    folder = run.output_dir
    (folder / "summary.md").write_text(
        "\n".join(
            [
                f"# From {folders[0].name} to {folders[1].name}",
                "",
                counts,
                "",
                *markdown(HEAD, rows),
                "",
                *(f"- differs: {note}" for note in notes),
            ]
        )
        + "\n",
        encoding="utf8",
    )
    write_result(
        folder, run.asked, metrics={"changes": [dict(zip(HEAD, row)) for row in rows], "differs": notes, **told}
    )
    progress.say(f"\n{folder / 'summary.md'}")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def _lines(case: tuple[str, ...], a: dict[str, str], b: dict[str, str]) -> list[tuple[str, ...]]:
    """One table line for each figure that both sessions measured."""
    found = []
    for figure, (column, least, most) in FIGURES.items():
        before, after = (float(row.get(column) or 0) for row in (a, b))
        # Text-only cases have no vision step, and peers don't report it.
        if not before or not after:
            continue
        spreads = [(float(row[least]), float(row[most])) if least and row.get(least) else None for row in (a, b)]
        found.append(
            (
                *case,
                figure,
                f"{before:,.2f}",
                f"{after:,.2f}",
                f"{after / before:.3f}",
                *(f"{s[0]:,.2f} to {s[1]:,.2f}" if s else "-" for s in spreads),
                verdict(before, after, *spreads),
            )
        )
    return found


def verdict(before: float, after: float, *spreads: Any) -> str:
    """Judge a change: it counts if each median lies outside the other session's range, where ranges are recorded."""
    if all(spreads):
        (a_least, a_most), (b_least, b_most) = spreads
        out = (after < a_least or after > a_most) and (before < b_least or before > b_most)
    else:
        out = abs(after / before - 1) > UNMEASURED_NOISE
    return ("faster" if after < before else "slower") if out else "within the noise"
