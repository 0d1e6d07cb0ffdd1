"""Every way to name a picture: paths, file: and data: URIs, lists and folders; and its EXIF orientation."""

import base64
import os
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from pictures import data_uri, encoded, fields, open_image, short, tiff
from PIL import Image
from request_cases import random_image

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_formats import formats, suffixes
from mllama_graph.inputs.image_sources import list_images, part_source, request_images

PICTURE = random_image(40, 30, "RGB", np.random.default_rng(0))
PNG = encoded(PICTURE)
BASE64 = base64.b64encode(PNG).decode()


def is_picture(source, base=Path(".")) -> bool:
    return open_image(source, base).tobytes() == PICTURE.tobytes()


# ---- one picture


def test_a_file_is_named_by_path_or_file_uri(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    for name in ("a.png", "图 ü%20#1?.png", "no ending", "in/b.png"):
        path = tmp_path / name
        path.write_bytes(PNG)
        ways = [str(path), path, f"~/{name}", path.as_uri(), f"file:{quote(str(path))}", f"FILE://{quote(str(path))}"]
        ways += [f"file://{host}{quote(str(path))}" for host in ("localhost", "LocalHost")]
        assert all(is_picture(way) for way in ways)
    # Written without percent-encoding, as many do.
    (tmp_path / "a b#1.png").write_bytes(PNG)
    assert is_picture(f"file://{tmp_path}/a b#1.png") and is_picture(f"file://{tmp_path}/in/../a.png?x#y")


def test_a_relative_path_is_found_beside_the_requests_file_and_then_in_the_working_directory(tmp_path, monkeypatch):
    for folder, picture in (("beside", PICTURE), ("here", Image.new("RGB", (5, 5)))):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "a.png")
    PICTURE.save(tmp_path / "here" / "b.png")
    monkeypatch.chdir(tmp_path / "here")
    assert all(is_picture(name, tmp_path / "beside") for name in ("a.png", "b.png", "./b.png", "file:b.png"))
    with pytest.raises(UserError, match=r"\(c.png\).* neither in ../beside nor in .*/here|neither in .*beside nor in"):
        open_image("c.png", tmp_path / "beside")


def test_a_data_uri_is_read_in_every_form_that_clients_write():
    wrapped = "\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76))
    forms = [
        f"data:image/png;base64,{BASE64}",
        f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{BASE64}",
        f"data:image/png;base64,\r\n{wrapped}\r\n",
        f" data:image/png;base64, {BASE64} ",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        "data:image/png;base64," + BASE64.translate(str.maketrans("+/", "-_")),
        f"data:image/png;base64,{quote(BASE64, safe='')}",
        f"data:image/png,{quote_from_bytes(PNG)}",
        f"data:text/html;base64,{BASE64}",  # the media type says nothing about the data
    ]
    assert [form[:40] for form in forms if not is_picture(form)] == []


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "ppm", "tga"])
def test_a_data_uri_gives_the_same_pixels_as_its_file(form, tmp_path):
    (tmp_path / "a").write_bytes(encoded(PICTURE, form))
    assert open_image(str(tmp_path / "a")).tobytes() == open_image(data_uri(PICTURE, form)).tobytes()


@pytest.mark.parametrize("form", ["png", "jpeg", "tiff", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    # Quarters of plain colours, so that lossy formats keep them apart.
    image = Image.fromarray(
        np.kron([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]], np.ones((16, 32, 1))).astype("u1")
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = open_image(encoded(image, form, exif=exif))
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turn |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    wanted = image.transpose(Image.Transpose[turn[orientation]]) if orientation > 1 else image
    at = [(x * shown.width // 4, y * shown.height // 4) for x in (1, 3) for y in (1, 3)]
    assert shown.size == wanted.size
    assert np.abs(np.array([shown.getpixel(p) for p in at]) - [wanted.getpixel(p) for p in at]).max() <= 40


def test_a_wrong_tag_of_exif_neither_refuses_nor_turns_a_picture():
    # GPS and EXIF directories that lie nowhere, a model that is a number, resolutions in text.
    odd = [
        (0x8825, 4, 1, b"\xff\xff\xff\x7f"),
        (0x8769, 2, 4, b"abc\0"),
        (0x0110, 5, 1, bytes(8)),
        (0x0128, 2, 2, b"2\0"),
    ]
    turned = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    for tag in odd:
        block = fields(short(0x0112, 6), tag)
        assert np.array_equal(np.asarray(open_image(encoded(PICTURE, exif=block))), turned)
        data = tiff(np.asarray(PICTURE), short(0x0112, 6), tag, photometric=2)
        assert np.array_equal(np.asarray(open_image(data)), turned)
    # A resolution without a value, which Pillow asks for when it opens a JPEG.
    block = fields(short(0x0112, 6), (0x011A, 3, 0, b""), short(0x0128, 2))
    for exif in (block, fields(short(0x0112, 6), (0x011A, 5, 0, b""), short(0x0128, 2))):
        assert open_image(encoded(PICTURE, "jpeg", exif=b"Exif\0\0" + exif)).size == (30, 40)
    for block in (b"", b"junk", b"Exif\0\0", fields((0x0112, 2, 2, b"6\0")), fields(short(0x0112, 9))):
        assert is_picture(encoded(PICTURE, exif=block))


# ---- lists


def test_a_list_is_written_with_commas_brackets_or_quotes():
    assert list_images(None) == list_images("") == []
    assert list_images("x.png") == ["x.png"]
    for text in ("x.png, y.png,", "[x.png,y.png]", "['x.png', \"y.png\"]", " [ x.png , y.png ] ", "'x.png','y.png'"):
        assert list_images(text) == ["x.png", "y.png"], text
    assert list_images('["x,1.png", y.png]') == ["x,1.png", "y.png"], "a comma in quotes"
    assert list_images("it's.png,b.png") == ["it's.png", "b.png"], "an apostrophe is no quote"
    assert list_images(["x,y.png", "z.png"]) == ["x,y.png", "z.png"]
    uri = data_uri(PICTURE)
    assert list_images(f"{uri},a.png,{uri}") == [uri, "a.png", uri]


def test_a_file_whose_name_looks_like_a_list_is_one_picture(tmp_path):
    for name in ("c,d.png", "[e].png", "'f'.png"):
        (tmp_path / name).write_bytes(PNG)
        assert list_images(f"{tmp_path}/{name}") == [f"{tmp_path}/{name}"]
        assert list_images(name, tmp_path) == [name]


@pytest.mark.parametrize("side", [1, 100])
def test_a_data_uri_is_one_picture_however_long(side):
    image = random_image(side, side, "RGB", np.random.default_rng(0))
    plain = f"data:image/png,{quote_from_bytes(encoded(image), safe=',')}"
    for uri in (data_uri(image), data_uri(image).replace("data:", "DATA:", 1), plain):
        assert list_images(uri) == [uri]


def test_a_folder_gives_the_pictures_that_pillow_opens(tmp_path, monkeypatch):
    named = ["a.JPG", "b.png", "c,d.webp", "e.jp2", "f.avif", "g.tga", "h.ppm", "i.jfif", "j.mpo", "k.apng"]
    for name in [*named, "notes.txt", "doc.pdf", "fig.eps", "film.mpg", "._b.png", ".hidden.png", "noending"]:
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "folder.png").mkdir()
    wanted = [str(tmp_path / name) for name in named]
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for way in (str(tmp_path), f"{tmp_path}/", tmp_path.as_uri(), f"~/{tmp_path.name}"):
        assert list_images(way) == wanted
    assert list_images(tmp_path.name, tmp_path.parent) == wanted


def test_the_formats_are_pillows_without_those_that_need_other_programs():
    Image.init()
    assert set(Image.ID) - set(formats()) == {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
    assert {".png", ".jpg", ".tif", ".avif", ".psd"} <= suffixes() and not {".pdf", ".eps", ".ps", ".mpg"} & suffixes()


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "._a.png").write_bytes(PNG)
    with pytest.raises(UserError, match="folder without pictures"):
        list_images(str(tmp_path))


def test_a_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read every folder
    with pytest.raises(UserError, match="can't be read: Permission denied"):
        list_images(str(tmp_path))


def test_a_requests_images_are_a_list_of_sources_or_of_image_parts():
    assert request_images(None) == [] and request_images("a.png,b.png") == ["a.png", "b.png"]
    assert request_images(["a,b.png", Path("c"), PNG, {"url": "d.png"}]) == ["a,b.png", Path("c"), PNG, "d.png"]
    assert request_images(PICTURE) == [PICTURE]
    for wrong, message in (
        (3, "not int"),
        ([3], "picture 1 is of type int"),
        (["a", None], "picture 2 is of type NoneType"),
    ):
        with pytest.raises(UserError, match=f"images must be a list of file paths or data: URIs.*{message}"):
            request_images(wrong)


def test_the_source_of_an_image_part_is_found_under_every_name():
    shapes = [
        {"image_url": {"url": "a.png", "detail": "low"}},
        {"image_url": "a.png"},
        {"image": "a.png"},
        {"url": "a.png"},
        {"path": "a.png"},
        {"image_url": None, "image": "a.png"},
    ]
    assert all(part_source(shape, 1) == "a.png" for shape in shapes)
    assert is_picture(part_source({"type": "image", "base64": BASE64}, 1))
    for shape in ({}, {"image_url": {}}, {"image_url": ""}, {"image": 3}, {"image_url": {"url": None}}, {"image": b""}):
        with pytest.raises(UserError, match=r"picture 4: an image part needs its file path"):
            part_source(shape, 4)


def test_messages_show_a_path_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"picture 1 \(sub/a.png\)"):
        open_image(os.path.join(tmp_path, "sub/a.png"))
