"""A session of measurements: a folder that says where and how its figures came about, so that it can be kept and compared."""

import csv
import json
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from mllama_graph.core.config import Run, UserError
from mllama_graph.core.place import CORES
from mllama_graph.plan.resolve import physical_memory
from mllama_graph.core.report import versions, write_json

MANIFEST, BENCH = "manifest.json", "bench.csv"
# The device of figures that no device gave.
MODELLED = "modelled"
# Of a configuration, what only says where this run found and left its files.
PLACES = ("output_dir", "graph_cache", "weights", "requests", "image", "mistralrs", "folder", "measured")


def write_manifest(folder: Path, run: Run, device: str) -> None:
    """manifest.json: hardware, versions, commit, command, configuration and date of what the folder holds."""
    config = _without_places(asdict(run))
    write_json(
        folder / MANIFEST,
        {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hardware": hardware(device),
            "versions": versions(),
            "commit": commit(),
            "command": command(folder),
            "config": config,
        },
    )


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_places(value) if isinstance(value, dict) else value for name, value in config.items()
            if name not in PLACES}


def command(folder: Path) -> str:
    """What was typed, from what Hydra noted in the run's folder; files and checkpoints by their last name."""
    words = [_without_folder(word) for word in overrides(folder) if not word.startswith("graph_cache=")]
    return " ".join(["python run.py", *words])


def overrides(folder: Path) -> list[str]:
    """The key=value words of a run, as Hydra noted them in its folder; none where it did not."""
    path = folder / ".hydra" / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf8")) if path.is_file() else []


def _without_folder(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).name}" if equals and value.startswith(("/", "~")) else word


def hardware(device: str) -> dict[str, Any]:
    """What the figures are of: processor, cores, memory, and the accelerator where one computes."""
    from mllama_graph.graphs.aot import processor_name

    found: dict[str, Any] = {
        "device": device,
        "processor": processor_name(),
        "machine": platform.machine(),
        "cores": len(CORES),
        "memory_gib": round(physical_memory() / 2**30, 1),
    }
    if device == "cuda":
        import torch

        found["accelerator"] = torch.cuda.get_device_name()
    elif device == "npu":
        import torch

        found["accelerator"] = torch.npu.get_device_name()
    return found


def commit() -> str:
    """The commit of the checkout, "+" where files differ from it; "" outside one."""
    here = Path(__file__).parents[2]
    git = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)  # noqa: E731
    try:
        head = git("rev-parse", "--short", "HEAD")
        return (
            head.stdout.strip() + "+" * bool(git("status", "--porcelain", "-uno").stdout) if not head.returncode else ""
        )
    except OSError:
        return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError where the folder is no session."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no session: it has no readable {MANIFEST}. Give the folder of a run of task=bench."
        ) from error


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line a row, columns in the order of their first appearance."""
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
