"""The language model, on pages that the tests manage themselves, against the corrected Hugging Face model."""

import numpy as np
import pytest
import torch
from checkpoints import SPECS
from request_cases import random_image
from torch.testing import assert_close
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from mllama_graph.inputs.images import tile_image
from mllama_graph.model.inputs import ImageInput, PromptInput, TileInput, TokenInput
from mllama_graph.model.text import cross_block, decode, prefill, to_images
from mllama_graph.model.vision import encode_image
from mllama_graph.ops.plain import PLAIN
from mllama_graph.plan.blocks import pages_for

# fp32 through up to eight layers, logits of order ten, the same sums in another order.
CLOSE = {"atol": 5e-4, "rtol": 1e-4}
PAGE = 8


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


class Text:
    """One sequence with pages scattered over a pool, encoded images, and the visibility of images by HF's own rule."""

    def __init__(self, model, ids, images=(), seed=0):
        self.model, self.ids = model, list(ids)
        shape = model.shape
        generator = torch.Generator().manual_seed(seed)
        self.table = (1 + torch.randperm(40, generator=generator)).tolist()
        self.pages = model.pages(41, PAGE, len(shape.text.self_layers))
        self.image_table, self.fill, self.begins = [], [], [0]
        per_image = pages_for(shape.vision.max_tiles * shape.vision.tokens, PAGE)
        self.image_pages = model.pages(1 + per_image * max(len(images), 1), PAGE, len(shape.text.cross_layers))
        order = (1 + torch.randperm(per_image * max(len(images), 1), generator=generator)).tolist()
        for n, image in enumerate(images):
            self._encode(image, order[n * per_image : (n + 1) * per_image])
        spans = get_cross_attention_token_mask(self.ids, shape.image_token)
        seen = [[n for n, (a, b) in enumerate(spans) if a <= at and (b == -1 or at < b)] for at in range(len(self.ids))]
        self.see = [(self.begins[s[0]], self.begins[s[-1] + 1]) if s else (0, 0) for s in seen]

    def _encode(self, image, pages):
        vision = self.model.shape.vision
        tiles = tile_image(image, vision)
        data = torch.zeros((vision.max_tiles, 3, vision.tile, vision.tile), dtype=torch.uint8)
        data[: tiles.count] = torch.from_numpy(tiles.data)
        slots = [pages[t // PAGE] * PAGE + t % PAGE for t in range(vision.max_tiles * vision.tokens)]
        given = TileInput(data, int32([tiles.aspect]), int32([tiles.count]), int32(slots))
        encode_image(self.model.weights, given, self.image_pages, self.model.shape, torch.float32, PLAIN)
        tokens = tiles.count * vision.tokens
        self.image_table += pages[: pages_for(tokens, PAGE)]
        self.fill += [min(PAGE, tokens - at) for at in range(0, tokens, PAGE)]
        self.begins.append(len(self.fill))

    def slot(self, position):
        return self.table[position // PAGE] * PAGE + position % PAGE

    def image(self, see, lean=False):
        return None if lean else ImageInput(int32([self.image_table or [0]]), int32([self.fill or [0]]), int32(see))

    @torch.inference_mode()
    def prefill(self, start=0, stop=None, padding=0, lean=False):
        """Logits after token stop - 1. Tokens before `start` are read from pages; `padding` rows write to page 0."""
        stop = len(self.ids) if stop is None else stop
        positions = range(start, stop)
        given = PromptInput(
            int32(self.ids[start:stop] + [5] * padding),
            int32([*positions] + [0] * padding),
            int32([self.slot(p) for p in positions] + [*range(padding)]),
            int32([stop - start - 1]),
            int32([stop - start]),
            int32([1]),
            int32([0]),
            int32([stop - start]),
            int32([start]),
            int32([self.table[: pages_for(stop, PAGE)]]) if start else None,
            self.image(self.see[start:stop] + [(0, 0)] * padding, lean),
        )
        return self._run(prefill, given)[0]

    @torch.inference_mode()
    def decode(self, start, count=1, lean=False):
        """Logits after each of `count` tokens from `start`."""
        positions = range(start, start + count)
        given = TokenInput(
            int32(self.ids[start : start + count]),
            int32([*positions]),
            int32([self.slot(p) for p in positions]),
            int32([count]),
            int32([self.table[: pages_for(start + count, PAGE) + 1]]),
            int32([start + count]),
            self.image(self.see[start : start + count], lean),
        )
        return self._run(decode, given)

    def _run(self, function, given):
        weights, shape = self.model.weights.text, self.model.shape
        image_pages = self.image_pages if given.image else ()
        return function(weights, given, self.pages, image_pages, shape, torch.float32, PLAIN)


def prompt(name, length=30, places=(3, 4, 15)):
    """Ids with text before, between and after the images, and the images: two adjacent ones and a single one."""
    spec, rng = SPECS[name], np.random.default_rng(1)
    ids = rng.integers(0, spec.text_vocab, length).tolist()
    for place in places:
        ids[place] = spec.vocab
    return ids, [random_image(w, h, "RGB", rng) for w, h in ((90, 60), (200, 50), (40, 40))[: len(places)]]


@pytest.mark.parametrize("name", SPECS)
def test_prefill_gives_the_oracles_logits_at_every_place(name, model, oracle):
    ids, images = prompt(name)
    wanted = oracle(name).logits(ids, images)
    for stop in (1, 3, 4, 5, 16, 30):
        text = Text(model(name), ids, images)
        assert_close(text.prefill(stop=stop), wanted[stop - 1], **CLOSE)


@pytest.mark.parametrize("name", SPECS)
def test_decode_through_pages_equals_one_long_prompt(name, model, oracle):
    ids, images = prompt(name)
    wanted = oracle(name).logits(ids, images)
    text = Text(model(name), ids, images)
    text.prefill(stop=2)
    for at in range(2, 30):
        assert_close(text.decode(at)[0], wanted[at], **CLOSE)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_decoding_several_tokens_at_once_equals_one_by_one(count, model, oracle):
    ids, images = prompt("base")
    wanted = oracle("base").logits(ids, images)
    text = Text(model("base"), ids, images)
    text.prefill(stop=2)
    for at in range(2, 30 - count + 1, count):
        assert_close(text.decode(at, count), wanted[at : at + count], **CLOSE)


@pytest.mark.parametrize("cuts", [(8, 16), (4, 5, 16, 29), (1, 2, 3, 4), (7, 14, 21, 28)])
@pytest.mark.parametrize("name", ["base", "cross_first", "wide"])
def test_chunked_prefill_equals_one_prefill(name, cuts, model):
    ids, images = prompt(name)
    whole, parts = Text(model(name), ids, images), Text(model(name), ids, images, seed=3)
    wanted = whole.prefill()
    for start, stop in zip((0, *cuts), (*cuts, 30)):
        last = parts.prefill(start, stop, padding=stop % 3)
    assert_close(last, wanted, **CLOSE)


def test_tokens_that_were_rolled_back_leave_no_trace(model):
    ids, images = prompt("base")
    text = Text(model("base"), ids, images)
    text.prefill(stop=20)
    wanted = text.decode(20, 1)
    right, text.ids = text.ids, [7] * len(ids)
    text.decode(20, 5)
    text.ids = right
    assert_close(text.decode(20, 1), wanted, **CLOSE)


def test_padded_rows_write_to_scratch_alone_and_change_nothing(model):
    ids, images = prompt("base")
    plain, padded = Text(model("base"), ids, images), Text(model("base"), ids, images)
    assert_close(padded.prefill(padding=PAGE), plain.prefill(), **CLOSE)
    for ours, theirs in zip(padded.pages, plain.pages):
        for data, other in zip(ours, theirs):
            assert data[0].any() and not other[0].any()
            assert_close(data[1:], other[1:], atol=1e-5, rtol=1e-5)


def test_text_row_is_untouched_by_a_cross_layer(model):
    ids, images = prompt("base")
    text, shape = Text(model("base"), ids, images), model("base").shape
    image = text.image(text.see)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn((len(ids), shape.text.width), generator=generator) for _ in range(2))
    blind = torch.tensor([low == high for low, high in text.see])
    assert 0 < blind.sum() < len(ids)
    for pages, index in zip(text.image_pages, shape.text.cross_layers):
        layer = model("base").weights.text.layers[index]
        with torch.inference_mode():
            after_x, after_y = cross_block(
                layer, x, y, pages, image.see_T2, to_images(image, None, PLAIN), shape, PLAIN
            )
        # Bit for bit: a text-only request must not depend on the batch it is in.
        assert torch.equal((after_x + after_y)[blind], (x + y)[blind])
        assert ((after_x + after_y)[~blind] - (x + y)[~blind]).abs().amax(-1).min() > 0.01


def test_a_text_row_takes_nothing_from_a_broken_image(model):
    ids, images = prompt("base")
    text, shape = Text(model("base"), ids, images), model("base").shape
    for data in text.image_pages[0]:
        data.fill_(1e30)
    image = text.image(text.see)
    x = torch.randn((len(ids), shape.text.width), generator=torch.Generator().manual_seed(0))
    layer = model("base").weights.text.layers[shape.text.cross_layers[0]]
    with torch.inference_mode():
        attend_image = to_images(image, None, PLAIN)
        after_x, after_y = cross_block(layer, x, None, text.image_pages[0], image.see_T2, attend_image, shape, PLAIN)
    blind = torch.tensor([low == high for low, high in text.see])
    assert torch.equal((after_x + after_y)[blind], x[blind])


@pytest.mark.parametrize("name", SPECS)
def test_lean_graph_equals_the_full_graph_on_text(name, model):
    ids, _ = prompt(name, places=())
    lean, full = Text(model(name), ids), Text(model(name), ids)
    assert torch.equal(lean.prefill(stop=20, lean=True), full.prefill(stop=20))
    for at in range(20, 24):
        assert torch.equal(lean.decode(at, lean=True), full.decode(at))


def test_logits_of_text_alone_are_hugging_faces(model, oracle):
    ids, _ = prompt("base", places=())
    assert_close(Text(model("base"), ids).prefill(lean=True), oracle("base").logits(ids, [])[-1], **CLOSE)
