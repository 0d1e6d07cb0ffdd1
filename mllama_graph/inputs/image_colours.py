"""Converts pictures of every mode to the 8-bit RGB that a viewer shows."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from mllama_graph.core.errors import UserError

# Rows that are converted at a time, so that a conversion in several steps needs little memory beside its result.
_ROWS = 256
# Curves of sRGB profiles differ in their rounding: a profile that moves no colour by more than this is sRGB (of 255).
_ROUNDING = 2
# The exponent of displays by the PNG specification, and the least relative difference from it that is corrected, as in
# libpng (PNG_GAMMA_THRESHOLD): the usual gAMA, 1/2.2 or near it, leaves the pixels as they are.
_DISPLAY, _GAMMA_THRESHOLD = 2.2, 0.05
# TIFF tags, and the photometric interpretation in which 0 is white.
_BITS, _PHOTOMETRIC, _MIN_IS_WHITE = 258, 262, 0

Convert = Callable[[Image.Image], Image.Image]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture to RGB: 16 bits to 8, ICC profile or gamma to sRGB, transparency composited on white.

    Raises UserError for modes that have no reading in 8 bits.
    """
    # Pillow scales PPM of more than 8 bits to 0..65535, in 32-bit pixels.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "32-bit integers or signed 16-bit" if image.mode == "I" else "floating-point"
        raise UserError(
            f"its pixels are {kind} numbers, of which no range is defined as black to white. "
            "Export it with 8 or 16 bits."
        )
    if image.mode.startswith("I;16") and image.format == "FITS":
        raise UserError("FITS defines no range of black to white for 16 bits. Export it as PNG.")
    managed = _managed(image)
    bits, inverted = _grey_scale(image)
    deep, transparent = image.mode[0] == "I", _is_transparent(image)
    if image.mode == "RGB" and not managed and not transparent:
        return image
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        strip = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
        strip = _eight_bits(strip, bits, inverted) if deep else strip
        result.paste(_rgb(strip, managed, transparent), (0, top))
    return result


def _is_transparent(image: Image.Image) -> bool:
    # Not Image.has_transparency_data, which asserts that P has a palette object: ICNS has none.
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return image.mode[-1] in "Aa" or palette.endswith("A") or image.info.get("transparency") is not None


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """(bits in use, whether 0 is white) of a 16-bit grey picture, from its TIFF tags. Pillow applies neither."""
    tags = getattr(image, "tag_v2", {}) if image.mode.startswith("I;16") else {}
    bits = tags.get(_BITS, (16,))
    return (bits[0] if isinstance(bits, tuple) else bits), tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE


def _rgb(strip: Image.Image, managed: Convert | None, transparent: bool) -> Image.Image:
    if strip.mode == "La":
        strip = strip.convert("LA")
    if not transparent:
        return managed(strip) if managed else strip.convert("RGB")
    rgba = strip.convert("RGBA")
    if managed:
        alpha = rgba.getchannel("A")
        rgba = managed(strip)
        rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _eight_bits(strip: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """The 8 most significant bits of a 16-bit grey picture, as Pillow reads RGB of 16 bits."""
    values = np.asarray(strip)
    grey = (values >> (bits - 8)).astype(np.uint8)
    result = Image.fromarray(255 - grey if inverted else grey)
    key = strip.info.get("transparency")
    if key is not None:
        result.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return result


def _managed(image: Image.Image) -> Convert | None:
    """The conversion that a picture's ICC profile or else its gAMA chunk asks for; None without either, and for sRGB.

    As in viewers, a profile that is damaged or belongs to another colour space than the picture's is ignored.
    """
    if image.mode == "LAB":
        return _transform(ImageCms.createProfile("LAB"), "LAB")
    data = image.info.get("icc_profile")
    if not data:
        return _corrected(image)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        grey = image.mode in ("1", "L", "LA", "La") or image.mode[0] == "I"
        if mode != ("L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"):
            return None
        convert = _transform(profile, mode)
        return None if mode != "CMYK" and _is_srgb(convert, mode) else convert
    except (ImageCms.PyCMSError, KeyError, OSError, TypeError, ValueError):
        return None


def _corrected(image: Image.Image) -> Convert | None:
    """The gamma correction of a PNG without an ICC profile; None where it says sRGB (PNG, third edition, 13.13)."""
    product = image.info.get("gamma", 0) * _DISPLAY
    if product <= 0 or "srgb" in image.info or abs(product - 1) < _GAMMA_THRESHOLD:
        return None
    table = [round(255 * (value / 255) ** (1 / product)) for value in range(256)]
    return lambda strip: strip.convert("RGB").point(table * 3)


def _transform(profile: "ImageCms.core.CmsProfile | ImageCms.ImageCmsProfile", mode: str) -> Convert:
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")

    def convert(image: Image.Image) -> Image.Image:
        result = ImageCms.applyTransform(image.convert(mode), transform)
        assert result is not None, "only an in-place transform returns None"
        return result

    return convert


def _is_srgb(convert: Convert, mode: str) -> bool:
    """Whether a conversion leaves a grid over all colours as it is."""
    levels = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    grid = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    image = Image.fromarray(grid)
    changed = np.asarray(convert(image)).astype(int) - np.asarray(image.convert("RGB"))
    return bool(np.abs(changed).max() <= _ROUNDING)
