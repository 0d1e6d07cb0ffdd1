"""The file results.jsonl: written as requests finish, sorted at the end; a later run can continue it (resume=true).

A finished result of an earlier run is never removed: what is not kept is moved to a file with a number.
"""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import strict_json, write_json
from mllama_graph.engine.results import Result
from mllama_graph.engine.stats import Totals

# How many of the requests' unknown fields are named to the user.
MOST_IGNORED = 20
# The file beside results.jsonl that records the keys on which its results depend.
SETTINGS = "settings.json"


def id_key(id: Any) -> bytes:
    """A hash that is equal for equal ids."""
    return hashlib.blake2b(json.dumps(id, sort_keys=True).encode(), digest_size=16).digest()


class Results:
    """Writes results.jsonl. Each result is written as soon as its request finishes, so that an interrupt loses none.

    With `resume`, the results that an earlier run left in the file can be kept, see `keep`. No file is changed before
    `open`; `close` sorts the file. Memory doesn't grow with the number of lines: ids and offsets in the file are in a
    temporary SQLite database.
    """

    def __init__(self, path: Path, resume: bool = False):
        self.path = path
        self.totals = Totals()
        # Numbers of requests that could not be served, and of results kept from an earlier run.
        self.errors, self.kept = 0, 0
        self.first_error: str | None = None
        # Fields of requests that the engine does not know; they may be misspelt.
        self.ignored: set[str] = set()
        # An empty name stands for a temporary database, which SQLite writes to disk only if it outgrows its cache.
        self._index = sqlite3.connect("")
        self._index.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE places (place INTEGER PRIMARY KEY, begin INTEGER);"
            "CREATE TABLE earlier (id BLOB, line TEXT, begin INTEGER); "
            "CREATE INDEX by_id ON earlier (id); CREATE INDEX by_line ON earlier (line);"
        )
        self._resume = resume and path.exists()
        self._last_place, self._sorted = -1, not self._resume
        self._end = self._read_earlier() if self._resume else 0

    def open(self, say: Callable[[str], None] = lambda line: None) -> "Results":
        """Begin to write. `say` is told which file keeps the results of an earlier run, if any."""
        self._say = say
        if not self._resume and self.path.exists() and self.path.stat().st_size:
            aside = numbered(self.path)
            self.path.rename(aside)
            say(f"the earlier {self.path} is kept as {aside.name}")
        self._file = self.path.open("r+b" if self._resume else "wb")
        self._file.truncate(self._end)
        self._file.seek(self._end)
        return self

    @property
    def has_earlier(self) -> bool:
        """Whether an earlier run has left finished results that can be kept."""
        return self._finds("1")

    def fits(self, line_hashes: Iterable[str | None]) -> bool:
        """Whether an earlier result is that of a line with one of these hashes, or does not tell its line."""
        return self._finds("line IS NULL") or any(self._finds("line = ?", digest) for digest in line_hashes)

    def _finds(self, condition: str, *values: Any) -> bool:
        return self._index.execute(f"SELECT 1 FROM earlier WHERE {condition} LIMIT 1", values).fetchone() is not None

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
            self.first_error = self.first_error or result.error

    def check_served(self, requests: Path, count: int) -> None:
        """Raises UserError where each of the `count` lines of a requests file was refused."""
        if self.errors == count:
            raise UserError(f"no line of requests={requests} could be served. The first error: {self.first_error}")

    def _place(self, place: int, begin: int) -> None:
        self._index.execute("INSERT INTO places VALUES (?, ?)", (place, begin))
        self._sorted = self._sorted and place > self._last_place
        self._last_place = place

    def close(self) -> None:
        """Sort the results into the order of the input, and move those of an earlier run that were not kept."""
        self._file.close()
        if not self._sorted:
            aside = self.path.with_name(".results.jsonl")
            left = self._index.execute("SELECT count(*) FROM earlier").fetchone()[0]
            if left:
                elsewhere = numbered(self.path)
                self._copy("SELECT begin FROM earlier ORDER BY begin", elsewhere)
                self._say(f"{left} earlier results belong to no line of this requests file; they are in {elsewhere}.")
            self._copy("SELECT begin FROM places ORDER BY place", aside)
            aside.replace(self.path)
        self._index.close()

    def _copy(self, begins: str, path: Path) -> None:
        """Write the lines whose offsets a query gives to another file."""
        with self.path.open("rb") as file, path.open("wb") as other:
            for (begin,) in self._index.execute(begins):
                file.seek(begin)
                other.write(file.readline())
        shutil.copymode(self.path, path)


def numbered(path: Path) -> Path:
    """The first of results.1.jsonl, results.2.jsonl, ... that does not exist."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the keys on which the results in `folder` depend."""
    write_json(folder / SETTINGS, dict(settings))


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError where the earlier run in `folder` recorded another value of a key."""
    path = folder / SETTINGS
    try:
        earlier = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        return
    except ValueError:
        earlier = None
    if not isinstance(earlier, dict):
        raise UserError(f"resume=true: {path} can't be read as JSON. Restore it, or delete it to go on all the same.")
    for key, value in settings.items():
        if key in earlier and earlier[key] != value:
            raise UserError(
                f"resume=true: {key}={_shown(value)}, but the results in {folder} were made with "
                f"{key}={_shown(earlier[key])}. Use that, or another folder (hydra.run.dir=)."
            )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
