"""Damaged pictures and random EXIF blocks: each gives a picture or a UserError that names it, in bounded memory."""

import random
import re
import struct
import time
import warnings
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SPECS, model_config
from commands import FUZZ_SECONDS
from pictures import TYPE_BYTES, Field, encoded, fields, open_image, short, tiff
from PIL import Image
from request_cases import random_image

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_decoding import MAX_PIXELS
from mllama_graph.inputs.image_formats import formats
from mllama_graph.inputs.images import prepare_images
from mllama_graph.model.shape import shape_of

VISION = shape_of(model_config(SPECS["base"])).vision
# Decoded pixels take 4 bytes, a copy in RGB 4, and decoders of wide samples (JPEG 2000) up to 12 more.
PEAK = MAX_PIXELS * 20
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "LAB", "YCbCr")
OPTIONS: dict[str, list[dict]] = {
    "TIFF": [{}, *({"compression": name} for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"))],
    "PNG": [{}, {"save_all": True, "append_images": [Image.new("RGB", (48, 36))]}],
    "GIF": [{}, {"save_all": True, "append_images": [Image.new("RGB", (48, 36))]}],
    "WEBP": [{}, {"lossless": True}],
    "JPEG": [{}, {"progressive": True}],
    "AVIF": [{"speed": 10}],
}


def of_mode(mode: str) -> Image.Image:
    image = random_image(48, 36, "RGBA" if mode in ("RGBA", "LA") else "RGB", np.random.default_rng(0))
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(image.convert("L")).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        return Image.fromarray(grey * 200)
    return Image.frombytes("LAB", image.size, image.tobytes()) if mode == "LAB" else image.convert(mode)


def files() -> list[tuple[str, bytes]]:
    """(format, file) of every format that Pillow both writes and reads, in every mode that it writes."""
    found = []
    for form in sorted({*formats(), "MPO"} & {*Image.SAVE}):
        # Pillow writes an ICNS in ten sizes, which takes half a second.
        for mode in MODES if form != "ICNS" else ("RGBA",):
            for options in OPTIONS.get(form, [{}]):
                try:
                    found.append((form, encoded(of_mode(mode), form, **options)))
                except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError):
                    continue  # the format does not hold this mode
    return found


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file cut off, with bits flipped, bytes overwritten, or a piece repeated; mostly near its head."""
    body = bytearray(data[: rng.randrange(1, len(data))] if rng.random() < 0.25 else data)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
        at = min(int(rng.expovariate(1 / 150)), len(body) - 1) if rng.random() < 0.6 else rng.randrange(len(body))
        body[at] = rng.choice((body[at] ^ 1 << rng.randrange(8), 0, 255, 127))
    if rng.random() < 0.1:
        at, end = sorted(rng.randrange(len(body)) for _ in range(2))
        body[at:at] = body[at:end]
    return bytes(body)


def seconds(limit: float) -> Iterator[int]:
    """0, 1, 2, ... until the time is over."""
    end = time.monotonic() + limit
    return takewhile(lambda _: time.monotonic() < end, count())


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    return int(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def written() -> list[tuple[str, bytes]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return files()


def test_a_damaged_picture_is_a_picture_or_an_error_that_names_it(written, no_warnings, capfd):
    rng, number, read = random.Random(0), 0, 0
    assert len({form for form, _ in written}) >= 20
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    for _ in seconds(FUZZ_SECONDS):
        number += 1
        form, data = rng.choice(written)
        data = damaged(data, rng)
        try:
            [tiled] = prepare_images([data], Path("."), VISION)
            read += 1
            assert tiled.data.dtype == np.uint8
        except UserError as error:
            text = str(error)
            assert re.fullmatch(r"picture 1 \(given as bytes\) can't be read: [^\n]{5,300}", text), (form, text)
            assert " at 0x" not in text
    capfd.readouterr()  # libtiff writes its complaints to stderr
    with capfd.disabled():
        print(f"\n{number} damaged files, {read} readable, peak {(memory('VmHWM') - base) >> 20} MiB", end=" ")
    assert number > 20 and 0.1 < read / number < 0.9
    assert memory("VmHWM") - base < PEAK


ICC_PROFILE = 0x8773
# Up to here TIFF's own tags say how pixels are stored, and a tag that lies outside of the file hides those behind it.
PIXEL_TAGS = 600


def random_field(rng: random.Random) -> Field:
    tags = (0x010F, 0x0110, 0x011A, 0x0128, 0x0132, 0x02BC, 0x8298, 0x8769, 0x8773, 0x8825, 0xA005, 0x927C, 0xC4A5)
    kind = rng.choice((*range(14), 16, 129, 65535))
    count = rng.choice((0, 1, 1, 2, 3, 8, 500, 2**31))
    tag = rng.choice(tags) if rng.random() < 0.6 else rng.randrange(65536)
    return tag, kind, count, rng.randbytes(min(count * TYPE_BYTES.get(kind, 1), 64))


def test_random_exif_blocks_change_nothing_but_the_orientation(no_warnings):
    rng, image = random.Random(1), random_image(24, 16, "RGB", np.random.default_rng(0))
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    for number in seconds(FUZZ_SECONDS):
        odd = {field[0]: field for field in (random_field(rng) for _ in range(rng.randrange(1, 5)))}
        form = ("PNG", "WEBP", "TIFF", "JPEG")[number % 4]
        odd.pop(0x0112, None)
        if form == "TIFF":
            odd = {tag: field for tag, field in odd.items() if tag > PIXEL_TAGS and tag != ICC_PROFILE}
        block = fields(short(0x0112, 6), *odd.values())
        if form == "TIFF":
            data = tiff(np.asarray(image), short(0x0112, 6), *odd.values(), photometric=2)
        else:
            exif = block if form == "PNG" else b"Exif\0\0" + block
            data = encoded(image, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
        shown = np.asarray(open_image(data))
        assert shown.shape == upright.shape, (form, odd)
        assert form == "JPEG" or np.array_equal(shown, upright), (form, odd)
        # A block that is damaged throughout leaves the picture as it is or turns it.
        block = damaged(block, rng)
        shown = open_image(encoded(image, "PNG", exif=block))
        assert sorted(shown.get_flattened_data()) == sorted(image.get_flattened_data())


def test_an_avif_is_turned_by_its_own_box_whatever_its_exif_says():
    image = random_image(24, 16, "RGB", np.random.default_rng(0))
    field = short(0x0128, 2)
    data = encoded(image, "AVIF", exif=b"Exif\0\0" + fields(short(0x0112, 6), field))
    known = struct.pack("<HH", *field[:2])
    assert data.count(known) == 1
    for kind in (1, 2, 5, 7, 12, 99):
        assert open_image(data.replace(known, struct.pack("<HH", 0x0128, kind))).size == (16, 24)
