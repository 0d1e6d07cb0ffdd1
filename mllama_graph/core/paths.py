"""Folders: the package's own, and the user's graph store."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A path that begins so lies in the package's folder.
IN_PACKAGE = "package:"


def in_package(value: str | None) -> str | None:
    """A path as it is; one that begins with package: as a path into this package's folder."""
    if value is None or not value.startswith(IN_PACKAGE):
        return value
    return str(PACKAGE / value.removeprefix(IN_PACKAGE))


def default_store() -> Path:
    """The graph store in the user's cache folder; XDG_CACHE_HOME is respected."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllama_graph"


def store_folder(graph_cache: str | None) -> Path:
    """The graph store of graph_cache=, or the default one."""
    return Path(graph_cache).expanduser().absolute() if graph_cache else default_store()
