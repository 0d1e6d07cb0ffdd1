"""Asks the system to read a checkpoint's tensors before they are loaded, so that the disk works while others are."""

import contextlib
import os
from collections import deque
from pathlib import Path

from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.meta_files import MetaFiles
from mllama_graph.model.small import place_of
from mllama_graph.model.table import table

# Bytes that are asked for before they are needed: a tenth of a second of a fast disk, and a part of the page cache.
AHEAD = 256 << 20
# Bytes that are asked for at once.
STEP = 8 << 20


class ReadAhead:
    """The files of a checkpoint, leaf by leaf in the order of the table. Files in the page cache are left alone."""

    def __init__(self, files: CheckpointFiles):
        found: dict[str, list[tuple[Path, int, int]]] = {}
        # Meta's own files are read through zip archives; not every system takes such hints.
        known = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT") and not isinstance(files, MetaFiles)
        for entry in table(files.shape) if known else ():
            stored = files.published.stored.get(entry.name)
            for name in stored.tensors.values() if stored else (entry.name,):
                named, path = files.tensors[name]
                place = place_of(path, named)
                found.setdefault(entry.path, []).append((path, place.start, place.stop))
        # Sizes of leaves that are loaded later, and ranges of files that were not asked for.
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
                # A hint, which not every file system takes.
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
