"""task=profile: where the time of one batch goes, by phase, operation and part of the model, for every rank."""

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from mllama_graph.measure import plots
from mllama_graph.model.checkpoint import model_of
from mllama_graph.core.config import Run, UserError
from mllama_graph.plan.resolve import plan_of
from mllama_graph.engine.profiler import TRACE, kind_of
from mllama_graph.core.report import Progress, columns, markdown, write_result
from mllama_graph.measure.session import read_csv, write_manifest
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.tasks.bench import Timing, cases_of, requests_of, serve, uncompiled_line
from mllama_graph.tasks.generate import finish_compiling

PHASES = ("vision", "prefill", "decode")
# Rows of a table of operations in summary.md; ops.csv has all.
SHOWN_OPS = 12

Rows = list[dict[str, str]]


def main(run: Run) -> None:
    """Serve a batch twice, the second time recorded; writes rank<k>/, summary.md and result.json.

    Raises UserError where there is nothing real to time.
    """
    if run.device == "npu-sim":
        raise UserError(
            "task=profile on a simulated NPU would time the interpreter. Use backend=inductor, or an NPU; "
            "task=verify and task=roofline model an NPU's times."
        )
    case, *others = cases_of(run)
    if others:
        raise UserError(
            "task=profile records one batch: give one of batch_sizes= and one of lengths=, or sweep with -m."
        )
    shape, checkpoint = model_of(run)
    progress = Progress()
    engine = start_engine(
        run, plan_of(run, shape, run.task.images), shape, checkpoint, processor_of(run, shape, checkpoint), progress
    )
    progress.say(
        f"profiling batch {case.batch}, {case.length} text ids, {case.images} images each, {case.new} new tokens"
    )
    # Once to have every graph loaded; then other prompts about other images.
    serve(engine, requests_of(engine, case, 0, 0)[0], case.new, Timing(""))
    engine.ranks.profile(begin=True)
    serve(engine, requests_of(engine, case, 1, 1)[0], case.new, Timing(""))
    engine.ranks.profile(begin=False)
    finish_compiling(engine.ranks, progress)
    folder = Path(run.output_dir)
    ops = {rank: read_csv(folder / f"rank{rank}" / "ops.csv") for rank in range(run.tp)}
    parts = {rank: read_csv(folder / f"rank{rank}" / "parts.csv") for rank in range(run.tp)}
    write_manifest(folder, run, engine.ranks.rank.device.type)
    tables = summary_tables(ops, parts)
    for title, (head, rows) in tables.items():
        print(f"\n{title}\n{columns(head, rows)}")
    text = [
        f"# Profile: {run.model.name}, tp={run.tp}, batch {case.batch}, {case.length} text ids, {case.images} images each, "
        f"{case.new} new tokens",
        "",
        *uncompiled_line(engine.ranks.graphs.failed),
        *in_words(ops, parts),
        "",
        f"Traces: {', '.join(f'rank{rank}/{TRACE}' for rank in ops)} (open them in Perfetto; the line *parts of the model* has "
        "the named ranges). The profiler's own cost is part of every figure.",
    ]
    for title, (head, rows) in tables.items():
        text += ["", f"## {title}", "", *markdown(head, rows)]
    if plots.available():
        kinds = by_kind(parts[0])
        plots.stacked(
            folder / "parts.png",
            f"{run.model.name}, rank 0: where the time goes",
            "ms",
            [phase for phase in PHASES if phase in kinds],
            {
                part: [kinds[phase].get(part, 0.0) for phase in PHASES if phase in kinds]
                for part in dict.fromkeys(part for own in kinds.values() for part in own)
            },
        )
        text += ["", "![parts](parts.png)"]
    (folder / "summary.md").write_text("\n".join(text) + "\n", encoding="utf8")
    write_result(
        folder,
        asdict(run),
        graphs=[asdict(record) for record in engine.ranks.graphs.records],
        metrics={
            "phase_ms": {f"rank{rank}": phases(rows) for rank, rows in ops.items()},
            "part_ms": {f"rank{rank}": by_kind(rows) for rank, rows in parts.items()},
        },
    )
    print(flush=True)
    progress.say(str(folder / "summary.md"))


def phases(ops: Rows) -> dict[str, float]:
    """Milliseconds of the host in each phase: operations' own times add up to their steps'."""
    return {
        phase: round(sum(float(row["ms"]) for row in ops if row["phase"] == phase and row["where"] == "host"), 3)
        for phase in PHASES
        if any(row["phase"] == phase for row in ops)
    }


def by_kind(parts: Rows) -> dict[str, dict[str, float]]:
    """phase -> part without its layer's number -> milliseconds."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in parts:
        if row.get("phase"):
            kinds[row["phase"]][kind_of(row["part"])] += float(row["ms"])
    return kinds


def summary_tables(
    ops: dict[int, Rows], parts: dict[int, Rows]
) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """The tables of summary.md, by title."""
    ranks = tuple(f"rank {rank} ms" for rank in ops)
    of_phase = {rank: phases(rows) for rank, rows in ops.items()}
    tables = {
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


def _share(part: float, whole) -> str:
    total = sum(whole)
    return f"{100 * part / total:.1f} %" if total else "-"


def in_words(ops: dict[int, Rows], parts: dict[int, Rows]) -> list[str]:
    """Where the time went, a sentence a line."""
    of_phase, kinds, said = phases(ops[0]), by_kind(parts[0]), []
    whole = sum(of_phase.values())
    said.append(
        f"Rank 0 spent {whole:,.1f} ms in steps: "
        + ", ".join(f"{ms:,.1f} ms ({100 * ms / whole:.0f} %) in {phase}" for phase, ms in of_phase.items())
        + "."
    )
    for phase in of_phase:
        op = max((row for row in ops[0] if row["phase"] == phase), key=lambda row: float(row["ms"]))
        line = f"In {phase} the operation that took longest is {op['op']} ({float(op['ms']):,.1f} ms in {op['calls']} calls)"
        if kinds.get(phase):
            part, ms = max(kinds[phase].items(), key=lambda item: item[1])
            line += f", the part {part} ({ms:,.1f} ms, {_share(ms, kinds[phase].values())} of its graphs)"
        said.append(line + ".")
    if missing := [phase for phase in of_phase if not kinds.get(phase)]:
        said.append(
            f"Parts of {', '.join(missing)} are not known: the trace does not show the products of weights one by one."
        )
    if len(ops) > 1:
        sums = {rank: sum(phases(rows).values()) for rank, rows in ops.items()}
        said.append(
            f"Ranks: from {min(sums.values()):,.1f} ms (rank {min(sums, key=sums.get)}) to {max(sums.values()):,.1f} ms "
            f"(rank {max(sums, key=sums.get)}); they wait for each other in every sum."
        )
    return [f"- {line}" for line in said]
