"""A model of a step's latency on an NPU, from shapes and the figures of `Calibration`. Floats only, no torch.

A graph's operators run one after the other. Each takes the longer of moving its bytes and computing its products, both
at the rates that devices were seen to reach, and a time of its own; all-reduces add a latency for each further rank.
Attention moves its keys and values with the cores that CANN's tiling gives it (plan/cores.py).

Never compared with this project on an NPU. The published times that it is fitted to are those of another model on
another device, given in conf/hardware/910b.yaml; tests/test_latency.py holds the model to them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from mllama_graph.core.hardware import Calibration, HardwareChoice
from mllama_graph.model.formats import DYNAMIC, FLOAT, Storage
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cores import BSH, FORMS, SPLIT, TND, Attention, Form, Forms, choices, cores_of, forced, parts
from mllama_graph.plan.cost import vision_rows
from mllama_graph.plan.products import Product, products, scaled
from mllama_graph.plan.step_latency import Latency

# Rows that the matrix unit computes at once.
TILE_ROWS = 16
# Model.form: for each attention, the form that takes least; or the fastest without TND, which CANN below 9 lacks.
BEST, BEST_WITHOUT_TND = "BEST", "BEST_WITHOUT_TND"
# Operators of each attention in SPLIT that repeat the queries and merge the parts: see ops/npu_parts.py.
MERGE = 8
# Operators of a text graph outside of its layers, and of a prompt's image masks; those of a vision graph. They move few
# bytes. All but those of VISION_ONCE are counted in ascend/golden.json, without the search for candidates.
ONCE, IMAGE_MASKS, VISION_ONCE = 9, 3, 30
# Elementwise operators of the gates of a cross-attention layer, and of a global vision layer.
CROSS_GATES, VISION_GATES = 6, 4


@dataclass(frozen=True)
class Model:
    """What a step's latency depends on beside its sizes.

    form: of attention to pages in a decode step, one of plan/cores.py, which is then taken wherever it can be, BEST or
    BEST_WITHOUT_TND. shared_scales: whether ranks agree on the scales of int8 activations, as ops/npu_quantised.py
    does. added: operators that each self-attention layer has beside mllama's. vision_head: the width to which heads of
    the vision tower are padded; None for their own.
    """

    shape: ModelShape
    storage: Storage
    ranks: int
    hardware: HardwareChoice
    form: str = BSH
    shared_scales: bool = True
    added: tuple[str, ...] = ()
    vision_head: int | None = None

    @property
    def known(self) -> Calibration:
        return self.hardware.calibration

    @property
    def bandwidth(self) -> float:
        return self.hardware.memory_bytes_per_second * self.known.memory

    @property
    def flops(self) -> float:
        return self.hardware.flops * self.known.products

    def vector(self, to: Latency, name: str, elements: float = 0.0, count: int = 1) -> None:
        """Add operators without products, each of which moves `elements`."""
        own = self.known.operators.get(name, self.known.operator)
        moved = elements * self.storage.compute / self.known.vector_bytes_per_second
        to.vector += count * (max(own, moved) + self.known.launch)
        to.operators[name] += count

    def product(self, to: Latency, of: Product, rows: int) -> None:
        """Add a linear layer of `rows` rows, and what quantises and sums its rows."""
        tiles = -(-rows // TILE_ROWS) * TILE_ROWS
        int8 = of.form is not None and of.form.activations != FLOAT
        rate = self.flops * (self.known.int8_products if int8 else 1)
        inside = max(of.bytes / self.bandwidth, 2 * tiles * of.elements / rate)
        to.products += inside + self.known.matmul + self.known.launch
        to.operators["MatMul"] += 1
        # Where a norm comes before, it quantises (AddRmsNormDynamicQuant).
        if of.form is not None and of.form.activations == DYNAMIC and of.path.endswith((".o", ".down", ".fc2")):
            inputs = rows * self._inputs(of)
            self.vector(to, "DynamicQuant", inputs)
            if self.ranks > 1 and self.shared_scales:
                self.all_reduce(to, 4 * rows)
                for name in ("ClipByValueV2", "Cast", "Quantize"):
                    self.vector(to, name, 2 * inputs if name != "ClipByValueV2" else 0)
        if of.split and self.ranks > 1:
            width = self.shape.vision.width if of.path.startswith("vision.") else self.shape.text.width
            self.all_reduce(to, rows * width * self.storage.compute)

    def _inputs(self, of: Product) -> float:
        width = self.shape.vision.width if of.path.startswith("vision.") else self.shape.text.width
        return of.elements / width

    def all_reduce(self, to: Latency, size: float) -> None:
        """Add an all-reduce of `size` bytes: each of n ranks sends 2 (n - 1) / n of them over n - 1 links at once."""
        links = self.hardware.link_bytes_per_second * self.known.links
        latency = self.known.all_reduce + (self.ranks - 2) * self.known.all_reduce_rank
        to.all_reduces += latency + 2 / self.ranks * size / links
        to.operators["HcomAllReduce"] += 1

    def attend(self, to: Latency, moved: float, flops: float, cores: int) -> None:
        """Add an attention that moves its bytes with `cores` cores, each of which has its share of the bandwidth."""
        inside = max(moved / (self.bandwidth * cores / self.known.cores), flops / self.flops)
        to.attention += inside + self.known.attention + self.known.launch
        to.aicpu += self.known.aicpu
        to.operators["FusedInferAttentionScore"] += 1

    @property
    def int8(self) -> bool:
        """Whether pages hold int8 codes and a scale for each token and head."""
        return self.storage.page < self.storage.compute

    def pages(self, batch: int, keys: float, masked: bool, page: int = 128) -> Attention:
        """A rank's attention of one query row of each of `batch` sequences to `keys` keys each, in pages of `page`."""
        text = self.shape.text
        heads, kv_heads = text.heads // self.ranks, text.kv_heads // self.ranks
        return Attention(batch, 1, heads, kv_heads, round(keys), self.int8, masked, page, text.head_width)

    def write_pages(self, to: Latency, elements: float) -> None:
        """Add the write of as many keys, and as many values, to pages."""
        if self.int8:
            self.vector(to, "DynamicQuant", 1.5 * elements, 2)
            self.vector(to, "ScatterNdUpdate", count=2)
        self.vector(to, "ScatterPaKvCache", 4 * elements * self.storage.page / self.storage.compute)

    def widen(self, to: Latency, elements: float, gathered: bool) -> None:
        """Add the widening of as many int8 keys, and as many values, gathered from pages or not (ops/npu_pages.py)."""
        gathers = (("GatherV2", 1), ("GatherV2", 0), ("Transpose", 0)) if gathered else ()
        # Codes to fp32, scales, and the product to 16 bits.
        for name, moved in (*gathers, ("Cast", 2.5), ("Cast", 0), ("Mul", 4), ("Cast", 3)):
            self.vector(to, name, moved * elements, 2)

    def attend_pages(self, to: Latency, of: Attention, form: str, cores: int) -> None:
        """Add attention to pages in one of the forms of plan/cores.py."""
        width = self.shape.text.head_width
        moved = 2 * of.units * of.keys * width * self.storage.page
        # The rows of a group fill one tile, at most in part.
        rows = max(TILE_ROWS, of.heads // of.kv_heads)
        self.attend(to, moved, 4 * of.units * rows * of.keys * width, cores)
        if form == SPLIT:
            self.vector(to, "merge", count=MERGE)

    def forms(self, of: Attention) -> dict[str, tuple[int, float]]:
        """Cores and seconds of attention to pages in each form that serves it."""
        found = {}
        for form, cores in choices(of, self.known.cores):
            to = Latency()
            self.attend_pages(to, of, form, cores)
            found[form] = cores, to.attention + to.vector
        return found

    def choice(self, of: Attention) -> Form:
        """The form in which attention to pages is computed."""
        if self.form in FORMS:
            return forced(of, self.known.cores, self.form)
        found = {name: seconds for name, (_, seconds) in self.forms(of).items()}
        if self.form == BEST_WITHOUT_TND:
            found.pop(TND, None)
        name = min(found, key=lambda name: found[name])
        return Form(SPLIT, parts(of, self.known.cores, SPLIT)) if name == SPLIT else Form(name)

    @cached_property
    def blocks(self) -> dict[str, list[Product]]:
        """See `products`."""
        return products(self.shape, self.storage, self.ranks)

    # ---- steps

    def decode(self, batch: int, keys: float, image_keys: float, forms: Forms | None = None, each: int = 1) -> Latency:
        """A decode step of `batch` sequences of `keys` text tokens each, and `image_keys` image tokens each.

        forms: of its attention, chosen here if None. each: new tokens of a sequence, which read its pages together.
        """
        to = Latency()
        attend = self._of_tokens(to, batch, keys, image_keys, forms)
        for cross in self._text(to, batch * each, image_keys > 0, batch * each):
            attend(cross)
        return to

    def prefill(self, tokens: int, past: float, image_keys: float, sequences: int = 1) -> Latency:
        """A prefill of `tokens` in all of equally long sequences, each after `past` earlier and `image_keys` image
        tokens."""
        every = self.known.cores
        to = Latency(cores=every, image_cores=every if image_keys else 0)
        attend = self._of_prompts(to, tokens, past, image_keys, sequences)
        for cross in self._text(to, tokens, image_keys > 0, sequences):
            attend(cross)
        return to

    def mixed(
        self,
        batch: int,
        keys: float,
        tokens: int,
        past: float,
        image_keys: float,
        sequences: int = 1,
        forms: Forms | None = None,
    ) -> Latency:
        """A decode step and a prefill in one graph, which share the products: see `decode` and `prefill`."""
        to, rows = Latency(), batch + tokens
        decode = self._of_tokens(to, batch, keys, image_keys, forms)
        prefill = self._of_prompts(to, tokens, past, image_keys, sequences)
        heads = self.shape.text.heads // self.ranks
        for cross in self._text(to, rows, image_keys > 0, batch + sequences):
            decode(cross)
            prefill(cross)
            for name in ("SplitV", "ConcatV2"):
                self.vector(to, name, 2 * rows * heads * self.shape.text.head_width)
        return to

    def _of_tokens(
        self, to: Latency, batch: int, keys: float, image_keys: float, forms: Forms | None
    ) -> Callable[[bool], None]:
        """What adds the attention of a layer's decoding rows, given whether it is a cross-attention layer."""
        text, image = self.pages(batch, keys, False), self.pages(batch, image_keys, True)
        forms = forms or Forms(self.choice(text), self.choice(image) if image_keys else Form())
        to.cores = cores_of(text, self.known.cores, forms.text)
        to.image_cores = cores_of(image, self.known.cores, forms.image) if image_keys else 0

        def attend(cross: bool) -> None:
            of, form, cores = (image, forms.image, to.image_cores) if cross else (text, forms.text, to.cores)
            self.attend_pages(to, of, form.name, cores)

        return attend

    def _of_prompts(
        self, to: Latency, tokens: int, past: float, image_keys: float, sequences: int
    ) -> Callable[[bool], None]:
        """The same for the rows of prompts. Adds what makes their image masks."""
        text, every = self.shape.text, self.known.cores
        heads, kv = text.heads // self.ranks, text.kv_heads // self.ranks * text.head_width
        self.vector(to, "once", count=IMAGE_MASKS if image_keys else 0)

        def attend(cross: bool) -> None:
            # The mask is causal: on average, a new token sees half of the new tokens. Each head reads an image mask.
            seen = image_keys if cross else past + tokens / sequences / 2
            length = sequences * image_keys if cross else sequences * past + tokens
            mask = heads * tokens * image_keys if cross else 0
            moved = 2 * length * kv * (self.storage.compute if self.int8 else self.storage.page) + mask
            if self.int8:
                self.widen(to, length * kv, cross or past > 0)
            if sequences > 1:
                # Rows are gathered by sequence, each padded to all rows, and back (ops/npu.py, by_rows).
                for rows in (sequences * tokens, tokens):
                    self.vector(to, "GatherV2", 2 * rows * heads * text.head_width)
            self.attend(to, moved, 4 * tokens * seen * heads * text.head_width, every)

        return attend

    def vision(self, tiles: int = 0) -> Latency:
        """The vision graph: one image with all its tiles, of which `tiles` are not padding; 0: all of them."""
        vision, text, every = self.shape.vision, self.shape.text, self.known.cores
        rows, tokens, E = vision_rows(vision), vision.max_tiles * vision.tokens, vision.width
        # q, k, v and o have the width of padded heads.
        wider = (self.vision_head or E // vision.heads) * vision.heads / E
        to, local = Latency(step=self.known.step, image_cores=every), wider * E / self.ranks
        pixels = vision.channels * vision.patch**2
        self.product(to, Product("vision.patch", pixels * E * self.storage.weight, pixels * E, None, False), tokens)
        for leaf in (leaf for block in self.blocks.values() for leaf in block):
            if leaf.path.startswith("vision."):
                padded = wider if leaf.path.endswith((".qkv", ".o")) else 1
                self.product(to, scaled(leaf, padded), rows)
            elif leaf.path == "projector" or leaf.path.endswith(".kv"):
                self.product(to, leaf, tokens)
        self.vector(to, "Add", 3 * rows * E, VISION_ONCE)
        for layer in range(vision.layers + vision.global_layers):
            self.vector(to, "LayerNormV4", 2 * rows * E, 2)
            self.vector(to, "Add", 3 * rows * E, 3)
            self.vector(to, "SplitV", 6 * rows * local)
            self.vector(to, "GeluV2", 2 * rows * vision.mlp / self.ranks)
            if layer >= vision.layers:
                self.vector(to, "Mul", 0, VISION_GATES)
            self._tiles(to, rows, (tiles or vision.max_tiles) * vision.tokens, local)
        kv = text.kv_heads // self.ranks * text.head_width
        for _ in text.cross_layers:
            self.vector(to, "SplitV", 4 * tokens * kv)
            self.vector(to, "RmsNorm", 2 * tokens * kv)
            self.write_pages(to, tokens * kv)
        return to

    def _tiles(self, to: Latency, rows: int, real: int, width: float) -> None:
        """Add a layer's attention among the rows of an image: `real` rows to all rows, padding to the `real` rows.

        width: of a rank's heads.
        """
        for queries, keys in ((real, rows), (rows - real, real)):
            if queries:
                moved = 2 * (queries + keys) * width * self.storage.compute
                self.attend(to, moved, 4 * queries * keys * width, self.known.cores)
        if rows > real:
            self.vector(to, "SplitV", 2 * rows * width)
            self.vector(to, "ConcatV2", 2 * rows * width)

    def _text(self, to: Latency, rows: int, images: bool, rows_of_logits: int) -> Iterator[bool]:
        """Add a text step without attention; yields whether each layer is a cross-attention layer."""
        text, D = self.shape.text, self.shape.text.width
        to.step = self.known.step
        q, kv = (heads // self.ranks * text.head_width for heads in (text.heads, text.kv_heads))
        mlp = text.mlp // self.ranks
        self.vector(to, "once", count=ONCE)
        if self.ranks > 1:
            self.all_reduce(to, rows * D * self.storage.compute)
        for layer in range(text.layers):
            cross = layer in text.cross_layers
            if cross and not images:
                continue
            for leaf in self.blocks[f"text.layers.{layer}"]:
                if not leaf.path.endswith(".kv"):
                    self.product(to, leaf, rows)
            self.vector(to, "AddRmsNorm", 4 * rows * D, 2)
            self.vector(to, "SwiGlu", 3 * rows * mlp)
            if cross:
                self.vector(to, "RmsNorm", 2 * rows * q)
                self.vector(to, "Mul", rows * D, CROSS_GATES)
            else:
                self.vector(to, "SplitV", 2 * rows * (q + 2 * kv))
                self.vector(to, "RotaryMul", rows * (q + kv), 2)
                self.write_pages(to, rows * kv)
                for name in self.added:
                    self.vector(to, name, 2 * rows * q)
            yield cross
        self.vector(to, "RmsNorm", 2 * rows_of_logits * D)
        head = next(leaf for leaf in self.blocks["text"] if leaf.path == "text.head")
        self.product(to, head, rows_of_logits)


def latency_of(model: Model, page_size: int, bucket: Bucket, forms: Forms | None = None) -> Latency:
    """The latency of a full bucket: every page is read. forms: see `Model.decode`."""
    keys, image_keys = bucket.pages * page_size, bucket.image_pages * page_size
    if bucket.phase == "vision":
        return model.vision(bucket.tiles)
    prompts = bucket.prompts or bucket
    past = max(0.0, prompts.pages * page_size - prompts.tokens / prompts.rows)
    if bucket.phase == "prefill":
        return model.prefill(bucket.tokens, past, image_keys, bucket.rows)
    if bucket.prompts:
        return model.mixed(bucket.rows, keys, prompts.tokens, past, image_keys, prompts.rows, forms)
    return model.decode(bucket.rows, keys, image_keys, forms, bucket.each)
