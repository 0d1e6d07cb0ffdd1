"""Asks the system to read a checkpoint's tensors ahead of the loader: the disk works while others are converted."""

import contextlib
import os
from collections import deque
from pathlib import Path

from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.meta_files import MetaFiles
from mllama_graph.model.small import place_of
from mllama_graph.model.table import WHOLE, Shard, table

# The most bytes ahead of the loader: what a fast disk reads in a tenth of a second. The page cache must hold them.
AHEAD = 256 << 20
# Bytes per request to the system.
STEP = 8 << 20


class ReadAhead:
    """A rank's part of a checkpoint's files, leaf by leaf in the order of the table.

    What the page cache holds is not asked for. Of an unquantised tensor that is split along its first axis, only the
    rank's rows are asked for; other tensors are asked for as a whole.
    """

    def __init__(self, files: CheckpointFiles, shard: Shard = WHOLE):
        found: dict[str, list[tuple[Path, int, int]]] = {}
        # Tensors of Meta's own files lie in zip archives, which are not read ahead. Not every system has these calls.
        known = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT") and not isinstance(files, MetaFiles)
        for entry in table(files.shape) if known else ():
            stored = files.published.stored.get(entry.name)
            for name in stored.tensors.values() if stored else (entry.name,):
                named, path = files.tensors[name]
                place = place_of(path, named)
                rows = entry.region(WHOLE if stored else shard)[0]
                first, last = (
                    place.start + (place.stop - place.start) * end // entry.shape[0] for end in (rows.start, rows.stop)
                )
                found.setdefault(entry.path, []).append((path, first, last))
        # Bytes of each leaf whose loading has not begun, and the ranges of files that are still to be requested.
        self._left = deque(sum(stop - start for _, start, stop in ranges) for ranges in found.values())
        self._unasked = deque(range_ for ranges in found.values() for range_ in ranges)
        self._ahead = 0

    def advance(self) -> None:
        """Call when the loading of the next leaf begins."""
        while self._unasked and self._ahead < AHEAD:
            path, start, stop = self._unasked.popleft()
            self._ahead += stop - start
            _ask(path, start, stop)
        if self._left:
            self._ahead -= self._left.popleft()


def _ask(path: Path, start: int, stop: int) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        for first in range(start, stop, STEP):
            if not _is_cached(file, first) or not _is_cached(file, min(first + STEP, stop) - 1):
                # Only a hint: some file systems refuse it.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file, first, min(STEP, stop - first), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)


def _is_cached(file: int, offset: int) -> bool:
    """Whether a byte can be read without waiting for the disk."""
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False
