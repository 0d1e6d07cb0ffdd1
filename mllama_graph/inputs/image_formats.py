"""Which picture formats are read, and what a file is that is none of them. The list is Pillow's registry."""

import binascii
import re
from functools import cache

from PIL import Image

# Formats that Pillow registers although it can't decode them itself: EPS runs Ghostscript, WMF is drawn by Windows,
# BUFR, GRIB, HDF5 and MPEG have no decoder.
EXCLUDED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})

# What people take for a picture, by its first bytes.
_KINDS = [
    (rb"version https://git-lfs", "it is a Git LFS pointer: run git lfs pull"),
    (rb"\s*<(!doctype html|html|head|body|script)\b", "it is an HTML page, such as a server's answer to a download"),
    (rb"\s*<(\?xml|svg)", "it is SVG or other XML: export it as PNG"),
    (rb"%PDF", "it is a PDF document: export the page as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "it is PostScript (EPS): export it as PNG"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "it is HEIC, which Pillow does not decode: export it as JPEG or PNG"),
    (rb"....ftyp(?!avi[fs])|\x00\x00\x01\xba|\x1aE\xdf\xa3", "it is a video: export a frame as PNG"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL", "it is JPEG XL, which Pillow does not decode: export it as PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "it is a compressed archive: unpack it first"),
]
# The formats with a signature that hardly occurs by chance.
_SIGNED = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PSD")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_URL_SAFE = str.maketrans("-_", "+/")


def formats() -> tuple[str, ...]:
    """The formats that are decoded, by Pillow's names; those of plugins that the program has registered included."""
    Image.init()
    return tuple(name for name in Image.ID if name not in EXCLUDED)


def suffixes() -> frozenset[str]:
    """The endings of file names (".png") that count as pictures in a folder."""
    # Pillow registers no opener for MPO (two pictures in a JPEG): that of JPEG reads it.
    known = {*formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def unknown(data: bytes) -> str:
    """Why the bytes of a file can't be identified as a picture, as far as they tell."""
    if not data:
        return "it is empty"
    for pattern, text in _KINDS:
        if re.match(pattern, data[:64], re.IGNORECASE | re.DOTALL):
            return text
    if name := signature(data[:16]):
        return f"it begins like a {name} file, but its header is damaged or cut off"
    if is_base64(data[:1024].decode("latin1")):
        return "it is base64 text: put data:image/png;base64, before it and give it as a data: URI"
    return "it is not a picture in a format that Pillow reads; export it as PNG or JPEG"


def is_base64(text: str) -> bool:
    """Whether a text is a picture in base64."""
    if not _BASE64.fullmatch(text):
        return False
    head = "".join(text[:64].split()).translate(_URL_SAFE)
    try:
        return signature(binascii.a2b_base64(head[: len(head) // 4 * 4])[:16]) is not None
    except binascii.Error:
        return False


@cache
def _openers() -> dict[str, object]:
    Image.init()
    return {name: Image.OPEN[name][1] for name in _SIGNED if name in Image.OPEN}


def signature(head: bytes) -> str | None:
    """The format whose signature the first 16 bytes of a file carry, or None."""
    return next((name for name, accept in _openers().items() if callable(accept) and accept(head) is True), None)
