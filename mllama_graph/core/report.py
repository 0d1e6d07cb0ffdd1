"""Output for the user: progress bars, tables and result.json."""

import json
import logging
import math
import os
import platform
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from tabulate import tabulate
from tqdm import tqdm

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torch_npu", "transformers", "tokenizers", "safetensors", "pillow", "hydra-core", "numpy")


class Progress:
    """Progress bars and lines for the user, on stderr: stdout is reserved for the answer."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._bars: dict[str, tqdm[Any]] = {}
        self._begun = 0.0

    def say(self, line: str, private: bool = False) -> None:
        """Print one line for the user, and log it to run.log unless it quotes what the user wrote (`private`)."""
        if not private:
            log.info(line.strip())
        tqdm.write(line, file=self._stream)

    def weights(self, done: int, total: int) -> None:
        """Show how many bytes of the weights are loaded."""
        self._begun = self._begun or time.perf_counter()
        self._show("weights", done, total, unit="B", unit_scale=True, unit_divisor=1000)
        if done >= total:
            self.say(f"weights: {total / 1e9:.3f} GB in {time.perf_counter() - self._begun:.1f} s")

    def graphs(self, done: int, total: int) -> None:
        """Show how many graphs are compiled."""
        self._show("graphs", done, total, unit="graph")

    def turns(self, done: int, total: int, what: str) -> None:
        """Show how many measurements are done, the remaining time, and `what` is being measured."""
        self._show(
            "measured",
            done,
            total,
            what,
            unit="turn",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )

    def _show(self, name: str, done: int, total: int, what: str = "", **look: Any) -> None:
        bar = self._bars.get(name)
        if bar is None:
            bar = self._bars[name] = tqdm(
                total=total, desc=name, leave=False, file=self._stream, disable=not self._stream.isatty(), **look
            )
        if what:
            bar.set_postfix_str(what, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(name).close()


@contextmanager
def said_late(line: Callable[[], str], seconds: float) -> Iterator[None]:
    """Print `line()` on stderr where the context lasts longer than `seconds`."""
    timer = threading.Timer(seconds, lambda: print(line(), file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the main packages; None for a package that is not installed."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON by its standard, which has no NaN and no infinity: a number that is not finite becomes null.

    Unicode's line ends are escaped, since many readers of JSON lines split at them too.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def output_closed() -> bool:
    """Whether the reader of stdout or stderr has ended, so that a BrokenPipeError is not another pipe's."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def silence() -> None:
    """Send further output nowhere: at its exit, Python would report that it can't write what is still buffered."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(strict_json(value, indent=2) + "\n", encoding="utf8")
    aside.replace(path)


def write_result(
    folder: Path,
    config: dict[str, Any],
    status: str = "ok",
    error: str | None = None,
    metrics: dict[str, Any] | None = None,
    graphs: list[dict[str, Any]] | None = None,
    text: str | None = None,
    token_ids: list[int] | None = None,
) -> None:
    """Write the run's result.json."""
    write_json(
        folder / "result.json",
        {
            "status": status,
            "error": error,
            "config": _without_keys(config),
            "versions": versions(),
            "metrics": metrics or {},
            "graphs": graphs or [],
            "text": text,
            "token_ids": token_ids,
        },
    )


def _without_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the API key of task=serve."""
    return {
        name: "..." if name == "api_key" and value else _without_keys(value) if isinstance(value, dict) else value
        for name, value in config.items()
    }


def write_failure(folder: Path, config: dict[str, Any], message: str) -> None:
    """Mark result.json as failed, and keep what the task has already written there."""
    path = folder / "result.json"
    if not path.is_file():
        write_result(folder, config, status="error", error=message)
        return
    write_json(path, json.loads(path.read_text(encoding="utf8")) | {"status": "error", "error": message})


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Format names and values as two aligned, indented columns."""
    lines = tabulate(rows, tablefmt="plain", disable_numparse=True).splitlines()
    return "\n".join(f"  {line}".rstrip() for line in lines)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with a header row, each column as wide as its widest cell."""
    return tabulate(rows, head, tablefmt="plain", disable_numparse=True)


def growing_columns(head: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """The lines of a table whose rows are still being computed: the header at once, each row as soon as it is there."""
    for row in chain([head], rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, without padding in the cells."""
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in [head, ("---",) * len(head), *rows]
    ]
