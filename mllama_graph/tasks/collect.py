"""task=collect: packs what an earlier run left into one archive, so that others can find out what failed.

The archive holds versions, logs, records, profiles and graphs. It never holds weights, prompts, pictures or answers:
only the files listed here are taken, and quotations of prompts and answers are removed from logs and records.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllama_graph.core import cann
from mllama_graph.core.errors import UserError
from mllama_graph.core.paths import store_folder
from mllama_graph.core.report import columns, strict_json, versions, write_result
from mllama_graph.graphs.store import PACKAGE, TORCHAIR, GraphStore
from mllama_graph.measure.private import LEFT_OUT, Private, texts_of_lines
from mllama_graph.measure.session import commit, overrides
from mllama_graph.plan.resolve import ResolvedTask
from mllama_graph.tasks.options import CollectOptions

ARCHIVE, TOP = "collected.tar.gz", "collected"
RESULT, LOG, HYDRA = "result.json", "run.log", ".hydra"
# Where runs leave their folders by default (conf/config.yaml): OUTPUTS/DATE/TIME, and a folder per job of a sweep.
OUTPUTS, DEPTHS = Path("outputs"), ("*/*", "*/*/*")
# Keys of a run whose values are private, and keys of result.json with prompts or answers.
KEYS = ("prompt", "image", "system", "requests")
ANSWERS = ("text", "token_ids")
# Files of a run: text, which is scrubbed, and the output of profilers, which holds none of users.
TEXTS = (LOG, "ranks/*.log", "manifest.json", "summary.md", "*.csv", "rank*/*.csv", "rank*/*.json")
PROFILES = ("rank*/trace.json.gz", "rank*/**/ASCEND_PROFILER_OUTPUT/*")
# Files that GE writes where DUMP_GRAPH_PATH says.
DUMPS = ("ge_onnx*.pbtxt", "ge_proto*.txt", "ge_readable*.txt")
# CANN's logs of a process, under ASCEND_PROCESS_LOG_PATH or ~/ascend/log.
PLOGS = ("**/plog-*.log", "**/device-*.log")
# Environment variables that change what an NPU does.
PREFIXES = (
    "ASCEND",
    "HCCL",
    "LCCL",
    "ATB",
    "DUMP_",
    "PYTORCH_NPU",
    "TASK_QUEUE",
    "INF_NAN",
    "RANK",
    "WORLD_SIZE",
    "TORCH",
)
# Larger files are named in the list of contents, and left out.
LARGEST = 64 * 2**20


@dataclass
class Contents:
    """What an archive holds, (name, bytes), and what was left out, (name, why)."""

    taken: list[tuple[str, int]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


class Writer:
    """Adds files to an archive, and notes them."""

    def __init__(self, archive: tarfile.TarFile, private: Private):
        self._archive, self._private, self.contents = archive, private, Contents()

    def text(self, name: str, text: str) -> None:
        """Add a file with this text."""
        data = text.encode("utf8", "replace")
        entry = tarfile.TarInfo(f"{TOP}/{name}")
        entry.size, entry.mtime = len(data), int(time.time())
        self._archive.addfile(entry, io.BytesIO(data))
        self.contents.taken.append((name, len(data)))

    def json(self, name: str, value: Any) -> None:
        """Add a value as a file of JSON, scrubbed."""
        self.text(name, strict_json(self._private.scrubbed(value), indent=2) + "\n")

    def file(self, name: str, path: Path, scrub: bool = False) -> None:
        """Add a file unless it is too large or can't be read. `scrub`: remove quotations of private texts."""
        try:
            size = path.stat().st_size
            if size > LARGEST:
                self.contents.left.append((name, f"{size / 2**20:,.0f} MiB"))
            elif scrub:
                self.text(name, self._private.scrub(path.read_text(encoding="utf8", errors="replace")))
            else:
                self._archive.add(path, f"{TOP}/{name}", recursive=False)
                self.contents.taken.append((name, size))
        except OSError as error:
            self.contents.left.append((name, str(error.strerror)))

    def files(self, folder: Path, patterns: tuple[str, ...], name: str, since: float = 0, scrub: bool = False) -> None:
        """Add the files of a folder that match, and that changed after the time `since`, under `name`."""
        found = dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
        for path in found:
            if path.stat().st_mtime >= since:
                self.file(f"{name}/{path.relative_to(folder).as_posix()}", path, scrub)


def main(run: ResolvedTask) -> None:
    """Write the archive to this run's folder, and print what it holds.

    Raises UserError where there is no earlier run.
    """
    assert isinstance(run.options, CollectOptions)
    folder = Path(run.options.folder).expanduser() if run.options.folder else newest(run.output_dir)
    if not (folder / LOG).is_file() and not (folder / RESULT).is_file():
        raise UserError(f"task.folder={folder} is no run's folder: it has neither {RESULT} nor {LOG}.")
    result = _read(folder / RESULT)
    config = result.get("config", {})
    path = run.output_dir / ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        writer = Writer(archive, Private(private_texts(folder, result)))
        begun = _begun(folder)
        writer.json("versions.json", {"packages": versions(), "commit": commit()} | cann.components())
        writer.json("environment.json", environment(os.environ))
        writer.text("npu-smi.txt", npu_smi())
        writer.json("command.json", [_without_private(word) for word in overrides(folder)])
        if result:
            shown = result | {"config": {k: LEFT_OUT if v and k in KEYS else v for k, v in config.items()}}
            writer.json(f"run/{RESULT}", shown | {key: LEFT_OUT for key in ANSWERS if result.get(key)})
        writer.files(folder, TEXTS, "run", scrub=True)
        writer.files(folder, PROFILES, "run")
        add_graphs(writer, run, config.get("graph_cache"), result, begun)
        logs = os.environ.get("ASCEND_PROCESS_LOG_PATH") or Path.home() / "ascend" / "log"
        writer.files(Path(logs), PLOGS, "cann-logs", since=begun, scrub=True)
        if os.environ.get("DUMP_GRAPH_PATH"):
            writer.files(Path(os.environ["DUMP_GRAPH_PATH"]), DUMPS, "ge-dumps")
        found = writer.contents
        writer.text("contents.txt", listing(found) + "\n")
    print(listing(found))
    print(f"\n{path}: {path.stat().st_size / 1e6:.2f} MB, from {folder}. Look into it before you give it to others.")
    write_result(
        run.output_dir,
        run.asked,
        metrics={"folder": str(folder), "files": len(found.taken), "left_out": len(found.left), "archive": ARCHIVE},
    )


def newest(own: Path) -> Path:
    """The folder of the newest earlier run under outputs/, other than those of task=collect. Raises UserError."""
    found = {
        notes.stat().st_mtime: notes.parents[1]
        for depth in DEPTHS
        for notes in OUTPUTS.glob(f"{depth}/{HYDRA}/overrides.yaml")
        if notes.parents[1].resolve() != own.resolve() and "task=collect" not in overrides(notes.parents[1])
    }
    if not found:
        raise UserError(f"there is no earlier run under {OUTPUTS.resolve()}. Give its folder: task.folder=FOLDER.")
    return found[max(found)]


def private_texts(folder: Path, result: Mapping[str, Any]) -> Iterator[str]:
    """The prompts and answers of a run: those of its configuration, its requests file and its results."""
    config = result.get("config", {})
    yield from (str(config[key]) for key in ("prompt", "system") if config.get(key))
    model = config.get("model") or {}
    yield from (str(value) for value in (model.get("prompt"), result.get("text")) if value)
    if config.get("requests"):
        yield from texts_of_lines(Path(config["requests"]).expanduser())
    for path in sorted(folder.glob("results*.jsonl")):
        yield from texts_of_lines(path)


def add_graphs(
    writer: Writer, run: ResolvedTask, graph_cache: str | None, result: Mapping[str, Any], begun: float
) -> None:
    """Add the stored graphs that the run used: their keys, and torchair's files, which hold graphs without weights."""
    store = GraphStore(run.store_folder if run.asked["graph_cache"] else store_folder(graph_cache))
    ended = begun if result.get("status") == "ok" else time.time()
    named = {str(graph.get("key")) for graph in result.get("graphs", []) if isinstance(graph, dict)}
    # A run that failed may not have noted its graphs: those are taken that were used since it began.
    for entry in store.entries():
        if entry.key not in named and not begun <= entry.used <= ended:
            continue
        folder, name = store.folder / entry.key, f"graphs/{entry.key}"
        for file in ("key.json", "checksums.json"):
            writer.file(f"{name}/{file}", folder / file)
        for path in sorted((folder / TORCHAIR).rglob("*")):
            if path.is_file() and path.suffix == ".om":
                writer.contents.left.append((f"{name}/{path.name}", "GE's compiled model"))
            elif path.is_file():
                writer.file(f"{name}/{path.relative_to(folder).as_posix()}", path)
        if (folder / PACKAGE).is_file():
            writer.contents.left.append((f"{name}/{PACKAGE}", "Inductor's package"))


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that change what an NPU does."""
    return {name: value for name, value in sorted(variables.items()) if name.startswith(PREFIXES)}


def npu_smi() -> str:
    """What `npu-smi info` prints: driver, chips, their memory and state."""
    if shutil.which("npu-smi") is None:
        return "npu-smi is not installed on this machine\n"
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, errors="replace", timeout=30)
        return done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"npu-smi: {error}\n"


def listing(contents: Contents) -> str:
    """A table of what an archive holds, and of what was left out."""
    rows = [(name, f"{size:,}", "") for name, size in contents.taken]
    return columns(("file", "bytes", "left out"), rows + [(name, "-", why) for name, why in contents.left])


def _without_private(word: str) -> str:
    key, equals, _ = word.partition("=")
    return f"{key}={LEFT_OUT}" if equals and key.lstrip("+") in KEYS else word


def _begun(folder: Path) -> float:
    """When a run began: Hydra writes its notes first."""
    with contextlib.suppress(OSError):
        return (folder / HYDRA / "overrides.yaml").stat().st_mtime
    return 0.0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
