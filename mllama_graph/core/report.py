"""What a person sees and what is left on disk: progress, the table of figures, result.json, a sweep's summary."""

import json
import logging
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torch_npu", "transformers", "tokenizers", "safetensors", "pillow", "hydra-core", "numpy")


class Progress:
    """Bars for weights and graphs, and lines. On stderr, so that stdout is the answer."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._bars: dict[str, tqdm] = {}
        self._begun = 0.0

    def say(self, line: str) -> None:
        """One line for the reader, and for run.log."""
        log.info(line.strip())
        tqdm.write(line, file=self._stream)

    def weights(self, done: int, total: int) -> None:
        """Bytes of weights in place, of how many."""
        self._begun = self._begun or time.perf_counter()
        self._show("weights", done, total, unit="B", unit_scale=True, unit_divisor=1000)
        if done >= total:
            self.say(f"weights: {total / 1e9:.3f} GB in {time.perf_counter() - self._begun:.1f} s")

    def graphs(self, done: int, total: int) -> None:
        """Graphs compiled, of how many."""
        self._show("graphs", done, total, unit="graph")

    def turns(self, done: int, total: int, what: str) -> None:
        """Measurements taken, of how many, with the time left; `what` is being measured."""
        self._show("measured", done, total, what, unit="turn", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}")

    def _show(self, name: str, done: int, total: int, what: str = "", **look: Any) -> None:
        bar = self._bars.get(name)
        if bar is None:
            bar = self._bars[name] = tqdm(total=total, desc=name, leave=False, file=self._stream,
                                          disable=not self._stream.isatty(), **look)
        if what:
            bar.set_postfix_str(what, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(name).close()


def versions() -> dict[str, Optional[str]]:
    """Python's version and those of the packages that matter; None for one that is absent."""

    def version(name: str) -> Optional[str]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    aside.replace(path)


def write_result(folder: Path, config: dict[str, Any], status: str = "ok", error: Optional[str] = None,
                 metrics: Optional[dict[str, Any]] = None, graphs: Optional[list[dict[str, Any]]] = None,
                 text: Optional[str] = None, token_ids: Optional[list[int]] = None) -> None:
    """The run's result.json."""
    write_json(folder / "result.json", {
        "status": status, "error": error, "config": config, "versions": versions(), "metrics": metrics or {},
        "graphs": graphs or [], "text": text, "token_ids": token_ids})


def write_failure(folder: Path, config: dict[str, Any], message: str) -> None:
    """result.json of a run that failed; what its task has written there before is kept."""
    path = folder / "result.json"
    if not path.is_file():
        write_result(folder, config, status="error", error=message)
        return
    write_json(path, json.loads(path.read_text(encoding="utf8")) | {"status": "error", "error": message})


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table with a head, every column as wide as it must be."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows])


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in [head, ("---",) * len(head), *rows]]
