"""Counts what was begun and not finished: rows, so that one that ends its process is not served without end, and starts
of engines.

Ray starts a lost process again and serves its rows again, and can't know what was at fault. Counts are sizes of files
in a folder that all processes share; they outlive the process. Imports no Ray.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Attempts to serve rows together. After that each is served alone, so that its count is its own.
TOGETHER = 2
# Attempts to serve a row alone.
ALONE = 2
# What the start of an engine is counted as: no row's name, which has a colon.
START = "start"
# Starts for each of the replicas, in a row without one that succeeds.
STARTS = 3


class Attempts:
    """The attempts of one process. Several threads may use it.

    folder: of the counts; None: nothing is counted.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._changed, self._inside, self._alone = threading.Condition(), 0, False

    @contextmanager
    def counted(self, names: Iterable[str], most: int, alone: bool = False) -> Iterator[bool]:
        """Whether `names`, rows or START, may be tried: false after `most` attempts in which the process ended.

        Inside an `alone` context no other one is open in this process.
        """
        path = None if self._folder is None else self._folder / _digest(names)
        with self._taken(alone):
            if path is None:
                yield True
                return
            earlier = path.stat().st_size if path.exists() else 0
            if earlier >= most:
                yield False
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(b".")
            yield True
            # Not where it raises: Ray then serves the rows again, too.
            with suppress(FileNotFoundError):
                path.unlink()

    @contextmanager
    def _taken(self, alone: bool) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not (alone and self._inside))
            self._alone, self._inside = alone, self._inside + 1
        try:
            yield
        finally:
            with self._changed:
                self._alone, self._inside = False, self._inside - 1
                self._changed.notify_all()


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
