"""What is said of pictures that can't be read, and the limits of their size."""

import base64
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from pictures import data_uri, encoded, open_image, png
from PIL import ImageFile
from request_cases import random_image

from mllama_graph.core.errors import UserError
from mllama_graph.inputs import image_decoding, image_sources

PICTURE = random_image(40, 30, "RGB", np.random.default_rng(0))
PNG = encoded(PICTURE)
BASE64 = base64.b64encode(PNG).decode()


BROKEN = {
    "empty": (b"", "it is empty"),
    "text": (b"this is no image", "not a picture"),
    "half": (PNG[: len(PNG) // 2], "truncated"),
    "header only": (PNG[:10], "like a PNG file, but its header is damaged or cut off"),
    "flipped": (PNG[:60] + bytes(b ^ 255 for b in PNG[60:80]) + PNG[80:], ""),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
    "a drawing": (b'<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
    "a document": (b"%PDF-1.7\n", "a PDF document"),
    "EPS, which would start Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "an iPhone's photo": (b"\0\0\0\x24ftypheic\0\0\0\0", "HEIC"),
    "JPEG XL": (b"\xff\x0a\xfa\x1f", "JPEG XL"),
    "an archive": (b"PK\x03\x04" + bytes(30), "archive: unpack"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "base64 in a file": (BASE64.encode(), "base64 text"),
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_picture_is_named_with_its_number_and_reason(content, tmp_path):
    data, reason = BROKEN[content]
    (tmp_path / "broken.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source, shown in (
        (str(tmp_path / "broken.png"), "broken.png"),
        (uri, "data:image/png"),
        (data, "given as bytes"),
    ):
        with pytest.raises(UserError, match=rf"^picture 2 \(.*{shown}.*\) can't be read: .*{reason}") as error:
            open_image(source, number=2)
        assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere.png", r"picture 1 \(nowhere.png\) can't be read: the file does not exist"),
        (".", "is a folder"),
        ("", "empty text"),
        ("/dev/zero", "neither a file nor a URI"),
        ("https://example.com/a.png", "web address, and nothing is fetched. Download it"),
        ("HTTP://example.com/a.png", "web address"),
        ("s3://bucket/a.png", "s3: addresses are not read"),
        ("file://nas/share/a.png", "its host is 'nas'.*file:///folder"),
        ("file:///nowhere.png", "does not exist"),
        ("file:", "does not exist"),
        ("data:image/png", "needs a comma"),
        ("data:image/png;base64,", "it is empty"),
        ("data:image/png,abc", "not a picture"),
        (f"data:image/png,{BASE64}", "is base64, which the URI must say"),
        ("data:image/png;base64,a_b=c!", "not valid base64"),
        ("data:image/png;base64,AAAAA", "not valid base64: .*cut off"),
        ("data:image/png;base64,\ud800", "not valid base64"),
        ("data:image/png;base64,PGh0bWw+", "an HTML page"),
        (BASE64, "base64 without a prefix"),
        (BASE64.replace("B", "B\n"), "base64 without a prefix"),
        ("x" * 5000 + ".png", r"picture 1 \(xxx"),
        ("a\0b.png", r"picture 1 \(a\\x00b.png\).*does not exist"),
        ("a\nb.png", r"picture 1 \(a\\nb.png\).*does not exist"),
        ("~nobody-of-that-name/a.png", "does not exist"),
        ("~a\0b/a.png", "does not exist"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_invalid_source_is_named_in_a_short_message(source, message):
    with pytest.raises(UserError, match=message) as error:
        open_image(source)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)

    def refuse(*_args):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.png"))

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(UserError, match=r"a.png\) can't be read: Permission denied\.$"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError("too deep"),
        AssertionError(),
        KeyError(3),
        OSError("<_io.BytesIO object at 0x7f1e778cb270>"),
    ],
)
def test_whatever_a_decoder_raises_is_the_pictures_error(error, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=r"^picture 3 \(given as bytes\) can't be read: .+\.$") as raised:
        open_image(PNG, number=3)
    assert "0x7f" not in str(raised.value)


# ---- limits


def test_a_picture_beyond_the_pixel_limit_is_refused_before_it_is_decoded():
    bombs = [png(w, h, 8, 2, b"") for w, h in ((20000, 20000), (12000, 10667), (60000, 60000))]
    for bomb in bombs:
        tracemalloc.start()
        with (
            warnings.catch_warnings(),
            pytest.raises(UserError, match="more than the 128 million pixels that are decoded. Scale"),
        ):
            warnings.simplefilter("error")
            open_image(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    # Pillow warns from 89 million pixels on; that is ours to judge.
    with warnings.catch_warnings(record=True) as shown, pytest.raises(UserError, match="truncated"):
        open_image(png(12000, 10000, 8, 0, b""))
    assert not shown


def test_the_limits_hold_for_every_kind_of_source(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 40 * 30 - 1)
    for source in (PNG, PICTURE, data_uri(PICTURE), tmp_path / "a.png"):
        with pytest.raises(UserError, match="it has 40 x 30 pixels, more than"):
            open_image(source)
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 40 * 30)
    assert open_image(tmp_path / "a.png").size == (40, 30)
    monkeypatch.setattr(image_sources, "MAX_BYTES", len(PNG) - 1)
    for source in (PNG, data_uri(PICTURE), tmp_path / "a.png"):
        with pytest.raises(UserError, match="MiB, the most that is read"):
            open_image(source)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "avif", "jpeg2000", "ppm", "tga", "qoi"])
def test_a_picture_that_is_cut_off_is_refused(form):
    data = encoded(PICTURE, form)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(UserError, match="can't be read"):
            open_image(data[: int(len(data) * part)])
