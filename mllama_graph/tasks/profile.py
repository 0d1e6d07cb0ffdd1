"""task=profile: where the time of one batch goes, by phase, operation and part of the model, for every rank."""

from collections import defaultdict
from collections.abc import Iterable

import torch

from mllama_graph.core.report import Progress, columns, markdown, write_result
from mllama_graph.engine.profiler import TRACE
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.engine.workload import cases_of, fill_pages, requests_of, serve
from mllama_graph.measure import plots
from mllama_graph.measure.bench_report import uncompiled_line
from mllama_graph.measure.session import read_csv, write_manifest
from mllama_graph.measure.timing import Case, Timing
from mllama_graph.measure.trace import kind_of
from mllama_graph.plan.resolve import ResolvedRun

# The title of the table of HostSeconds.
HOST = "The host's work per step of any kind, rank 0"
PHASES = ("vision", "prefill", "mixed", "decode")
# Rows of each table of operations in summary.md; ops.csv has all operations.
SHOWN_OPS = 12

Rows = list[dict[str, str]]
# Head and rows of a table, by its title.
Tables = dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]


def main(run: ResolvedRun) -> None:
    """Serve a batch twice, profile the second time, and write rank<k>/, summary.md and result.json."""
    (case,), progress, folder = cases_of(run.options), Progress(), run.output_dir
    engine = start_engine(run, processor_of(run), progress)
    progress.say(
        f"profiling batch {case.batch}, {case.length} text ids, {case.images} images each, {case.new} new tokens"
    )
    if case.cached:
        fill_pages(engine)
    # The first batch loads every graph; the second has other prompts and images, so that images are encoded again.
    serve(engine, requests_of(engine, case, 0, 0)[0], case.new, Timing(""))
    engine.reset_stats()
    engine.executor.profile(begin=True)
    serve(engine, requests_of(engine, case, 1, 1)[0], case.new, Timing(""))
    engine.executor.profile(begin=False)
    host = engine.executor.rank.host.per_step(engine.stats.steps)
    engine.close(progress)
    ops = {rank: read_csv(folder / f"rank{rank}" / "ops.csv") for rank in range(run.tp)}
    parts = {rank: read_csv(folder / f"rank{rank}" / "parts.csv") for rank in range(run.tp)}
    backend = engine.executor.rank.backend
    write_manifest(folder, run.asked, run.device.name, torch.backends.cpu.get_cpu_capability(), backend.name())
    work = tuple(f"{microseconds:,.1f}" for microseconds in host.values())
    tables: Tables = {HOST: (tuple(f"{name} us" for name in host), [work])} | summary_tables(ops, parts)
    for title, (head, rows) in tables.items():
        print(f"\n{title}\n{columns(head, rows)}")
    _write_summary(run, case, ops, parts, tables, engine.executor.graphs.failed)
    write_result(
        folder,
        run.asked,
        graphs=engine.graph_records(),
        metrics={
            "phase_ms": {f"rank{rank}": phases(rows) for rank, rows in ops.items()},
            "part_ms": {f"rank{rank}": by_kind(rows) for rank, rows in parts.items()},
            "host_us_per_step": host,
        },
    )
    print(flush=True)
    progress.say(str(folder / "summary.md"))


def _write_summary(
    run: ResolvedRun, case: Case, ops: dict[int, Rows], parts: dict[int, Rows], tables: Tables, uncompiled: list[str]
) -> None:
    """Write summary.md, with a plot where matplotlib is installed."""
    text = [
        f"# Profile: {run.model}, tp={run.tp}, batch {case.batch}, {case.length} text ids, {case.images} images each, "
        f"{case.new} new tokens",
        "",
        *uncompiled_line(uncompiled),
        *in_words(ops, parts),
        "",
        f"Traces: {', '.join(f'rank{rank}/{TRACE}' for rank in ops)} (open them in Perfetto; the line "
        "*parts of the model* has the named ranges). The profiler's own cost is part of every figure.",
    ]
    for title, (head, rows) in tables.items():
        text += ["", f"## {title}", "", *markdown(head, rows)]
    if plots.available():
        kinds = by_kind(parts[0])
        shown = [phase for phase in PHASES if phase in kinds]
        names = dict.fromkeys(part for own in kinds.values() for part in own)
        plots.stacked(
            run.output_dir / "parts.png",
            f"{run.model}, rank 0: where the time goes",
            "ms",
            shown,
            {part: [kinds[phase].get(part, 0.0) for phase in shown] for part in names},
        )
        text += ["", "![parts](parts.png)"]
    (run.output_dir / "summary.md").write_text("\n".join(text) + "\n", encoding="utf8")


def phases(ops: Rows) -> dict[str, float]:
    """Host milliseconds of each phase, summed over the self times of its operations."""
    return {
        phase: round(sum(float(row["ms"]) for row in ops if row["phase"] == phase and row["where"] == "host"), 3)
        for phase in PHASES
        if any(row["phase"] == phase for row in ops)
    }


def by_kind(parts: Rows) -> dict[str, dict[str, float]]:
    """Milliseconds by phase and part, summed over layers of the same kind."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in parts:
        if row.get("phase"):
            kinds[row["phase"]][kind_of(row["part"])] += float(row["ms"])
    return kinds


def summary_tables(ops: dict[int, Rows], parts: dict[int, Rows]) -> Tables:
    """The tables of summary.md, by title."""
    ranks = tuple(f"rank {rank} ms" for rank in ops)
    of_phase = {rank: phases(rows) for rank, rows in ops.items()}
    tables: Tables = {
        "By phase": (
            ("phase", *ranks),
            [(phase, *(f"{of[phase]:,.2f}" for of in of_phase.values())) for phase in of_phase[0]],
        )
    }
    of_kind = {rank: by_kind(rows) for rank, rows in parts.items()}
    rows = [
        (phase, part, *(f"{of[phase][part]:,.2f}" for of in of_kind.values()), _share(ms, of_kind[0][phase].values()))
        for phase in of_kind[0]
        for part, ms in of_kind[0][phase].items()
    ]
    if rows:
        tables["By part of the model, inside the graphs"] = (("phase", "part", *ranks, "of its phase"), rows)
    for phase in of_phase[0]:
        for where in ("host", "device"):
            own = [row for row in ops[0] if row["phase"] == phase and row["where"] == where]
            if own:
                every = [float(row["ms"]) for row in own]
                tables[f"Operations of {phase}, rank 0, {where}"] = (
                    ("op", "calls", "ms", "share"),
                    [
                        (row["op"], row["calls"], f"{float(row['ms']):,.2f}", _share(float(row["ms"]), every))
                        for row in own[:SHOWN_OPS]
                    ],
                )
    return tables


def _share(part: float, whole: Iterable[float]) -> str:
    total = sum(whole)
    return f"{100 * part / total:.1f} %" if total else "-"


def in_words(ops: dict[int, Rows], parts: dict[int, Rows]) -> list[str]:
    """Sentences on where the time went, one per line."""
    of_phase, kinds, said = phases(ops[0]), by_kind(parts[0]), []
    whole = sum(of_phase.values())
    said.append(
        f"Rank 0 spent {whole:,.1f} ms in steps: "
        + ", ".join(f"{ms:,.1f} ms ({100 * ms / whole:.0f} %) in {phase}" for phase, ms in of_phase.items())
        + "."
    )
    for phase in of_phase:
        op = max((row for row in ops[0] if row["phase"] == phase), key=lambda row: float(row["ms"]))
        line = (
            f"In {phase} the operation that took longest is {op['op']} "
            f"({float(op['ms']):,.1f} ms in {op['calls']} calls)"
        )
        if kinds.get(phase):
            part, ms = max(kinds[phase].items(), key=lambda item: item[1])
            line += f", the part {part} ({ms:,.1f} ms, {_share(ms, kinds[phase].values())} of its graphs)"
        said.append(line + ".")
    if missing := [phase for phase in of_phase if not kinds.get(phase)]:
        said.append(
            f"Parts of {', '.join(missing)} are not known: the trace does not show every product with a weight."
        )
    if len(ops) > 1:
        sums = {rank: sum(phases(rows).values()) for rank, rows in ops.items()}
        said.append(
            f"Ranks: from {min(sums.values()):,.1f} ms (rank {min(sums, key=lambda rank: sums[rank])}) to "
            f"{max(sums.values()):,.1f} ms (rank {max(sums, key=lambda rank: sums[rank])}); they wait for each other "
            "in every all-reduce."
        )
    return [f"- {line}" for line in said]
