"""A session: a folder of measurements with a manifest of how they were made, to be kept and compared."""

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
# The device recorded for figures that are modelled rather than measured.
MODELLED = "modelled"
# Keys that only name files and folders of this run; manifests leave them out.
PLACES = ("output_dir", "graph_cache", "weights", "adapter", "requests", "image", "mistralrs", "folder", "measured")


def write_manifest(folder: Path, config: dict[str, Any], device: str, capability: str, accelerator: str | None) -> None:
    """Write manifest.json: hardware, versions, commit, command, configuration and date of a session.

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
    """The command line of a run, as Hydra recorded it in the run's folder; paths are cut to their last component."""
    words = [_without_folder(word) for word in overrides(folder) if not word.startswith("graph_cache=")]
    return " ".join(["python run.py", *words])


def overrides(folder: Path) -> list[str]:
    """The key=value arguments of a run, as Hydra recorded them in its folder; empty where it recorded none."""
    path = folder / ".hydra" / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf8")) if path.is_file() else []


def _without_folder(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).name}" if equals and value.startswith(("/", "~")) else word


def hardware(device: str, capability: str, accelerator: str | None) -> dict[str, Any]:
    """The hardware that a session ran on: processor, cores, memory, and the accelerator where there is one."""
    found: dict[str, Any] = {
        "device": device,
        "processor": processor_name(capability),
        "machine": platform.machine(),
        "cores": len(CORES),
        "memory_gib": round(physical_memory() / 2**30, 1),
    }
    return found | ({"accelerator": accelerator} if accelerator else {})


def commit(package: Path = PACKAGE) -> str:
    """The commit of the checkout that contains this package, followed by "+" if tracked files changed; "" if installed.

    An installed package may lie inside an unrelated repository, so the package counts as part of a checkout only if git
    tracks its files at the top of the repository.
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
    """Read the manifest of a session. Raises UserError where the folder holds none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no session: it has no readable {MANIFEST}. Give the folder of a run of task=bench."
        ) from error


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one line per row, with the columns in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file. Raises UserError where it can't be read."""
    try:
        with path.open(newline="", encoding="utf8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}. task=bench writes it.") from error
