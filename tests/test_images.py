"""Tiles against transformers' MllamaImageProcessorPil."""

import numpy as np
import pytest
from checkpoints import SPECS, image_config, model_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import data_uri, open_image
from PIL import Image
from request_cases import IMAGES, random_image, write_images
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from mllama_graph.inputs.images import prepare_images, tile_image
from mllama_graph.model.shape import shape_of

# fp32 roundings of (x * scale - mean) / std.
PIXEL = 1e-6


def compare(image, spec):
    """Check that our tiles, their number and the aspect-ratio id of an image equal HF's."""
    config = image_config(spec)
    theirs = MllamaImageProcessorPil(**config)(images=[[image]], return_tensors="np")
    tiles = tile_image(image_rgb(image), shape_of(model_config(spec)).vision)
    mean, std = (np.float32(config[key])[:, None, None] for key in ("image_mean", "image_std"))
    ours = (tiles.data.astype(np.float32) * np.float32(config["rescale_factor"]) - mean) / std
    assert tiles.data.dtype == np.uint8
    assert tiles.count == theirs["num_tiles"][0][0]
    assert tiles.aspect == theirs["aspect_ratio_ids"][0, 0]
    assert np.abs(ours - theirs["pixel_values"][0, 0, : tiles.count]).max() <= PIXEL


def image_rgb(image):
    """The image after encoding to a data URI and reading it back."""
    return open_image(data_uri(image))


SIDES = st.one_of(st.integers(1, 40), st.integers(1, 400), st.sampled_from([32, 56, 57, 64, 112, 168, 224, 1000]))


@pytest.mark.parametrize("name", ["base", "cross_first", "cross_last", "adjacent"])
@given(width=SIDES, height=SIDES)
@settings(max_examples=40)
def test_tiles_are_hugging_faces_at_every_size(name, width, height):
    compare(random_image(width, height, "RGB", np.random.default_rng(width + height)), SPECS[name])


@pytest.mark.parametrize(
    "size", [(3000, 500), (500, 3000), (1, 1), (1000, 3), (3, 1000), (2000, 1), (560, 560), (561, 559)]
)
@pytest.mark.parametrize("name", ["base", "wide"])
def test_tiles_are_hugging_faces_at_extreme_sizes(name, size):
    compare(random_image(*size, "RGB", np.random.default_rng(0)), SPECS[name])


@pytest.mark.parametrize("name", IMAGES)
def test_files_of_every_mode_are_hugging_faces(name, tmp_path):
    path = write_images(tmp_path, np.random.default_rng(1))[name]
    theirs = MllamaImageProcessorPil(**image_config(SPECS["base"]))(images=[[Image.open(path)]], return_tensors="np")
    tiles = tile_image(open_image(path), shape_of(model_config(SPECS["base"])).vision)
    mean, std = (np.float32(image_config(SPECS["base"])[key])[:, None, None] for key in ("image_mean", "image_std"))
    ours = (tiles.data.astype(np.float32) / 255 - mean) / std
    assert np.abs(ours - theirs["pixel_values"][0, 0, : tiles.count]).max() <= PIXEL


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_a_data_uri_gives_the_same_pixels_as_its_file(form, tmp_path):
    image = random_image(30, 20, "RGB", np.random.default_rng(0))
    image.save(tmp_path / f"a.{form}")
    assert open_image(str(tmp_path / f"a.{form}")).tobytes() == open_image(data_uri(image, form)).tobytes()


def test_exif_orientation_is_applied(tmp_path):
    image = random_image(30, 20, "RGB", np.random.default_rng(0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    assert open_image(str(tmp_path / "a.png")).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_the_key_depends_on_the_image_and_not_on_its_source(tmp_path):
    vision = shape_of(model_config(SPECS["base"])).vision
    first, second = (random_image(70, 50, "RGB", np.random.default_rng(n)) for n in range(2))
    first.save(tmp_path / "a.png")
    key = tile_image(open_image(str(tmp_path / "a.png")), vision).key
    assert key == tile_image(open_image(data_uri(first)), vision).key
    assert key != tile_image(second, vision).key
    # Two black images with equal bytes and different aspect ratios.
    black = [tile_image(Image.new("RGB", size), vision) for size in ((112, 56), (56, 112))]
    assert black[0].data.tobytes() == black[1].data.tobytes() and black[0].key != black[1].key


def test_the_pictures_of_a_request_are_tiled_in_their_order(tmp_path):
    vision = shape_of(model_config(SPECS["base"])).vision
    images = [random_image(70, 50, "RGB", np.random.default_rng(n)) for n in range(3)]
    images[0].save(tmp_path / "beside.png")
    tiled = prepare_images(["beside.png", data_uri(images[1]), images[2]], tmp_path, vision)
    assert [image.key for image in tiled] == [tile_image(image, vision).key for image in images]
