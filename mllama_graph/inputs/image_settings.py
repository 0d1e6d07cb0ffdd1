"""The settings of a checkpoint's image processor: how its pictures are tiled and normalised. No torch."""

from dataclasses import dataclass
from pathlib import Path

from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import Fields
from mllama_graph.model.shape import ModelShape, square_side

# CLIP's normalisation, which every released checkpoint uses (llama_models image_transform.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What transformers takes where the file has no mean or deviation (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD).
HALF = (0.5, 0.5, 0.5)
CHANNELS = 3
BILINEAR = 2


@dataclass(frozen=True)
class ImageSettings:
    """Normalisation of uint8 pixels per channel: (x * scale - mean) / std. `note`: what the user should know, or ""."""

    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    note: str = ""


def read_image_settings(folder: Path, processor_config: Fields, shape: ModelShape) -> ImageSettings:
    """Read the image processor's part of processor_config.json, or else preprocessor_config.json, as transformers does.

    Raises UserError for settings that the engine can't follow, and for tiles that are not those of config.json.
    """
    given, path = processor_config.within("image_processor"), folder / "preprocessor_config.json"
    if not processor_config.has("image_processor"):
        if not path.is_file():
            return ImageSettings(note=f"{path} is missing: pictures are normalised with CLIP's mean and deviation.")
        given = Fields.of(path)
    for name in ("do_resize", "do_pad"):
        if not given.flag(name, True):
            raise given.fault(name, "true: mllama's tiles need it, and transformers refuses it too")
    if given.values.get("resample", BILINEAR) != BILINEAR:
        raise given.fault("resample", f"{BILINEAR}: the engine resizes bilinearly, as mllama does")
    tile = _tile(given, shape.vision.tile)
    tiles = given.integer("max_image_tiles", shape.vision.max_tiles, least=1)
    if (tile, tiles) != (shape.vision.tile, shape.vision.max_tiles):
        raise UserError(
            f"{given.where} cuts up to {tiles} tiles of {tile} px, config.json says "
            f"{shape.vision.max_tiles} of {shape.vision.tile} px. The two files belong to different models."
        )
    scale = given.number("rescale_factor", 1 / 255) if given.flag("do_rescale", True) else 1.0
    if not given.flag("do_normalize", True):
        return ImageSettings(scale, (0.0,) * CHANNELS, (1.0,) * CHANNELS)
    mean, std = (given.numbers(name, CHANNELS, HALF) for name in ("image_mean", "image_std"))
    if not all(std):
        raise given.fault("image_std", "other than 0: pixels are divided by it")
    missing = " and no ".join(name for name in ("image_mean", "image_std") if name not in given.values)
    note = f"{given.where} gives no {missing}: 0.5 is used, as in transformers." if missing else ""
    return ImageSettings(scale, mean, std, note)


def _tile(given: Fields, default: int) -> int:
    """The side of a tile in pixels. `size` is a number, [height, width], or {"height": ..., "width": ...}."""
    size = given.values.get("size")
    if not isinstance(size, dict):
        return square_side(given, "size", default)
    named = {name: side for name, side in size.items() if side is not None}
    if set(named) != {"height", "width"} or size["height"] != size["width"]:
        raise given.fault("size", "one number, or height and width that are equal, since mllama's tiles are square")
    return given.within("size").integer("height", default, least=1)
