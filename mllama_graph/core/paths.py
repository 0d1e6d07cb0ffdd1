"""Paths of the package's folder and of the user's graph store."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Prefix of paths that are relative to the package's folder.
IN_PACKAGE = "package:"


def in_package(value: str | None) -> str | None:
    """Resolve a path that begins with package: to this package's folder; return any other path unchanged."""
    if value is None or not value.startswith(IN_PACKAGE):
        return value
    return str(PACKAGE / value.removeprefix(IN_PACKAGE))


def default_store() -> Path:
    """The graph store in the user's cache folder; XDG_CACHE_HOME is respected."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllama_graph"


def store_folder(graph_cache: str | None) -> Path:
    """The graph store that graph_cache= names, or the default one."""
    return Path(graph_cache).expanduser().absolute() if graph_cache else default_store()
