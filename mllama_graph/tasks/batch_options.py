"""The keys of task=batch. No torch, and nothing of the extra `ray`."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from mllama_graph.core.config import Run, TaskOptions, at_least, one_of
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.inputs.request_file import most_images, read_lines

# The endings of files that can be read: requests files, Parquet, WebDataset.
LINES = (".jsonl", ".json", ".ndjson")
ENDINGS = (*LINES, ".parquet", ".tar")
FORMATS = ("parquet", "json")


@dataclass
class BatchOptions(TaskOptions):
    """task=batch: answer the rows of files on the replicas of a Ray cluster. conf/task/batch.yaml explains each key."""

    ROOM: ClassVar[str] = "scale"

    name: str = "batch"
    input: str | None = None
    output: str | None = None
    replicas: int = 1
    format: str = "parquet"
    rows: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    address: str | None = None

    def check(self) -> None:
        for key in ("input", "output"):
            if not getattr(self, key):
                raise UserError(f"task=batch needs {key}=. Give the {'rows to read' if key == 'input' else 'folder'}.")
        at_least("replicas", self.replicas, 1)
        one_of("task.format", self.format, FORMATS)
        if self.rows is not None:
            at_least("task.rows", self.rows, 1)
        for name, amount in self.resources.items():
            at_least(f"task.resources.{name}", amount, 0)
        if missing := [name for name in ("ray", "pyarrow", "pandas") if find_spec(name) is None]:
            raise UserError(f"task=batch needs {', '.join(missing)}. Install with: pip install 'mllama_graph[ray]'")

    def needs(self, device: Device) -> str:
        if device.simulated:
            raise UserError(
                f"task=batch starts engines in processes of Ray; device={device.name} needs one of its own."
            )
        return self.MODEL

    def prepared(self, run: Run) -> Run:
        if any(value is not None for value in (run.image, run.system, run.requests)):
            raise UserError("task=batch reads its rows from input=. Leave image=, system= and requests= out.")
        files_of(str(self.input))
        return run

    def images_asked(self, run: Run) -> int:
        base, paths = files_of(str(self.input))
        return max((most_images(read_lines(path, "input"), base) for path in paths if path.suffix in LINES), default=0)


def files_of(given: str) -> tuple[Path, list[Path]]:
    """The folder of input=, and the files: the given one, or all readable ones of a folder, sorted by name.

    Raises UserError where there are none.
    """
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and file.name[0] not in "._")
        if not paths:
            raise UserError(f"input={given} holds no file that ends with {', '.join(ENDINGS)}.")
        return path, paths
    if not path.is_file():
        raise UserError(f"input={given} is neither a file nor a folder.")
    if path.suffix not in ENDINGS:
        raise UserError(f"input={given} must end with one of {', '.join(ENDINGS)}, or be a folder of such files.")
    return path.parent, [path]
