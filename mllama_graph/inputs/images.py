"""Loads images and cuts them into uint8 tiles. Uses Pillow and numpy only.

The tiles equal those of transformers' MllamaImageProcessorPil before normalisation, which the vision graph does.
"""

import base64
import binascii
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import VisionShape

# An image as users give it: a file path or data: URI, a Path, the bytes of an encoded file, or a decoded image.
Source = str | Path | bytes | Image.Image

# Files of a folder that count as pictures; Pillow decodes all of these formats.
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class TiledImage:
    """One prepared image.

    data: uint8 (tiles, channels, tile, tile), without padding tiles. aspect: aspect-ratio id, counted from 1.
    key: a hash of both.
    """

    data: np.ndarray
    aspect: int
    key: str

    @property
    def count(self) -> int:
        """The number of tiles."""
        return self.data.shape[0]


def open_image(source: Source) -> Image.Image:
    """Decode an image to RGB, rotated upright by its EXIF data, with transparency composited on white.

    Raises UserError naming the source.
    """
    shown = shorten(str(source)) if isinstance(source, (str, Path)) else "given as bytes"
    try:
        if isinstance(source, Image.Image):
            return to_rgb(ImageOps.exif_transpose(source))
        with Image.open(_stream(source, shown)) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except binascii.Error as error:
        raise UserError(f"image {shown} is not valid base64: {error}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {shown} can't be decoded: {error_text(error)}.") from error


def _stream(source: str | Path | bytes, shown: str) -> io.BytesIO | Path:
    """The file or buffer of an encoded image. Raises UserError where there is none."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith("data:"):
        head, _, body = source.partition(",")
        if not head.endswith(";base64"):
            raise UserError(f"image {shown} is a data: URI without ;base64.")
        return io.BytesIO(base64.b64decode(body, validate=True))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"image {shown} does not exist.")
    return path


def shorten(source: str) -> str:
    """A source as messages show it: relative to the current folder, and cut in the middle to at most 80 characters."""
    source = source.removeprefix(f"{Path.cwd()}/")
    return source if len(source) <= 80 else source[:30] + "..." + source[-47:]


def error_text(error: Exception) -> str:
    """An exception's message, without the path that OSError repeats."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparency composited on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def canvas(height: int, width: int, vision: VisionShape) -> tuple[int, int]:
    """The (height, width) in tiles of the canvas for an image.

    Chooses the canvas with the smallest scale that is at least 1, else the largest scale below 1; among equal scales,
    the smallest area (transformers image_processing_pil_mllama.py, get_optimal_tiled_canvas).
    """
    scaled = [(min(h * vision.tile / height, w * vision.tile / width), h * w, (h, w)) for h, w in vision.aspect_ratios]
    larger = [entry for entry in scaled if entry[0] >= 1]
    best = min(entry[0] for entry in larger) if larger else max(entry[0] for entry in scaled)
    return min((entry for entry in scaled if entry[0] == best), key=lambda entry: entry[1])[2]


def fitted(height: int, width: int, canvas_height: int, canvas_width: int, tile: int) -> tuple[int, int]:
    """The (height, width) in pixels that an image is resized to: within its canvas, enlarged to one tile at most."""
    target_height = min(max(height, tile), canvas_height)
    target_width = min(max(width, tile), canvas_width)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)


def tile_image(image: Image.Image, vision: VisionShape) -> TiledImage:
    """Resize an RGB image, pad it with black and cut it into tiles."""
    rows, columns = canvas(image.height, image.width, vision)
    tile = vision.tile
    height, width = fitted(image.height, image.width, rows * tile, columns * tile, tile)
    pixels = np.zeros((rows * tile, columns * tile, 3), dtype=np.uint8)
    pixels[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    data = pixels.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
    data = np.ascontiguousarray(data).reshape(rows * columns, 3, tile, tile)
    aspect = vision.aspect_ratios.index((rows, columns)) + 1
    digest = hashlib.sha256(bytes([aspect]) + data.tobytes()).hexdigest()
    return TiledImage(data, aspect, digest)


def list_images(given: object) -> list[str]:
    """The images that `image=` gives: a file, a comma-separated list, a list, or a folder (all its pictures, sorted).

    Raises UserError for a folder without pictures.
    """
    if given is None or given == "":
        return []
    if isinstance(given, str):
        path = Path(given)
        if given.startswith("data:"):
            return [given]
        if _exists(path.is_dir):
            found = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"image={given} is a folder without pictures ({', '.join(sorted(SUFFIXES))}).")
            return found
        if "," not in given or _exists(path.is_file):
            return [given]
        return [part.strip() for part in given.split(",") if part.strip()]
    if isinstance(given, (list, tuple)):
        return [str(part) for part in given]
    raise UserError(f"image={given!r} must be a file, a comma-separated list or a folder.")


def _exists(test: Callable[[], bool]) -> bool:
    """The result of a path test; false for strings that can't be a path, such as a name that is too long."""
    try:
        return test()
    except (OSError, ValueError):
        return False
