"""Reads files of requests: one JSON object per line, as a stream."""

import codecs
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from mllama_graph.core.errors import UserError, message_of
from mllama_graph.inputs.image_formats import signature
from mllama_graph.inputs.image_sources import list_images

# A line of a requests file: its number, counted from 1, and its bytes, or its object where a task has changed it, or
# the reason why it can't be read.
Line = tuple[int, bytes | dict[str, Any] | str]

# The bytes of a surrogate, escaped or not, in a pair or alone.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
STDIN = "-"
# The longest line in bytes; pictures may be written into it as data: URIs.
LINE_BYTES = 2**28
# The deepest nesting of a line. A conversation with pictures needs 6 levels.
DEPTH = 64
# max_images is derived from lines with at most this many images, so that one line can't enlarge the plan without bound.
MOST_IMAGES = 32
_ONE_LINE_EACH = "Put each request on a line of its own: jq -c '%s' FILE > requests.jsonl."
# UTF-32's little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_lines(path: Path, key: str = "requests") -> Iterator[Line]:
    """Read a file's lines one by one; blank lines are skipped. Files that begin with a byte order mark may be UTF-16.

    Raises UserError where the file can't be read or is empty, or where its first bytes say that it is no requests file.
    `key`: the key that names the file.
    """
    empty = True
    try:
        with path.expanduser().open("rb") as file:
            if kind := _other_kind(file.peek()):
                raise UserError(f"{key}={path} {kind}")
            for line in lines_of(file):
                empty = False
                yield line
    except OSError as error:
        raise UserError(f"{key}={path} can't be read: {error.strerror}.") from error
    if empty:
        raise UserError(f"{key}={path} is empty. Put one JSON object on each line.")


def _other_kind(head: bytes) -> str | None:
    """What a file with these first bytes is instead of a requests file, and the remedy; None where they don't tell.

    A single odd line is left to `parse`, which refuses that line alone.
    """
    if found := signature(head[:16]):
        return f"is a {found} picture. Give it as image=; this key takes a file of requests."
    head = head.removeprefix(codecs.BOM_UTF8)
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    first, more = (lines[0], lines[1:]) if lines else (b"", [])
    some_served = any(line.startswith(b"{") and line.endswith(b"}") for line in more)
    if first == b"[" or (re.match(rb"\[\s*\{", first) and not some_served):
        return f"is a JSON array. {_ONE_LINE_EACH % '.[]'}"
    if more and (first == b"{" or (re.fullmatch(rb"\{.*[,\[{]", first) and not some_served)):
        return f"holds JSON over several lines. {_ONE_LINE_EACH % '.'}"
    return None


def lines_of(file: io.BufferedReader) -> Iterator[Line]:
    """The lines of an open file that are not blank."""
    head = file.peek(4)[:4]
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    number = 0
    try:
        for number, line in enumerate(_bounded(file, encoding), start=1):
            if line is None:
                yield number, f"line {number} is longer than {LINE_BYTES >> 20} MiB. Give pictures as file paths."
            elif line.strip():
                yield number, line
    except UnicodeError as error:
        yield number + 1, f"line {number + 1} is not valid {encoding} text: {error}."


def _bounded(file: io.BufferedReader, encoding: str | None) -> Iterator[bytes | None]:
    """The lines in UTF-8; None for a line of more than LINE_BYTES."""
    # surrogatepass: a lone surrogate is refused with its line, where the decoder would end the file.
    stream: IO[Any] = (
        io.TextIOWrapper(file, encoding, "surrogatepass", newline="\n") if encoding else _without_mark(file)
    )
    while piece := stream.readline(LINE_BYTES):
        whole = len(piece) < LINE_BYTES or piece[-1:] in ("\n", b"\n")
        if whole:
            yield piece.encode("utf8", "surrogatepass") if isinstance(piece, str) else piece
            continue
        while piece and piece[-1:] not in ("\n", b"\n"):
            piece = stream.readline(LINE_BYTES)
        yield None


def _without_mark(file: io.BufferedReader) -> io.BufferedReader:
    if file.peek(3)[:3] == codecs.BOM_UTF8:
        file.read(3)
    return file


def parse(line: Line) -> dict[str, Any]:
    """The object of a line. Raises UserError where it has none; RecursionError for some of those nested too deeply."""
    number, given = line
    if isinstance(given, bytes):
        given = _json(number, given)
    if isinstance(given, str):
        raise UserError(given)
    return given


def parsed(line: Line) -> Line:
    """The line with its object, or with the reason why it has none."""
    try:
        return line[0], parse(line)
    except Exception as error:
        return line[0], message_of(error)


def _json(number: int, line: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number of JSON")

    def finite(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError(f"the number {text[:20]} is too large")
        return value

    try:
        given = json.loads(line.decode("utf8", "surrogatepass"), parse_constant=no_constant, parse_float=finite)
    except UnicodeError as error:
        raise UserError(f"line {number} is not valid UTF-8 text: {error}.") from error
    except ValueError as error:
        cause = "an integer has too many digits" if "int_max_str_digits" in str(error) else error
        raise UserError(f"line {number} is not valid JSON: {cause}.") from error
    if not isinstance(given, dict):
        raise UserError(f"line {number} is not a JSON object.")
    return given


def has_lone_surrogate(line: Line, value: Any) -> bool:
    """Whether a value of a line's object holds half of a surrogate pair, which a tokenizer and UTF-8 files refuse."""
    if isinstance(line[1], bytes) and not _SURROGATE.search(line[1]):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than DEPTH levels deep."""
    layer = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(layer)


def refuse_odd(line: Line, given: dict[str, Any]) -> None:
    """Raises UserError for an object that tokenizers and result files can't take."""
    if too_deep(given):
        raise UserError(f"line {line[0]} is nested more than {DEPTH} levels deep.")
    if has_lone_surrogate(line, given):
        raise UserError(f"line {line[0]} holds a lone surrogate, such as \\ud800 without its second half.")


def most_images(lines: Iterable[Line], base: Path) -> int:
    """The most images on one line, rounded up to a power of two and counted without opening any image.

    Lines with more than MOST_IMAGES don't count. Relative paths are looked up in `base` first.
    """

    def count(line: Line) -> int:
        given = line[1]
        # Most files hold text alone, which is not worth parsing twice. An escape may hide the word.
        if isinstance(given, bytes) and b"image" not in given and b"\\u" not in given:
            return 0
        given = parsed(line)[1]
        if not isinstance(given, dict):
            return 0
        images, messages = given.get("images"), given.get("messages")
        contents = (
            [message.get("content") for message in messages if isinstance(message, dict)]
            if isinstance(messages, list)
            else []
        )
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return _listed(images, base) + sum(isinstance(part, dict) and part.get("type") != "text" for part in parts)

    most = max((n for n in map(count, lines) if n <= MOST_IMAGES), default=0)
    return 1 << max(most - 1, 0).bit_length()


def _listed(images: Any, base: Path) -> int:
    """The number of images in a request's field `images`."""
    if isinstance(images, str):
        # A folder without pictures is refused when the request is served.
        with suppress(UserError):
            return len(list_images(images, base))
    return len(images) if isinstance(images, list) else 0


def is_stream(requests: str) -> bool:
    """Whether `requests` is stdin (-), a pipe or a device, which can be read only once, and only by one process."""
    if requests in (STDIN, "/dev/stdin") or requests.startswith(("/dev/fd/", "/proc/")):
        return True
    path = Path(requests).expanduser()
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except (OSError, ValueError):
        return False


def spool(requests: str, folder: Path) -> Path:
    """Copy stdin or a pipe to the file piped-requests.jsonl in `folder`, and return its path.

    Raises UserError where it can't be read or is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "piped-requests.jsonl"
    try:
        if requests == STDIN and sys.stdin is None:
            raise UserError("requests=- reads stdin, which is closed. Give a file.")
        source = sys.stdin.buffer if requests == STDIN else Path(requests).expanduser().open("rb")
        with path.open("wb") as file:
            shutil.copyfileobj(source, file)
    except OSError as error:
        raise UserError(f"requests={requests} can't be read: {error.strerror}.") from error
    if not path.stat().st_size:
        raise UserError(f"requests={requests} is empty. Put one JSON object on each line.")
    return path
