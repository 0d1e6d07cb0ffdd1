"""The graph store: compiled graphs on disk, one entry per graph, written atomically.

    <folder>/<key>/{key.json, checksums.json, graph.pt2 or torchair/...}
    <folder>/inductor/  Inductor's own cache      <folder>/native/  C++ operators, built on this machine

The key is a hash of every field that can change a graph; key.json holds the fields, so that a user can see why
two entries differ. An entry is written to a temporary folder and renamed, so that a kill leaves no partial entry.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# The payload of an entry: Inductor's package, or the folder in which torchair keeps one graph.
PACKAGE, TORCHAIR = "graph.pt2", "torchair"
PAYLOADS = (PACKAGE, TORCHAIR)
# Folders in the store that are not entries.
CACHES = ("inductor", "native")
# Prefix of temporary folders; those that a killed process left are removed after this many seconds.
ASIDE, ASIDE_SECONDS = ".aside-", 3600

# What flock says on a file system without locks, such as NFS without its lock service.
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


def key_of(fields: dict[str, Any]) -> str:
    """The key of an entry, which is its name."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Entry:
    """One stored graph. used: time of its last use. fault: what is wrong with it, or None."""

    key: str
    fields: dict[str, Any]
    bytes: int
    used: float
    fault: str | None


class GraphStore:
    """Compiled graphs in a folder, shared by processes.

    If the folder can't be written, new graphs go to a temporary one that lasts as long as the process, and `warning`
    says so.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.warning: str | None = None
        self._written = folder
        self._temporary: tempfile.TemporaryDirectory | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0" * 4096)
        except OSError as error:
            self._temporary = tempfile.TemporaryDirectory(prefix="mllama_graph-")
            self._written = Path(self._temporary.name)
            self.warning = (
                f"graph_cache={folder} can't be written ({error.strerror}); graphs last for this run only. "
                "Give another graph_cache=."
            )

    @property
    def written(self) -> Path:
        """The folder for new entries."""
        return self._written

    @property
    def libraries(self) -> Path:
        """The folder of native libraries: graph_cache= if it holds some, even if it can't be written."""
        return self.folder if (self.folder / "native").is_dir() else self._written

    def has(self, key: str) -> bool:
        """Whether there is an entry with this key; its contents are not checked."""
        return any(payload_of(folder / key) for folder in {self.folder, self._written})

    def find(self, key: str) -> tuple[Path | None, str | None]:
        """Look up an entry: (path of its payload, None) if it is intact, else (None, its fault or None)."""
        fault = None
        for folder in (self._written, self.folder):
            entry = folder / key
            if entry.exists():
                fault = fault_of(entry)
                if fault is None:
                    with contextlib.suppress(OSError):
                        os.utime(entry)
                    return payload_of(entry), None
        return None, fault

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Lock an entry, so that one process at a time builds it; several do on a file system without locks."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(FileLock(self._written / f".{key}.lock"))
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
            yield

    def add(self, key: str, fields: dict[str, Any], payload: Path) -> Path:
        """Move a package, or torchair's folder, into the store; replaces an entry with the same key."""
        name, entry = TORCHAIR if payload.is_dir() else PACKAGE, self._written / key
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self._written))
        try:
            shutil.move(payload, aside / name)
            (aside / "key.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
            sums = {
                file.relative_to(aside).as_posix(): _sha256(file) for file in sorted(aside.rglob("*")) if file.is_file()
            }
            (aside / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
            if entry.exists():
                self._discard(entry)
            aside.rename(entry)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            # Without locks, another process may have written the entry since.
            if fault_of(entry) is not None:
                raise
        return entry / name

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A temporary folder to build in, on the store's own disk."""
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=self._written, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def entries(self, verify: bool = False) -> list[Entry]:
        """All entries, the last used first; `verify` checks the checksums of each."""
        found = []
        for path in self.folder.glob("*/"):
            if path.name.startswith(".") or path.name in CACHES:
                continue
            try:
                fields = json.loads((path / "key.json").read_text())
            except (OSError, ValueError):
                fields = {}
            fault = fault_of(path) if verify else None if fields else "key.json can't be read"
            found.append(Entry(path.name, fields, bytes_of(path), path.stat().st_mtime, fault))
        return sorted(found, key=lambda entry: -entry.used)

    def remove(self, key: str) -> None:
        """Remove an entry."""
        self._discard(self.folder / key)

    def _discard(self, entry: Path) -> None:
        """Remove an entry; renamed first, so that a kill leaves no partial entry under its name.

        Errors of the removal are left to `sweep`: NFS keeps files that are open under other names.
        """
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=entry.parent))
        # Without locks, another process may have removed it since.
        with contextlib.suppress(FileNotFoundError):
            entry.rename(aside / "entry")
        shutil.rmtree(aside, ignore_errors=True)

    def sweep(self) -> None:
        """Remove temporary folders of killed processes, and locks without an entry.

        Their age is told by the clock that set their times, which on a shared file system is not this host's.
        """
        for path in self.folder.glob(".*.lock"):
            if not (self.folder / path.name[1:].removesuffix(".lock")).exists():
                with contextlib.suppress(OSError, Timeout), FileLock(path, timeout=0):
                    path.unlink()
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(prefix=ASIDE, dir=self.folder) as probe:
            now = os.stat(probe.name).st_mtime
            for path in self.folder.glob(f"{ASIDE}*/"):
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > ASIDE_SECONDS:
                        shutil.rmtree(path, ignore_errors=True)


def payload_of(entry: Path) -> Path | None:
    """Path of an entry's payload, which is not checked; None if there is none."""
    return next((entry / name for name in PAYLOADS if (entry / name).exists()), None)


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def fault_of(entry: Path) -> str | None:
    """What is wrong with an entry on disk, or None if every file is there with its checksum."""
    try:
        sums = json.loads((entry / "checksums.json").read_text())
        names = sums.items()
    except (OSError, ValueError, AttributeError):
        return "checksums.json can't be read"
    if not any(name.split("/")[0] in PAYLOADS for name in sums):
        return f"checksums.json lists neither {PACKAGE} nor {TORCHAIR}"
    for name, expected in names:
        try:
            if _sha256(entry / name) != expected:
                return f"{name} is altered or truncated"
        except OSError:
            return f"{name} can't be read"
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
