"""Reads files of requests as blocks of rows for Ray Data, each row with a name that is the same in every run."""

import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from mllama_graph.inputs.request_file import read_lines
from mllama_graph.scale.answers import FAULT, KEY, LINE, NUMBER, ROW


class Rows(Datasource):
    """The rows of files; one task reads one file, in blocks of `rows` rows.

    The column ROW has each row's name: "FILE:NUMBER", or "FILE:KEY" for a sample of a WebDataset, relative to `base`.
    """

    def __init__(self, paths: list[Path], base: Path, rows: int):
        super().__init__()
        self._paths, self._base, self._rows = paths, base, rows

    def estimate_inmemory_data_size(self) -> int:
        return sum(path.stat().st_size for path in self._paths)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [ReadTask(partial(blocks, path, self._base, self._rows), _metadata(path)) for path in self._paths]


def _metadata(path: Path) -> BlockMetadata:
    return BlockMetadata(
        num_rows=None, size_bytes=path.stat().st_size, input_files=[str(path)], exec_stats=None, task_exec_stats=None
    )


def blocks(path: Path, base: Path, rows: int) -> Iterator[pa.Table]:
    """The rows of a file as tables of at most `rows` rows."""
    name = path.relative_to(base).as_posix()
    if path.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=rows):
            names = [f"{name}:{number + n}" for n in range(batch.num_rows)]
            table = pa.Table.from_batches([batch])
            if ROW in table.column_names:
                table = table.drop_columns([ROW])
            yield table.append_column(ROW, pa.array(names))
            number += batch.num_rows
        return
    read = samples(path) if path.suffix == ".tar" else lines(path)
    for part in _parts(read, rows):
        columns = dict.fromkeys(column for row in part for column in row)
        yield pa.Table.from_pylist(
            [{ROW: f"{name}:{row.get(KEY, row.get(NUMBER))}"} | dict.fromkeys(columns) | row for row in part]
        )


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a requests file that are not blank."""
    for number, line in read_lines(path, "input"):
        known = isinstance(line, bytes)
        yield {NUMBER: number, LINE: line if known else None, FAULT: None if known else line}


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a WebDataset's tar: neighbouring files whose names are equal up to the first dot."""

    def key(member: tarfile.TarInfo) -> str:
        folder, slash, file = member.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    with tarfile.open(path) as archive:
        for name, members in groupby((member for member in archive if member.isfile()), key):
            files = {member.name[len(name) + 1 :]: archive.extractfile(member) for member in members}
            yield {KEY: name} | {ending: file.read() for ending, file in files.items() if file}


def _parts(rows: Iterable[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == most:
            yield part
            part = []
    if part:
        yield part
