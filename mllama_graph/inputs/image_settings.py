"""The settings of a checkpoint's image processor: how its pictures are tiled and normalised. No torch."""

from dataclasses import dataclass
from pathlib import Path

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.settings import Settings
from mllama_graph.model.shape import ModelShape

# CLIP's normalisation, which every released checkpoint uses (llama_models image_transform.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What transformers takes where the file has no mean or deviation (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD).
HALF = (0.5, 0.5, 0.5)
CHANNELS = 3
BILINEAR = 2
FILTERS = {0: "nearest", 1: "lanczos", BILINEAR: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class ImageSettings:
    """Normalisation of uint8 pixels per channel: (x * scale - mean) / std. `note`: what the user should know, or ""."""

    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    note: str = ""


def read_image_settings(folder: Path, processor_config: Settings, shape: ModelShape) -> ImageSettings:
    """Read the image processor's part of processor_config.json, or else preprocessor_config.json, as transformers does.

    Raises UserError for settings that the engine can't follow, and for tiles that are not those of config.json.
    """
    settings = processor_config.object("image_processor") or Settings(folder / "preprocessor_config.json")
    if not settings.found:
        return ImageSettings(
            note=f"{settings.path} is missing: pictures are normalised with CLIP's mean and deviation."
        )
    for name in ("do_resize", "do_pad"):
        if not _flag(settings, name):
            raise settings.wrong(name, "must be true: mllama's tiles need it, and transformers refuses it too")
    resample = settings.value("resample")
    if resample is not None and (type(resample) is not int or resample not in FILTERS):
        raise settings.wrong("resample", f"must be one of Pillow's filters, 0 to {max(FILTERS)}")
    if resample not in (None, BILINEAR):
        raise settings.wrong(
            "resample", f"({FILTERS[resample]}) must be 2: the engine resizes bilinearly, as mllama does"
        )
    tile = _tile(settings, shape.vision.tile)
    tiles = settings.count("max_image_tiles", shape.vision.max_tiles)
    if (tile, tiles) != (shape.vision.tile, shape.vision.max_tiles):
        raise UserError(
            f"{settings.path.name} cuts up to {tiles} tiles of {tile} px, config.json says "
            f"{shape.vision.max_tiles} of {shape.vision.tile} px. The two files belong to different models."
        )
    normalised, rescaled = _flag(settings, "do_normalize"), _flag(settings, "do_rescale")
    needed = ("image_mean", "image_std") * normalised + ("rescale_factor",) * rescaled
    for name in needed:
        if name in settings and settings.value(name) is None:
            raise settings.wrong(name, "must be a number, as transformers asks too; remove the field for its default")
    mean, std = (settings.vector(name, CHANNELS, HALF) for name in ("image_mean", "image_std"))
    if not all(std):
        raise settings.wrong("image_std", "must not be 0: pixels are divided by it")
    scale = settings.number("rescale_factor", 1 / 255)
    missing = [name for name in needed[:2] if normalised and name not in settings]
    return ImageSettings(
        scale if rescaled else 1.0,
        mean if normalised else (0.0,) * CHANNELS,
        std if normalised else (1.0,) * CHANNELS,
        f"{settings.path} gives no {' and no '.join(missing)}: 0.5 is used, as in transformers." if missing else "",
    )


def _flag(settings: Settings, name: str) -> bool:
    """A step of the image processor: on where the field is absent, and off where it is null, as in transformers."""
    return settings.flag(name, name not in settings)


def _tile(settings: Settings, default: int) -> int:
    """The side of a tile in pixels. `size` is a number, [height, width], or {"height": ..., "width": ...}."""
    size = settings.value("size")
    if isinstance(size, dict):
        inner = settings.object("size")
        assert inner is not None
        given = {name for name in size if inner.value(name) is not None}
        if given != {"height", "width"}:
            names = ", ".join(sorted(map(str, given)))[:80] or "nothing"
            raise settings.wrong("size", f"gives {names}, but must give height and width: mllama's tiles are square")
        sides = [inner.count(name, default) for name in ("height", "width")]
    elif isinstance(size, list):
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise settings.wrong("size", "must be a number of pixels, or an object with height and width")
        sides = size
    else:
        sides = [settings.count("size", default)]
    if len(set(sides)) != 1:
        raise settings.wrong("size", f"gives {sides[0]} x {sides[1]} px, but mllama's tiles are square")
    return sides[0]
