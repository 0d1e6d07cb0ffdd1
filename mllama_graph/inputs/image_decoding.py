"""Decodes pictures behind one boundary: whatever goes wrong with one becomes a UserError that names it."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from PIL import Image, ImageFile, TiffTags, UnidentifiedImageError

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_colours import to_rgb
from mllama_graph.inputs.image_formats import formats, unknown
from mllama_graph.inputs.image_sources import Source, shorten

# The most pixels of one picture, checked before they are decoded: 512 MB of memory. The largest that phones and
# cameras commonly write have 108 million.
MAX_PIXELS = 128_000_000
_TOO_MANY = f"more than the {MAX_PIXELS // 10**6} million pixels that are decoded. Scale it down."

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
# Bytes of the whole-number types BYTE, SHORT (the standard's) and LONG.
_WHOLE = {1: 1, 3: 2, 4: 4}
# How to turn a picture upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def naming(number: int, source: Source) -> Iterator[None]:
    """Turns every failure inside into UserError("picture N (source) can't be read: why") and silences warnings."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged metadata and large pictures; what matters of that is an error here.
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise UserError(f"picture {number} ({shorten(source)}) can't be read: {_reason(error)}") from error


def decode(given: bytes | Image.Image) -> Image.Image:
    """Decode a picture to RGB: upright by its EXIF orientation, the first frame of an animation.

    Of a PIL image, the current frame. Raises UserError with the reason, or what Pillow raises.
    """
    if isinstance(given, Image.Image):
        return _decoded(given)
    exif = b""
    if given.startswith(_JPEG):
        given, exif = _take_exif(given)
    if given.startswith(_PNG):
        given = _without_texts(given)
    if given[4:11] == b"ftypavi":
        # The item holds metadata that Pillow would rewrite, and fail on odd tags. What turns an AVIF is its irot box.
        given = re.sub(rb"(infe.{8})Exif", rb"\1free", given, flags=re.DOTALL)
    try:
        opened = Image.open(io.BytesIO(given), formats=formats())
    except UnidentifiedImageError as error:
        raise UserError(f"{unknown(given)}.") from error
    with opened as image:
        if image.format == "TIFF":
            _drop_metadata(image)
        if image.format == "PNG":
            _scale_key(image)
            if given.find(b"cICP", 0, given.find(b"IDAT")) > 0:
                # cICP, which Pillow does not read, takes the place of gAMA.
                image.info.pop("gamma", None)
        return _decoded(image, exif)


def _decoded(image: Image.Image, exif: bytes = b"") -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"it has {image.width} x {image.height} pixels, {_TOO_MANY}")
    image.load()
    orientation = _orientation(exif or image.info.get("exif"))
    image = to_rgb(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(exif: object) -> int:
    """The orientation in the first directory of an EXIF block, a TIFF structure; 1, upright, where it has none.

    No other tag is read and none is written: Pillow's exif_transpose rewrites the whole block, which fails where any
    tag is of another type than the standard's, and its reader stops at a tag that lies outside of the block.
    """
    if not isinstance(exif, bytes):
        return 1
    block = re.sub(rb"^(Exif\x00\x00)+", b"", exif)
    order: Literal["little", "big"] = "little" if block.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(block[at : at + size], order)

    start = number(4, 4)
    for at in range(start + 2, min(start + 2 + 12 * number(start, 2), len(block)), 12):
        tag, kind = number(at, 2), number(at + 2, 2)
        if tag == _ORIENTATION and kind in _WHOLE:
            return number(at + 8, _WHOLE[kind])
    return 1


def _drop_metadata(image: Image.Image) -> None:
    """Remove the metadata of a TIFF that Pillow would decode while it loads the pixels, and fail on odd tags.

    The orientation stays: Pillow turns a TIFF upright while it loads.
    """
    image.info.pop("xmp", None)
    exif = image.getexif()
    for tag in TiffTags.TAGS_V2_GROUPS:
        if tag in exif:
            del exif[tag]


def _take_exif(data: bytes) -> tuple[bytes, bytes]:
    """(a JPEG whose EXIF Pillow does not recognise, the EXIF block).

    Pillow reads the resolution in it when it opens a JPEG, and refuses the picture where that is an empty list.
    """
    at, exif, hidden = len(_JPEG) - 1, b"", bytearray(data)
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
            exif = exif or data[at + 10 : end]
            hidden[at + 4 : at + 8] = b"none"
        at = end
    return (bytes(hidden), exif) if exif else (data, exif)


def _without_texts(data: bytes) -> bytes:
    """A PNG without its text chunks: Pillow decompresses them, and refuses pictures where they are long.

    Image generators write their workflows there, of several megabytes.
    """
    at, kept = len(_PNG), [_PNG]
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _scale_key(image: ImageFile.ImageFile) -> None:
    """Scale the transparent colour of a PNG to 8 bits, as Pillow scales the pixels but not the colour."""
    key, args = image.info.get("transparency"), image.tile[0].args if image.tile else None
    raw = args if isinstance(args, str) else ""
    if isinstance(key, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (255 // (2 ** int(raw[-1]) - 1))
    if isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _reason(error: Exception) -> str:
    """An exception as one sentence, without the paths and addresses of objects that some texts hold."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it. Scale it down."
    if isinstance(error, Image.DecompressionBombError):
        return f"it has {_TOO_MANY}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{8,}", "an object", str(error))
    text = " ".join(text.split())[:200].rstrip(".")
    kind = "" if isinstance(error, (OSError, SyntaxError)) and text else f"{type(error).__name__}: "
    return f"decoding failed: {kind}{text or 'the data is damaged'}."
