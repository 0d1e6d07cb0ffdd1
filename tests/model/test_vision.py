"""The vision tower and the image pages against the corrected Hugging Face model."""

import numpy as np
import pytest
import torch
from checkpoints import SPECS
from PIL import Image
from request_cases import random_image
from torch.testing import assert_close

from mllama_graph.inputs.images import tile_image
from mllama_graph.model.inputs import TileInput
from mllama_graph.model.vision import encode, encode_image
from mllama_graph.ops.plain import PLAIN

# fp32 through up to eight layers, features of order ten, against the same sums in another order.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
# (width, height): one tile, a row of tiles, a column of tiles, and an image that fills the largest canvas.
SIZES = [(50, 50), (400, 60), (60, 400), (200, 190)]


def picture(size) -> Image.Image:
    return random_image(*size, "RGB", np.random.default_rng(sum(size)))


def tile_input(image, shape, slot_S=None) -> TileInput:
    """An image's tiles as a graph's input; padding tiles are filled with 255 to show that they have no effect."""
    tiles, vision = tile_image(image, shape.vision), shape.vision
    data = torch.full((vision.max_tiles, 3, vision.tile, vision.tile), 255, dtype=torch.uint8)
    data[: tiles.count] = torch.from_numpy(tiles.data)
    return TileInput(
        data, torch.tensor([tiles.aspect], dtype=torch.int32), torch.tensor([tiles.count], dtype=torch.int32), slot_S
    )


def theirs(oracle, image):
    """HF's inputs, and the features (tiles * tokens, width) of the corrected tower."""
    inputs = oracle.images(images=[[image]], return_tensors="pt")
    with torch.inference_mode():
        tower = oracle.model.model.vision_model
        out = tower(inputs["pixel_values"], inputs["aspect_ratio_ids"], inputs["aspect_ratio_mask"])
    return inputs, out.last_hidden_state.flatten(0, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPECS)
def test_features_are_those_of_the_corrected_tower(name, size, model, oracle):
    given = tile_input(picture(size), model(name).shape)
    ours = encode(model(name).weights.vision, given, torch.float32, model(name).shape, PLAIN)
    assert_close(ours, theirs(oracle(name), picture(size))[1], **CLOSE)


@pytest.mark.parametrize("size", SIZES)
def test_normalised_tiles_are_hugging_faces_pixels_and_padding_is_zero(size, model, oracle):
    given = tile_input(picture(size), model("base").shape)
    w = model("base").weights.vision
    ours = PLAIN.normalise(given.tiles_C3hw, given.real_1, w.pixel_scale, w.pixel_mean, w.pixel_std, torch.float32)
    # One rounding of (x * scale - mean) / std in fp32.
    assert_close(ours, theirs(oracle("base"), picture(size))[0]["pixel_values"][0, 0], atol=1e-6, rtol=0)
    assert not ours[int(given.real_1) :].any()


@pytest.mark.parametrize("name", ["base", "cross_first", "adjacent"])
def test_pages_hold_the_keys_and_values_that_hugging_face_would_compute(name, model, oracle):
    shape, image = model(name).shape, picture(SIZES[3])
    tokens, page_size = shape.vision.max_tiles * shape.vision.tokens, 16
    pages = model(name).pages(tokens // page_size + 5, page_size, len(shape.text.cross_layers))
    slot_S = torch.randperm(pages[0][0].shape[0] * page_size, generator=torch.Generator().manual_seed(0))[:tokens]
    encode_image(model(name).weights, tile_input(image, shape, slot_S.int()), pages, shape, torch.float32, PLAIN)
    with torch.inference_mode():
        states = oracle(name).model.model.multi_modal_projector(theirs(oracle(name), image)[1])
    for (k, v), index in zip(pages, shape.text.cross_layers, strict=True):
        attention = oracle(name).model.model.language_model.layers[index].cross_attn
        heads = (tokens, shape.text.kv_heads, shape.text.head_width)
        with torch.inference_mode():
            wanted = attention.k_norm(attention.k_proj(states).view(heads)), attention.v_proj(states).view(heads)
        for data, rows in zip((k, v), wanted):
            flat = data.view(-1, *heads[1:])
            assert_close(flat[slot_S], rows, **CLOSE)
            untouched = torch.ones(len(flat), dtype=torch.bool)
            untouched[slot_S] = False
            assert not flat[untouched].any()


def test_every_gate_and_embedding_affects_the_features(model):
    """The tests above could not detect an error in a weight without effect on the features."""
    shape, vision = model("base").shape, model("base").weights.vision
    given = tile_input(picture(SIZES[1]), shape)
    whole = encode(vision, given, torch.float32, shape, PLAIN)
    for name in (
        "pre_tile",
        "post_tile",
        "position",
        "tile_position",
        "class_token",
        "pre_tile_gate",
        "post_tile_gate",
        "position_gate",
        "patch",
    ):
        weight = getattr(vision, name)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            without = encode(vision, given, torch.float32, shape, PLAIN)
            weight.copy_(kept)
        assert (without - whole).abs().max() > 0.01, name
