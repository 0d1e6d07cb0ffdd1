"""Pictures of every mode and depth as a viewer shows them: 16 bits, CMYK, transparency, ICC profiles, animations."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, open_image, png, tiff
from PIL import Image, ImageCms, PngImagePlugin
from request_cases import random_image

from mllama_graph.core.errors import UserError

RNG = np.random.default_rng(0)
GREY = np.asarray(random_image(60, 40, "L", RNG))
COLOUR = np.asarray(random_image(60, 40, "RGB", RNG))
# Low bytes that 8 bits don't show.
DEEP = GREY.astype(np.uint16) << 8 | RNG.integers(0, 256, GREY.shape, dtype=np.uint16)
ALPHA = np.linspace(0, 255, GREY.size).astype(np.uint8).reshape(GREY.shape)


def pixels(data) -> np.ndarray:
    return np.asarray(open_image(data))


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours over white, in real arithmetic."""
    share = alpha[..., None] / 255
    return np.broadcast_to(colours.reshape(*alpha.shape, -1), (*alpha.shape, 3)) * share + 255 * (1 - share)


def swapped(values: np.ndarray) -> bytes:
    """Rows of big-endian values, as PNG and PPM have them; each row begins with PNG's filter 0."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)


def twelve(values: np.ndarray) -> np.ndarray:
    """12-bit values packed two to three bytes, as TIFF has them."""
    first, second = values[:, 0::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    return packed.reshape(len(values), -1).astype(np.uint8)


def packed_tiff(values: np.ndarray) -> bytes:
    """A TIFF of 12-bit grey; the width in its header counts pixels, not bytes."""
    data = tiff(twelve(values >> 4), bits=12)
    old, new = (struct.pack("<HHII", 256, 4, 1, width) for width in (values.shape[1] * 3 // 2, values.shape[1]))
    return data.replace(old, new)


SIXTEEN = {
    "PNG": lambda: png(60, 40, 16, 0, swapped(DEEP)),
    "TIFF": lambda: tiff(DEEP),
    "TIFF, 0 is white": lambda: tiff(65535 - DEEP, photometric=0),
    "TIFF, big-endian": lambda: encoded(Image.fromarray(DEEP.astype(">u2")), "tiff"),
    "TIFF, LZW": lambda: encoded(Image.fromarray(DEEP), "tiff", compression="tiff_lzw"),
    "TIFF, 12 bits": lambda: packed_tiff(DEEP),
    "PGM": lambda: b"P5 60 40 65535\n" + DEEP.astype(">u2").tobytes(),
    "JPEG 2000": lambda: encoded(Image.fromarray(DEEP), "jpeg2000"),
    "PIL image": lambda: Image.fromarray(DEEP),
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bit_grey_is_its_most_significant_byte(name):
    assert np.array_equal(pixels(SIXTEEN[name]()), np.stack([DEEP >> 8] * 3, -1))


def test_sixteen_bit_colour_is_its_most_significant_bytes():
    deep = COLOUR.astype(np.uint16) << 8 | 77
    for data in (png(60, 40, 16, 2, swapped(deep.reshape(40, -1))), tiff(deep, photometric=2)):
        assert np.array_equal(pixels(data), COLOUR)


@pytest.mark.parametrize(
    "data, message",
    [
        (tiff(DEEP.astype(np.int32)), "32-bit integers"),
        (tiff(DEEP.astype(np.int16), sample=2), "signed 16-bit"),
        (tiff(DEEP.astype(np.float32), sample=3), "floating-point"),
        (Image.fromarray(DEEP.astype(np.int32)), "32-bit integers"),
        (Image.fromarray(GREY.astype(np.float32)), "floating-point"),
    ],
)
def test_numbers_without_a_range_of_black_to_white_are_refused(data, message):
    with pytest.raises(UserError, match=f"{message}.*Export it with 8 or 16 bits"):
        open_image(data)


def test_alpha_is_composited_on_white_in_every_mode():
    grey, colour, alpha = (Image.fromarray(values) for values in (GREY, COLOUR, ALPHA))
    grey_alpha = Image.merge("LA", (grey, alpha))
    colour_alpha = Image.merge("RGBA", (*colour.split(), alpha))
    # 1 for the rounding of the blend; 3 where the premultiplied colours were rounded, and only where they show.
    for image, colours in ((grey_alpha, GREY), (colour_alpha, COLOUR)):
        for data in (encoded(image), encoded(image, "tiff"), encoded(image, "webp", lossless=True, exact=True), image):
            assert np.abs(pixels(data) - on_white(colours, ALPHA)).max() <= 1
    for premultiplied in (colour_alpha.convert("RGBa"), grey_alpha.convert("La")):
        wanted = on_white(COLOUR if premultiplied.mode == "RGBa" else GREY, ALPHA)
        assert np.abs(pixels(premultiplied) - wanted).max() <= 3


def test_a_palette_with_transparency_is_composited_on_white():
    image = Image.fromarray(COLOUR).quantize(16)
    colours = np.asarray(image.convert("RGB"))
    for transparency in (3, bytes(range(0, 160, 10))):
        alphas = np.full(16, 255)
        if isinstance(transparency, bytes):
            alphas[:] = list(transparency)
        else:
            alphas[transparency] = 0
        wanted = on_white(colours, alphas[np.asarray(image)])
        assert np.abs(pixels(encoded(image, transparency=transparency)) - wanted).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(depth):
    levels = np.arange(2 ** min(depth, 4))
    values = np.repeat(levels, 8)
    if depth == 16:
        row = (values * 4369).astype(">u2").tobytes()
    else:
        bits = np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, -depth:]
        row = np.packbits(bits.reshape(-1)).tobytes()
    key = 1 if depth < 16 else 4369
    shown = pixels(png(len(values), 1, depth, 0, b"\0" + row, tRNS=struct.pack(">H", key)))[0, :, 0]
    top = 2**depth - 1 if depth < 16 else 15
    assert np.array_equal(shown, np.where(values == 1, 255, values * 255 // top))


def test_the_transparent_colour_of_a_deep_png_is_white():
    colours = np.array([[0x1234, 0x5678, 0x9ABC], [0x3412, 0x7856, 0xBC9A]])
    data = png(2, 1, 16, 2, swapped(colours.reshape(1, -1)), tRNS=colours[0].astype(">u2").tobytes())
    assert pixels(data)[0].tolist() == [[255, 255, 255], [0x34, 0x78, 0xBC]]


def test_cmyk_without_a_profile_is_pillows():
    image = Image.fromarray(COLOUR).convert("CMYK")
    assert np.array_equal(pixels(encoded(image, "tiff")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["gif", "webp", "png", "tiff", "avif"])
def test_the_first_frame_of_an_animation_is_taken(form):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 2, "lossy formats round"


# ---- ICC profiles and gamma

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(gamma: float) -> bytes:
    """A grey ICC profile with a plain power curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    tags = struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 16)
    head = struct.pack(">I4sI4s4s4s", 192, bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + tags + white + curve


def swap_red_and_green() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged: a viewer shows red as green."""
    return SRGB.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")


def test_an_icc_profile_is_applied():
    shown = pixels(encoded(Image.fromarray(COLOUR), icc_profile=swap_red_and_green())).astype(int)
    # 1 for the rounding of lcms.
    assert np.abs(shown - COLOUR[..., [1, 0, 2]]).max() <= 1
    image = Image.fromarray(COLOUR)
    image.putalpha(Image.fromarray(ALPHA))
    shown = pixels(encoded(image, icc_profile=swap_red_and_green()))
    assert np.abs(shown - on_white(COLOUR[..., [1, 0, 2]], ALPHA)).max() <= 2


@pytest.mark.parametrize("deep", [False, True])
def test_a_grey_icc_profile_is_applied(deep):
    data = encoded(Image.fromarray(DEEP if deep else GREY), icc_profile=profile(1.8))
    linear = (GREY / 255) ** 1.8
    wanted = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    # 2 for lcms' tables, which are coarse where the curve of sRGB is steep.
    assert np.abs(pixels(data) - wanted[..., None]).max() <= 2
    assert np.abs(GREY - wanted).max() > 5, "the profile changes nothing"


def test_an_srgb_profile_changes_no_pixel():
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR), icc_profile=SRGB)), COLOUR)


@pytest.mark.parametrize("bad", [b"no profile", swap_red_and_green()[:200], profile(1.8)])
def test_a_profile_that_is_damaged_or_of_another_colour_space_is_ignored(bad):
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR), icc_profile=bad)), COLOUR)


def rows(values: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


@pytest.mark.parametrize("gamma", [100_000, 55_556, 30_000])
def test_the_gamma_of_a_png_is_corrected_for_a_display_of_2_2(gamma):
    chunk = struct.pack(">I", gamma)
    # PNG, third edition, 13.13: the sample to the power of 1 / (gamma * display exponent), of the samples' range.
    corrected = 255 * (COLOUR / 255) ** (1 / (gamma / 100_000 * 2.2))
    assert np.abs(corrected - COLOUR).max() > 10, "the gamma changes nothing"
    assert np.abs(pixels(png(60, 40, 8, 2, rows(COLOUR), gAMA=chunk)) - corrected).max() <= 0.5
    # Alpha is not corrected.
    both = np.dstack([COLOUR, ALPHA])
    assert np.abs(pixels(png(60, 40, 8, 6, rows(both), gAMA=chunk)) - on_white(corrected, ALPHA)).max() <= 1.5
    # Of 16 bits, the most significant byte is.
    grey = 255 * ((DEEP >> 8) / 255) ** (1 / (gamma / 100_000 * 2.2))
    assert np.abs(pixels(png(60, 40, 16, 0, swapped(DEEP), gAMA=chunk)) - grey[..., None]).max() <= 0.5


@pytest.mark.parametrize(
    "chunks",
    [
        {"gAMA": struct.pack(">I", 45_455)},
        {"gAMA": struct.pack(">I", 47_000)},
        {"gAMA": bytes(4)},
        {"sRGB": b"\0", "gAMA": struct.pack(">I", 100_000)},
        {"cICP": bytes([1, 13, 0, 1]), "gAMA": struct.pack(">I", 100_000)},
        {"iCCP": b"a\0\0" + zlib.compress(SRGB), "gAMA": struct.pack(">I", 100_000)},
    ],
    ids="+".join,
)
def test_a_gamma_near_srgb_or_beside_a_chunk_that_replaces_it_changes_no_pixel(chunks):
    assert np.array_equal(pixels(png(60, 40, 8, 2, rows(COLOUR), **chunks)), COLOUR)


def test_lab_is_shown_in_srgb():
    image = ImageCms.profileToProfile(
        Image.fromarray(COLOUR), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    # A step of L*a*b* in 8 bits is several steps of sRGB where colours are dark or saturated.
    assert np.abs(pixels(encoded(image, "tiff")).astype(int) - COLOUR).mean() <= 2


def test_long_texts_in_a_png_are_no_part_of_the_picture():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * (2 << 20), zip=True)
    texts.add_itxt("prompt", "y" * (2 << 20), zip=True)
    data = encoded(Image.fromarray(COLOUR), pnginfo=texts)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data))
    assert np.array_equal(pixels(data), COLOUR)
