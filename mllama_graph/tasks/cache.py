"""task=cache: list, verify or prune the graph store."""

import time
from dataclasses import asdict
from pathlib import Path

from mllama_graph.plan.buckets import Bucket
from mllama_graph.core.config import Run, UserError
from mllama_graph.engine.rank import graph_store
from mllama_graph.core.report import columns, write_result
from mllama_graph.graphs.store import Entry

DAY, GB = 24 * 3600, 1e9


def main(run: Run) -> None:
    """Show the entries; task.action=verify reads each whole, prune removes by task.max_age_days and task.max_gb.

    Raises UserError where verify finds an unsound entry.
    """
    store, action = graph_store(run), run.task.action
    if action not in ("list", "verify", "prune"):
        raise UserError(f"task.action={action} is not one of list, verify, prune.")
    entries = store.entries(verify=action != "list")
    gone = [entry for entry in entries if _must_go(run, entries, entry)] if action == "prune" else []
    print(columns(("key", "graph", "weights", "MB", "days unused", "state"),
                  [_row(entry, "removed" if entry in gone else entry.fault or "ok") for entry in entries]))
    for entry in gone:
        store.remove(entry.key)
    if action == "prune":
        store.sweep()
    kept = [entry for entry in entries if entry not in gone]
    total = sum(entry.bytes for entry in kept)
    print(f"\n{len(kept)} graphs, {total / GB:.3f} GB in {store.folder}")
    unsound = [entry.key for entry in kept if entry.fault]
    write_result(Path(run.output_dir), asdict(run), metrics={
        "graphs": len(kept), "bytes": total, "removed": len(gone), "unsound": len(unsound)})
    if unsound:
        raise UserError(f"{len(unsound)} entries are not sound: {', '.join(unsound)}. A run compiles them again when it "
                        "needs them; task.action=prune removes them.")


def _must_go(run: Run, entries: list[Entry], entry: Entry) -> bool:
    """Unsound, older than allowed, or beyond the size that the last used entries may take."""
    before = sum(other.bytes for other in entries[:entries.index(entry) + 1])
    aged = run.task.max_age_days is not None and time.time() - entry.used > run.task.max_age_days * DAY
    return bool(entry.fault) or aged or (run.task.max_gb is not None and before > run.task.max_gb * GB)


def _row(entry: Entry, state: str) -> tuple[str, ...]:
    bucket = entry.fields.get("bucket")
    return (entry.key, str(Bucket(**bucket)) if bucket else "-", entry.fields.get("weights", "-").removeprefix("torch."),
            f"{entry.bytes / 1e6:.2f}", f"{(time.time() - entry.used) / DAY:.1f}", state)
