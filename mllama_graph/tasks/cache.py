"""task=cache: list, verify or prune the graph store."""

import time

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import columns, write_result
from mllama_graph.graphs.store import Entry, GraphStore
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.resolve import ResolvedTask
from mllama_graph.tasks.options import CacheOptions

DAY, GB = 24 * 3600, 1e9


def main(run: ResolvedTask) -> None:
    """List the entries. task.action=verify reads each one in full; prune removes by task.max_age_days and task.max_gb.

    Raises UserError where verify finds an unsound entry.
    """
    store, options = GraphStore(run.store_folder), run.options
    assert isinstance(options, CacheOptions)
    entries = store.entries(verify=options.action != "list")
    pruning = options.action == "prune"
    gone = [entry for entry in entries if _must_go(options, entries, entry)] if pruning else []
    print(
        columns(
            ("key", "graph", "weights", "MB", "days unused", "state"),
            [_row(entry, "removed" if entry in gone else entry.fault or "ok") for entry in entries],
        )
    )
    for entry in gone:
        store.remove(entry.key)
    if pruning:
        store.sweep()
    kept = [entry for entry in entries if entry not in gone]
    total = sum(entry.bytes for entry in kept)
    print(f"\n{len(kept)} graphs, {total / GB:.3f} GB in {store.folder}")
    unsound = [entry.key for entry in kept if entry.fault]
    write_result(
        run.output_dir,
        run.asked,
        metrics={"graphs": len(kept), "bytes": total, "removed": len(gone), "unsound": len(unsound)},
    )
    if unsound:
        raise UserError(
            f"{len(unsound)} entries are not sound: {', '.join(unsound)}. A run compiles them again when it "
            "needs them; task.action=prune removes them."
        )


def _must_go(options: CacheOptions, entries: list[Entry], entry: Entry) -> bool:
    """Whether an entry is unsound, unused for too long, or beyond max_gb, counted from the most recently used entry."""
    up_to_it = sum(other.bytes for other in entries[: entries.index(entry) + 1])
    aged = options.max_age_days is not None and time.time() - entry.used > options.max_age_days * DAY
    return bool(entry.fault) or aged or (options.max_gb is not None and up_to_it > options.max_gb * GB)


def _row(entry: Entry, state: str) -> tuple[str, ...]:
    bucket = entry.fields.get("bucket")
    return (
        entry.key,
        str(Bucket.of(bucket)) if bucket else "-",
        entry.fields.get("weights", "-").removeprefix("torch."),
        f"{entry.bytes / 1e6:.2f}",
        f"{(time.time() - entry.used) / DAY:.1f}",
        state,
    )
