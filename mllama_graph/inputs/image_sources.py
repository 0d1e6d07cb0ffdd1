"""The sources of pictures: paths, file: and data: URIs, bytes, folders, and lists of these."""

import binascii
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_formats import is_base64, suffixes

# A picture as users give it: a path or a file: or data: URI as text, a Path, the bytes of a file, or a decoded picture.
Source = str | Path | bytes | Image.Image

# The most bytes of one encoded picture: enough for an uncompressed TIFF of 85 megapixels.
MAX_BYTES = 256 << 20

_HERE = Path(".")
# An item of a list: in quotes, or up to the next comma.
_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*?))\s*(?:,|$)""")
_URL_SAFE = str.maketrans("-_", "+/")


def shorten(source: object) -> str:
    """A source as error messages show it: in one line, shortened to about 80 characters, paths relative if possible."""
    if isinstance(source, Image.Image):
        return "a PIL image"
    if isinstance(source, bytes):
        return "given as bytes"
    text = str(source).removeprefix(f"{Path.cwd()}/")
    text = text if len(text) <= 80 else text[:30] + "..." + text[-47:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- lists


def list_images(given: object, base: Path = _HERE) -> list[str]:
    """The pictures that a value names: a file, a URI, a comma-separated list, or a folder (all its pictures, sorted).

    A list may be enclosed in brackets, and its items in quotes. Relative paths are looked up in `base` first.
    Raises UserError for a folder without pictures.
    """
    if given is None or given == "":
        return []
    if isinstance(given, (list, tuple)):
        return [str(part) for part in given]
    if not isinstance(given, (str, Path)):
        raise UserError(f"a {type(given).__name__} is no picture: give a file, a comma-separated list or a folder.")
    text = str(given)
    path = _locate(text, base)
    try:
        if path is not None and path.is_dir():
            return _pictures(path, text)
    except OSError as error:
        raise UserError(f"{shorten(text)} can't be read: {error.strerror}.") from error
    if path is not None or (_scheme(text) == "data" and not _is_base64_uri(text)):
        return [text]
    if re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL):
        text = text.strip()[1:-1]
    return _items(text)


def _pictures(folder: Path, text: str) -> list[str]:
    # Hidden files are not the user's pictures: on disks of other systems, macOS adds a file ._a.jpg to each a.jpg.
    known = suffixes()
    found = sorted(
        str(entry)
        for entry in folder.iterdir()
        if entry.suffix.lower() in known and not entry.name.startswith(".") and entry.is_file()
    )
    if not found:
        raise UserError(f"{shorten(text)} is a folder without pictures (.png, .jpg and all that Pillow decodes).")
    return found


def _items(text: str) -> list[str]:
    """The items of a comma-separated list. The comma inside a base64 data: URI does not separate items."""
    items: list[str] = []
    for found in _ITEM.finditer(text):
        item = found[1] or found[2] or found[3] or ""
        if items and _scheme(items[-1]) == "data" and "," not in items[-1]:
            items[-1] += f",{item}"
        elif item:
            items.append(item)
    return items


def request_images(given: Any, base: Path = _HERE) -> list[Source]:
    """The pictures in a request's field `images`: a list of sources, or one value that `list_images` accepts.

    Raises UserError for anything else.
    """
    if given is None or isinstance(given, (str, Path)):
        return [*list_images(given, base)]
    if isinstance(given, Source):
        return [given]
    if not isinstance(given, (list, tuple)):
        raise UserError(f"images must be a list of file paths or data: URIs, not {_type_of(given)}.")
    for number, source in enumerate(given, start=1):
        if not isinstance(source, Source | dict):
            raise UserError(
                f"images must be a list of file paths or data: URIs; picture {number} is of type {_type_of(source)}."
            )
    return [part_source(source, n) if isinstance(source, dict) else source for n, source in enumerate(given, start=1)]


def part_source(part: dict[str, Any], number: int) -> Source:
    """The source that an image part of a message gives. `number`: the picture's number in the request, for errors.

    Raises UserError if the part gives none.
    """
    value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None)
    value = value.get("url") if isinstance(value, dict) else value
    if value is None and isinstance(part.get("base64"), str):
        value = f"data:;base64,{part['base64']}"
    if not isinstance(value, Source | None):
        raise UserError(
            f"picture {number}: an image part needs its file path or data: URI in image_url.url, not {_type_of(value)}."
        )
    if value is None or value in ("", b""):
        raise UserError(f"picture {number}: an image part needs its file path or data: URI in image_url.url.")
    return value


def _type_of(value: object) -> str:
    """The name of a value's type; of an array, with what converts it."""
    converted = ": convert it with PIL.Image.fromarray" if hasattr(value, "__array__") else ""
    return type(value).__name__ + converted


# ---- one source


def read_source(source: Source, base: Path = _HERE) -> bytes | Image.Image:
    """The encoded bytes of a source; a decoded picture is returned as it is.

    Relative paths are looked up in `base` first. Raises UserError with the reason, or OSError if a file can't be read.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        data = source
    elif _scheme(source) == "data":
        data = _data(str(source).strip())
    else:
        data = _file(str(source), base)
    if len(data) > MAX_BYTES:
        raise UserError(f"it has more than {MAX_BYTES >> 20} MiB, the most that is read. Scale it down or compress it.")
    return data


def _scheme(source: str | Path) -> str:
    """The scheme of a URI in lower case; empty for other texts."""
    found = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", source[:40]) if isinstance(source, str) else None
    return found[1].lower() if found else ""


def _file(text: str, base: Path) -> bytes:
    path = _locate(text, base)
    if path is None:
        raise UserError(_missing(text, base))
    if path.is_dir():
        raise UserError("it is a folder; name a picture file in it.")
    if not path.is_file():
        raise UserError("it is neither a file nor a URI.")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _missing(text: str, base: Path) -> str:
    """The reason, for an error message, why a text names no file."""
    scheme = _scheme(text)
    if scheme in ("http", "https"):
        return "it is a web address, and nothing is fetched. Download it and give its path, or give a data: URI."
    if scheme not in ("", "file") and text.strip()[len(scheme) + 1 :].startswith("//"):
        return f"{scheme}: addresses are not read. Copy the file to this machine and give its path."
    if is_base64(text):
        return "it is base64 without a prefix. Write data:image/png;base64, before it."
    if scheme == "file":
        _file_uri(text)
    if not text.strip():
        return "it is an empty text; give a file path or a data: URI."
    if base.absolute() == Path.cwd() or scheme == "file" or text.startswith(("/", "~")):
        return "the file does not exist."
    return f"the file does not exist, neither in {shorten(base)} nor in {Path.cwd()}."


def _locate(text: str, base: Path) -> Path | None:
    """The existing file or folder that a path or file: URI names, in `base` or else in the working directory."""
    names = [text]
    if _scheme(text) == "file":
        # A URI should write # and ? as %23 and %3F. If it doesn't, a file whose name contains them is tried first.
        with suppress(UserError):
            names += [_file_uri(text, whole=True), _file_uri(text)]
    for name in filter(None, names):
        try:
            path = Path(name).expanduser()
        except (RuntimeError, ValueError):  # no such user
            path = Path(name)
        for candidate in (base / path, path):
            if _exists(candidate):
                return candidate
    return None


def _exists(path: Path) -> bool:
    """Whether a path exists; false for texts that can't be a path, such as a name that is too long."""
    try:
        path.stat()
    except PermissionError:
        return True  # opening it will give the reason
    except (OSError, ValueError):
        return False
    return True


def _file_uri(uri: str, whole: bool = False) -> str:
    """The path in a file: URI (RFC 8089). Query and fragment are cut off, unless `whole`.

    Raises UserError if the URI names another machine.
    """
    rest = uri.strip()[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise UserError(
                f"its host is {shorten(unquote(host))!r}, and only files of this machine are read. "
                "Write file:///folder/picture.png, or a path without file:."
            )
        rest = slash + path
    return os.fsdecode(unquote_to_bytes(rest if whole else re.split("[?#]", rest)[0]))


def _is_base64_uri(uri: str) -> bool:
    head = uri.partition(",")[0]
    return "base64" in [parameter.strip().lower() for parameter in head.split(";")[1:]]


def _data(uri: str) -> bytes:
    """The bytes of a data: URI (RFC 2397). Base64 may be in lines, URL-safe, percent-encoded or unpadded."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise UserError("a data: URI needs a comma before its data: data:image/png;base64,...")
    if not _is_base64_uri(uri):
        data = unquote_to_bytes(body)
        if is_base64(body):
            raise UserError("its data is base64, which the URI must say: data:image/png;base64,...")
        return data
    body = "".join((unquote(body) if "%" in body else body).split()).translate(_URL_SAFE).rstrip("=")
    try:
        return binascii.a2b_base64(body + "=" * (-len(body) % 4), strict_mode=True)
    except ValueError as error:  # binascii.Error is one
        reason = "its length can't be right, so it is cut off" if len(body) % 4 == 1 else str(error)
        raise UserError(f"its data is not valid base64: {reason}.") from error
