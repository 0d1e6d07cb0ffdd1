"""The class that answers rows of a table: for `map_batches` of Ray Data, or for any Arrow tables. Imports no Ray."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_graph.core.config import Run
from mllama_graph.core.errors import PeerGone, RankFailed, UserError
from mllama_graph.core.report import strict_json
from mllama_graph.engine.results import Result
from mllama_graph.inputs.image_formats import suffixes
from mllama_graph.inputs.request import FIELDS
from mllama_graph.inputs.request_file import parse, refuse_odd
from mllama_graph.llm import LLM
from mllama_graph.scale.attempts import ALONE, START, STARTS, TOGETHER, Attempts

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

# Columns of a row that is a line of a requests file: its bytes or the reason why it has none, and its number.
LINE, FAULT, NUMBER = "__line__", "__fault__", "__number__"
# WebDataset's name of a sample; the name of any row, which is the same in every run.
KEY, ROW = "__key__", "row"
# The exit code of a process that lost a rank.
LOST = 70


class Answers:
    """Answers the rows of Arrow tables with an engine of its own, and returns a table with one result per row.

    `model` and `keys` are those of `LLM`. A row has the fields of a requests file as columns (`prompt`, `images`,
    `messages` as a list or as JSON, ...; `image` for a single picture), or is a sample of a WebDataset: pictures by
    their endings, `json` with fields, `txt` with the prompt. `prompt` is that of rows without one. `keep` names columns
    that the results get unchanged, beside `id`, which they always have. A row that can't be served has the reason in
    the column `error`.

    Several threads may call it at the same time: their rows share the engine's batch, so that the end of one table
    doesn't leave rows of the batch empty. If a rank is lost, the process ends, and Ray starts another one.

    `attempts` is a folder that all processes share. There the rows of tables with a column `row` are counted, so that
    a row that ends the process gets an error after a few attempts. Starts of engines are counted there, too: after
    `starts` in a row in which the process ended, RankFailed is raised. Without it, Ray tries both without end.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Run = "tiny",
        *,
        prompt: str | None = None,
        keep: Sequence[str] = (),
        attempts: str | os.PathLike[str] | None = None,
        starts: int = STARTS,
        **keys: Any,
    ):
        self._prompt, self._keep = prompt, tuple(keep)
        self._attempts = Attempts(None if attempts is None else Path(attempts))
        with self._attempts.counted([START], starts) as fine:
            if not fine:
                raise RankFailed(
                    f"the process of a replica has ended {starts} times while its engine started; it is not started "
                    "again. Run task=generate prompt=hi with the same keys to see why."
                )
            self._llm = LLM(model, quiet=True, **keys)

    def __call__(self, table: "pa.Table") -> "pa.Table":
        rows = table.to_pylist()
        names = [str(row[ROW]) for row in rows if row.get(ROW) is not None]
        if not names or len(names) < len(rows):
            results = self._served(rows)
        else:
            with self._attempts.counted(names, TOGETHER) as together:
                results = self._served(rows) if together else []
            if not together:
                log.warning("%d rows have ended their process %d times; each is served alone", len(rows), TOGETHER)
                results = [self._served_alone(row, name) for row, name in zip(rows, names, strict=True)]
        for row, result in zip(rows, results, strict=True):
            result.id = id_of(row)
        return table_of(rows, results, self._keep)

    def _served(self, rows: Sequence[Mapping[str, Any]]) -> list[Result]:
        try:
            return self._llm.generate([partial(request_of, row, self._prompt) for row in rows])
        except (PeerGone, RankFailed):
            # Ray restarts an actor whose process has ended, and serves the rows again.
            log.exception("a rank is lost; this process ends")
            logging.shutdown()
            os._exit(LOST)

    def _served_alone(self, row: Mapping[str, Any], name: str) -> Result:
        with self._attempts.counted([name], ALONE, alone=True) as fine:
            if fine:
                return self._served([row])[0]
        return Result.failed(None, f"the row ended the process that served it {ALONE} times; it is not served again.")

    def close(self) -> None:
        """End the engine and its ranks."""
        self._llm.close()


def request_of(row: Mapping[str, Any], prompt: str | None = None) -> dict[str, Any]:
    """The fields of a row's request. Raises UserError for a row that is none."""
    given = _given(row)
    if prompt is not None and not any(given.get(name) is not None for name in ("prompt", "messages", "input_ids")):
        given["prompt"] = prompt
    return given


def id_of(row: Mapping[str, Any]) -> str:
    """The id of a row's result: the request's own as text, else the number of its line, the sample's key, its name."""
    try:
        given = _given(row).get("id")
    except (UserError, RecursionError):
        given = None
    if given is None:
        given = next((row[name] for name in (NUMBER, KEY, ROW) if row.get(name) is not None), "")
    return given if isinstance(given, str) else strict_json(given)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    if LINE in row:
        line = row[NUMBER], row[FAULT] if row[LINE] is None else row[LINE]
        given = parse(line)
        refuse_odd(line, given)
        return dict(given)
    found = {name: value for name, value in row.items() if value is not None}
    given = _json(found["json"]) if isinstance(found.get("json"), bytes | str) else {}
    if "txt" in found:
        given["prompt"] = found["txt"].decode("utf8") if isinstance(found["txt"], bytes) else found["txt"]
    pictures = [found[name] for name in sorted(found) if f".{name.rpartition('.')[2]}".lower() in suffixes()]
    if pictures or "image" in found:
        given["images"] = [*pictures, *([found["image"]] if "image" in found else [])]
    given |= {name: found[name] for name in FIELDS & found.keys()}
    if isinstance(given.get("images"), list):
        # Datasets of Hugging Face store a picture as a struct of its bytes and its path.
        given["images"] = [
            image.get("bytes") or image.get("path") if isinstance(image, dict) and "bytes" in image else image
            for image in given["images"]
        ]
    for name in ("messages", "tools", "documents", "chat_template_kwargs", "response_format", "structured_outputs"):
        if isinstance(given.get(name), str):
            given[name] = _json(given[name], name)
    return given


def _json(text: bytes | str, name: str = "json") -> Any:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}.") from error
    if name == "json" and not isinstance(found, dict):
        raise UserError("json is not a JSON object.")
    return found


def schema(kept: Iterable["pa.Field"] = ()) -> "pa.Schema":
    """The columns of results, after those that are kept."""
    import pyarrow as pa

    numbers = ("prompt_tokens", "image_tokens", "cached_tokens")
    return pa.schema(
        [
            *kept,
            ("id", pa.string()),
            ("text", pa.string()),
            ("token_ids", pa.list_(pa.int64())),
            ("finish_reason", pa.string()),
            *((name, pa.int64()) for name in numbers),
            ("time_to_first_token_ms", pa.float64()),
            ("time_per_output_token_ms", pa.float64()),
            # As JSON: a list of objects, as in results.jsonl.
            ("logprobs", pa.string()),
            ("error", pa.string()),
        ]
    )


def table_of(rows: Sequence[Mapping[str, Any]], results: Sequence[Result], keep: Sequence[str] = ()) -> "pa.Table":
    """A table of results, with the kept columns of their rows."""
    import pyarrow as pa

    columns = schema()
    keep = [name for name in keep if name not in columns.names]
    kept = pa.Table.from_pylist([{name: row.get(name) for name in keep} for row in rows]).schema if keep else ()
    lines = []
    for row, result in zip(rows, results, strict=True):
        fields = dict(vars(result))
        fields["logprobs"] = None if result.logprobs is None else strict_json(result.logprobs)
        lines.append({name: row.get(name) for name in keep} | fields)
    return pa.Table.from_pylist(lines, schema=schema(kept))
