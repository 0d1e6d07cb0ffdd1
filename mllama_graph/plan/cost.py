"""Bytes and floating-point operations of a step from shapes alone: the floors that measurements are compared with."""

from dataclasses import asdict, dataclass
from functools import lru_cache

from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.model.formats import Storage, stored_bytes
from mllama_graph.model.shape import ROW_MULTIPLE, ModelShape, VisionShape
from mllama_graph.plan.bucket import Bucket

GB = 1e9
# Floating-point operations that take as long as moving one byte on a CPU with few cores. Only orders buckets by cost.
FLOPS_PER_BYTE = 6


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's parts. `cross_layers` leaves out the K/V projections, which only the vision graph reads."""

    self_layers: int = 0
    cross_layers: int = 0
    head: int = 0
    embedding: int = 0
    cross_kv: int = 0
    vision: int = 0
    projector: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


# Storage of one byte an element, so that bytes are elements; and of an unquantised model in fp32.
ELEMENTS, FP32 = Storage(1, 1, 1), Storage(4, 4, 4)


@lru_cache
def sizes(shape: ModelShape, storage: Storage = ELEMENTS) -> Sizes:
    """The bytes of each part of a model; by default, its parameters."""
    parts = dict.fromkeys(asdict(Sizes()), 0)
    for path, size in stored_bytes(shape, storage).items():
        parts[_part_of(path, shape)] += size
    return Sizes(**parts)


def _part_of(path: str, shape: ModelShape) -> str:
    """The part of a model that a path of the weight tree belongs to."""
    first, *rest = path.split(".")
    if first != "text":
        return first
    if rest[0] != "layers":
        return {"embed": "embedding"}.get(rest[0], "head")
    if int(rest[1]) not in shape.text.cross_layers:
        return "self_layers"
    return "cross_kv" if rest[2] in ("kv", "k_norm") else "cross_layers"


def kv_elements(shape: ModelShape, layers: int) -> int:
    """The key and value elements per token over `layers` layers."""
    return 2 * layers * shape.text.kv_heads * shape.text.head_width


def kv_bytes(shape: ModelShape, keys: int, image_keys: int, storage: Storage) -> tuple[int, int]:
    """Bytes of text and image K/V of all layers, for `keys` text and `image_keys` image tokens over all sequences."""
    return (
        round(keys * kv_elements(shape, len(shape.text.self_layers)) * storage.page),
        round(image_keys * kv_elements(shape, len(shape.text.cross_layers)) * storage.page),
    )


def step_bytes(shape: ModelShape, images: bool, tokens: int, image_tokens: int, storage: Storage) -> int:
    """Bytes that a decode step must read: weights once, and the K/V of `tokens` and `image_tokens` (over all rows)."""
    parts = sizes(shape, storage)
    weights = parts.self_layers + parts.head + (parts.cross_layers if images else 0)
    return weights + sum(kv_bytes(shape, tokens, image_tokens if images else 0, storage))


def vision_rows(vision: VisionShape) -> int:
    """Rows of the vision encoder, including those that pad each tile."""
    return vision.max_tiles * (vision.tokens + -vision.tokens % ROW_MULTIPLE)


def work(shape: ModelShape, page_size: int, bucket: Bucket, storage: Storage) -> tuple[float, float]:
    """Bytes that all ranks together move in a step of a full bucket, and the operations of its matrix products."""
    if bucket.phase == "vision":
        return _vision_work(shape, storage, bucket.tiles)
    (keys, image_keys), seen = _keys(page_size, bucket)
    images, logits = bucket.image_pages > 0, bucket.rows_of_logits
    return step_work(shape, images, bucket.tokens, keys, image_keys, seen, logits, storage)


def _keys(page_size: int, bucket: Bucket) -> tuple[tuple[int, int], tuple[float, float]]:
    """The text and image tokens of a full text bucket, counted once; and once for each row that attends to them."""
    if bucket.prompts:
        one, other = (_keys(page_size, part) for part in (bucket.decoding, bucket.prompts))
        return (one[0][0] + other[0][0], one[0][1] + other[0][1]), (one[1][0] + other[1][0], one[1][1] + other[1][1])
    keys = bucket.rows * bucket.pages * page_size, bucket.rows * bucket.image_pages * page_size
    if bucket.phase == "decode":
        return keys, keys
    # The mask is causal: on average, a new token sees half of its sequence's new tokens.
    new = bucket.tokens / bucket.rows
    earlier = max(0.0, bucket.pages * page_size - new)
    return keys, (bucket.tokens * (earlier + new / 2), bucket.tokens * bucket.image_pages * page_size)


def step_work(
    shape: ModelShape,
    images: bool,
    tokens: int,
    keys: int,
    image_keys: int,
    seen: tuple[float, float],
    rows_of_logits: int,
    storage: Storage,
) -> tuple[float, float]:
    """Bytes and operations of a step of `tokens` rows that reads the K/V of `keys` and `image_keys` tokens per layer.

    `seen`: the same text and image tokens, counted once for each row that attends to them.
    """
    text, parts = shape.text, sizes(shape)
    moved = float(step_bytes(shape, images, keys, image_keys, storage))
    moved += tokens * kv_elements(shape, len(text.self_layers)) * storage.page
    attended = seen[0] * len(text.self_layers) + seen[1] * len(text.cross_layers)
    dense = parts.self_layers + (parts.cross_layers if images else 0)
    flops = 2 * tokens * dense + 4 * attended * text.heads * text.head_width
    return moved, flops + 2 * parts.head * rows_of_logits


def _vision_work(shape: ModelShape, storage: Storage, tiles: int) -> tuple[float, float]:
    vision, parts, held, kept = shape.vision, sizes(shape), sizes(shape, storage), len(shape.text.cross_layers)
    rows, tokens, E = vision_rows(vision), vision.max_tiles * vision.tokens, vision.width
    layers, patches = vision.layers + vision.global_layers, vision.channels * vision.patch**2 * E
    tower, late = layers * (4 * E**2 + 2 * E * vision.mlp), parts.projector + parts.cross_kv
    # Of the position embeddings, only the one that all tiles share and that of one aspect ratio are read.
    read = tower + patches + vision.tokens * E * (1 + vision.max_tiles)
    moved = read * held.vision / parts.vision + held.projector + held.cross_kv
    moved += tokens * kv_elements(shape, kept) * storage.page
    # A graph for a number of real tiles cuts only those into patches, and padding does not see padding.
    real = tiles * vision.tokens or tokens
    pairs = rows**2 - ((rows - real) ** 2 if tiles else 0)
    return moved, 2 * rows * tower + 2 * real * patches + 2 * tokens * late + 4 * layers * pairs * E


@dataclass(frozen=True)
class Floor:
    """The least seconds of one rank's step for memory traffic, matrix products and all-reduces."""

    memory: float
    products: float
    links: float

    @property
    def seconds(self) -> float:
        """The floor of the whole step: memory traffic and products overlap, an all-reduce waits for its product."""
        return max(self.memory, self.products) + self.links

    @property
    def bound(self) -> str:
        """The component that takes longest."""
        return max(("memory", "products", "links"), key=lambda name: getattr(self, name))


def floor_of(
    shape: ModelShape, page_size: int, bucket: Bucket, storage: Storage, ranks: int, hardware: HardwareChoice
) -> Floor:
    """The floor of a full bucket: every page is read. Leaves out launches, link latency and all but products."""
    moved, flops = work(shape, page_size, bucket, storage)
    text, vision = shape.text, shape.vision
    if bucket.phase == "vision":
        sums, row, tokens = 2 * (vision.layers + vision.global_layers), vision.width, vision_rows(vision)
    else:
        sums, row, tokens = (
            1 + 2 * (text.layers if bucket.image_pages else len(text.self_layers)),
            text.width,
            bucket.tokens,
        )
    # In an all-reduce, each of n ranks sends 2 (n - 1) / n of the tensor over n - 1 links at once (ring or mesh).
    summed = 2 / ranks * sums * tokens * row * storage.compute / hardware.link_bytes_per_second if ranks > 1 else 0.0
    return Floor(moved / hardware.memory_bytes_per_second / ranks, flops / hardware.flops / ranks, summed)


def bucket_cost(shape: ModelShape, page_size: int, bucket: Bucket, storage: Storage = FP32) -> float:
    """A relative cost of a bucket: the larger of its bytes and its scaled operations. Only orders buckets."""
    if bucket.phase == "vision":
        return 1.0
    images = bucket.image_pages > 0
    parts, text = sizes(shape), shape.text
    dense = parts.self_layers + (parts.cross_layers if images else 0)
    heads = 2 * text.heads * text.head_width
    keys, image_keys, flops = 0, 0, 0
    for part in (bucket.decoding, bucket.prompts) if bucket.prompts else (bucket,):
        seen = part.pages * page_size + (part.tokens if part.phase == "prefill" else 0)
        attended = seen * len(text.self_layers) + part.image_pages * page_size * len(text.cross_layers)
        flops += 2 * part.tokens * (dense + heads * attended)
        keys += part.rows * part.pages * page_size
        image_keys += part.rows * part.image_pages * page_size
    return max(step_bytes(shape, images, keys, image_keys, storage), flops / FLOPS_PER_BYTE)
