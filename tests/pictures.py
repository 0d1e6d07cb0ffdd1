"""Pictures of tests: decoded, encoded, and written byte by byte where Pillow doesn't write what a test needs."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from mllama_graph.inputs.image_decoding import decode, naming
from mllama_graph.inputs.image_sources import Source, read_source

# Bytes of a value by its TIFF type; unknown types count as one.
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# A TIFF field: its tag, type, count, and value.
Field = tuple[int, int, int, bytes]


def open_image(source: Source, base: Path = Path("."), number: int = 1) -> Image.Image:
    """A source as the engine decodes it."""
    with naming(number, source):
        return decode(read_source(source, base))


def encoded(image: Image.Image, form: str = "png", **options) -> bytes:
    """An image as the bytes of a file."""
    body = io.BytesIO()
    image.save(body, form, **options)
    return body.getvalue()


def data_uri(image: Image.Image, form: str = "png") -> str:
    return f"data:image/{form};base64," + base64.b64encode(encoded(image, form)).decode()


def short(tag: int, *values: int) -> Field:
    return tag, 3, len(values), struct.pack(f"<{len(values)}H", *values)


def long(tag: int, value: int) -> Field:
    return tag, 4, 1, struct.pack("<I", value)


def fields(*given: Field) -> bytes:
    """A little-endian TIFF header with one directory: an EXIF block, or the head of a TIFF."""
    offset, table, body = 8 + 2 + 12 * len(given) + 4, b"", b""
    for tag, kind, count, value in sorted(given):
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", offset + len(body))
        body += value + b"\0" * (len(value) % 2) if len(value) > 4 else b""
        table += struct.pack("<HHI", tag, kind, count) + place
    return b"II*\0" + struct.pack("<IH", 8, len(given)) + table + bytes(4) + body


def tiff(values: np.ndarray, *extra: Field, bits: int = 0, photometric: int = 1, sample: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of (height, width) or (height, width, samples) values.

    bits: per sample, by default those of the array. sample: 1 unsigned, 2 signed, 3 floating-point.
    """
    height, width, samples = values.shape if values.ndim == 3 else (*values.shape, 1)
    pixels = values.astype(values.dtype.newbyteorder("<")).tobytes()
    known = [
        long(256, width),
        long(257, height),
        short(258, *[bits or values.dtype.itemsize * 8] * samples),
        short(259, 1),
        short(262, photometric),
        short(277, samples),
        long(278, height),
        long(279, len(pixels)),
        short(339, *[sample] * samples),
        *extra,
    ]
    start = len(fields(long(273, 0), *known))
    return fields(long(273, start), *known) + pixels


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of unfiltered rows, each with its leading zero; `chunks` stand before the pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    between = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + between
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
