"""A session of measurements: a folder that records where and how its figures came about, to be kept and compared."""

import csv
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mllama_graph.core.errors import UserError
from mllama_graph.core.machine import CORES, physical_memory, processor_name
from mllama_graph.core.paths import PACKAGE
from mllama_graph.core.report import versions, write_json

MANIFEST, BENCH = "manifest.json", "bench.csv"
# The device of figures that no device gave.
MODELLED = "modelled"
# Keys of a configuration that only say where this run found and left its files.
PLACES = ("output_dir", "graph_cache", "weights", "requests", "image", "mistralrs", "folder", "measured")


def write_manifest(folder: Path, config: dict[str, Any], device: str, capability: str, accelerator: str | None) -> None:
    """Write manifest.json: hardware, versions, commit, command, configuration and date of what the folder holds.

    `capability`: the vector width that torch uses on this CPU. `accelerator`: the device's name, None for a CPU.
    """
    write_json(
        folder / MANIFEST,
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(device, capability, accelerator),
            "versions": versions(),
            "commit": commit(),
            "command": command(folder),
            "config": _without_places(config),
        },
    )


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in PLACES
    }


def command(folder: Path) -> str:
    """What was typed, as Hydra recorded it in the run's folder; files and checkpoints by their last name."""
    words = [_without_folder(word) for word in overrides(folder) if not word.startswith("graph_cache=")]
    return " ".join(["python run.py", *words])


def overrides(folder: Path) -> list[str]:
    """The key=value words of a run, as Hydra recorded them in its folder; none where it did not."""
    path = folder / ".hydra" / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf8")) if path.is_file() else []


def _without_folder(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).name}" if equals and value.startswith(("/", "~")) else word


def hardware(device: str, capability: str, accelerator: str | None) -> dict[str, Any]:
    """What figures were measured on: processor, cores, memory, and the accelerator where there is one."""
    found: dict[str, Any] = {
        "device": device,
        "processor": processor_name(capability),
        "machine": platform.machine(),
        "cores": len(CORES),
        "memory_gib": round(physical_memory() / 2**30, 1),
    }
    return found | ({"accelerator": accelerator} if accelerator else {})


def commit(package: Path = PACKAGE) -> str:
    """The commit of the checkout that this package is part of, "+" where its files differ; "" where it is installed.

    An installed package may lie inside somebody else's repository, whose commit says nothing about it: the package counts
    as part of a checkout only where git tracks its files, at the top of the repository.
    """

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True)

    try:
        at_root = git("rev-parse", "--show-prefix").stdout.strip() == f"{package.name}/"
        if not at_root or git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return ""
        head = git("rev-parse", "--short", "HEAD")
        return (
            head.stdout.strip() + "+" * bool(git("status", "--porcelain", "-uno").stdout) if not head.returncode else ""
        )
    except OSError:
        return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a session. Raises UserError where the folder is no session."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no session: it has no readable {MANIFEST}. Give the folder of a run of task=bench."
        ) from error


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one line per row, columns in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError where there is none."""
    try:
        with path.open(newline="", encoding="utf8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}. task=bench writes it.") from error
