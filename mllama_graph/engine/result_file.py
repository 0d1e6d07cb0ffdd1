"""The file results.jsonl: written as requests finish, sorted at the end; a later run can continue it (resume=true)."""

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from mllama_graph.core.report import strict_json
from mllama_graph.engine.results import Result
from mllama_graph.engine.stats import Totals

# How many of the requests' unknown fields are named to the user.
MOST_IGNORED = 20


def id_key(id: Any) -> bytes:
    """A hash that is equal for equal ids."""
    return hashlib.blake2b(json.dumps(id, sort_keys=True).encode(), digest_size=16).digest()


class Results:
    """Writes results.jsonl. Each result is written as soon as its request finishes, so that an interrupt loses none.

    With `resume`, the results that an earlier run left in the file can be kept, see `keep`. `close` sorts the file.
    Memory doesn't grow with the number of lines: ids and offsets in the file are in a temporary SQLite database.
    """

    def __init__(self, path: Path, resume: bool = False):
        self.path = path
        self.totals = Totals()
        # Numbers of requests that could not be served, and of results kept from an earlier run.
        self.errors, self.kept = 0, 0
        # Fields of requests that the engine does not know; they may be misspelt.
        self.ignored: set[str] = set()
        # An empty name stands for a temporary database, which SQLite writes to disk only if it outgrows its cache.
        self._index = sqlite3.connect("")
        self._index.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE places (place INTEGER PRIMARY KEY, begin INTEGER);"
            "CREATE TABLE earlier (id BLOB, line TEXT, begin INTEGER); CREATE INDEX by_id ON earlier (id);"
        )
        resume = resume and path.exists()
        self._last_place, self._sorted = -1, not resume
        self._end = self._read_earlier() if resume else 0
        self._file = path.open("r+b" if resume else "wb")
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _read_earlier(self) -> int:
        """Index the results of an earlier run, except errors. Returns the offset of the last complete line's end."""
        begin = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    given = json.loads(line)
                    if "error" not in given:
                        entry = (id_key(given["id"]), given.get("line_hash"), begin)
                        self._index.execute("INSERT INTO earlier VALUES (?, ?, ?)", entry)
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError, sqlite3.Error):
                    # The line is not a result: `close` leaves it out of the sorted file.
                    pass
                begin += len(line)
        return begin

    def claim(self, id: Any) -> bool:
        """Record an id of the requests file. Returns False if an earlier line has it."""
        return self._index.execute("INSERT OR IGNORE INTO ids VALUES (?)", (id_key(id),)).rowcount == 1

    def keep(self, place: int, id: Any, line_hash: str) -> bool:
        """Keep the result that an earlier run wrote for the request with index `place`. Returns False if there is none.

        The result must have the request's id and the hash of its line; if it has no hash, the id is enough.
        """
        if self._sorted and not self.kept:
            return False
        found = self._index.execute(
            "SELECT rowid, begin FROM earlier WHERE id = ? AND (line = ? OR line IS NULL) LIMIT 1",
            (id_key(id), line_hash),
        ).fetchone()
        if found is None:
            return False
        self._index.execute("DELETE FROM earlier WHERE rowid = ?", (found[0],))
        self._place(place, found[1])
        self.kept += 1
        return True

    def add(self, place: int, result: Result, line_hash: str | None = None) -> None:
        """Write the result of the request with index `place` in the input, and add it to the totals."""
        fields = result.line() | ({"line_hash": line_hash} if line_hash else {})
        written = (strict_json(fields) + "\n").encode()
        self._file.write(written)
        self._file.flush()
        self._place(place, self._end)
        self._end += len(written)
        if result.error is None:
            self.totals.add(result)
        else:
            self.errors += 1

    def _place(self, place: int, begin: int) -> None:
        self._index.execute("INSERT INTO places VALUES (?, ?)", (place, begin))
        self._sorted = self._sorted and place > self._last_place
        self._last_place = place

    def close(self) -> None:
        """Sort the results into the order of the input, and remove lines of an earlier run that were not kept."""
        self._file.close()
        if not self._sorted:
            aside = self.path.with_name(".results.jsonl")
            with self.path.open("rb") as file, aside.open("wb") as ordered:
                for (begin,) in self._index.execute("SELECT begin FROM places ORDER BY place"):
                    file.seek(begin)
                    ordered.write(file.readline())
            shutil.copymode(self.path, aside)
            aside.replace(self.path)
        self._index.close()
