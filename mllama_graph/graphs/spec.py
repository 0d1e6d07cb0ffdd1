"""The specification of a graph: all that determines it except the bucket."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama_graph.model.formats import Formats, Storage, page_bytes
from mllama_graph.model.inputs import ImageInput, MixedInput, Pages, PromptInput, TileInput, TokenInput, mixed_input
from mllama_graph.model.ops import fast_head, padded_head
from mllama_graph.model.placement import Placement
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard
from mllama_graph.model.tree import Pixels, Weights, build
from mllama_graph.ops.npu_inputs import (
    OF_ALL_ROWS,
    UNREAD,
    causal_mask,
    prepare,
    prepare_captured,
    prepare_rows,
    with_places,
)
from mllama_graph.ops.transfers import sent
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cores import BSH_ALONE, TND, Forms


@dataclass(frozen=True)
class GraphSpec:
    """The model, its pages and dtypes, the compiler and the device. `options` are (name, value) pairs for the compiler.

    `device` is cpu, cuda, npu or npu-sim. `rank` only matters for torchair: with other backends ranks share graphs.
    `forms`: how decode buckets of an NPU attend to pages, where not in BSH (plan/forms.py).
    """

    shape: ModelShape
    page_size: int
    num_pages: int
    num_image_pages: int
    store: torch.dtype
    compute: torch.dtype
    kv: torch.dtype
    backend: str
    device: str
    threads: int
    world_size: int = 1
    collectives: str = "shared_memory"
    kernels: str = "plain"
    deterministic: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    rank: int = 0
    formats: Formats = ()
    # The number of largest logits that a text graph gives beside all of them; 0: only the logits.
    candidates: int = 0
    forms: tuple[tuple[Bucket, Forms], ...] = ()

    def forms_of(self, bucket: Bucket) -> Forms:
        """How a bucket's decode step, or that within a mixed step, attends to pages."""
        return dict(self.forms).get(bucket.decoding if bucket.prompts else bucket, BSH_ALONE)

    @property
    def compiles(self) -> bool:
        """Whether this backend compiles graphs."""
        return self.backend != "eager"

    @property
    def tiled(self) -> bool:
        """Whether an NPU's weights have the layout of its matrix unit (backend.torchair.weight_format)."""
        return dict(self.options).get("weight_format") == "nz"

    @property
    def vision_heads(self) -> tuple[int, int] | None:
        """Widths of the vision tower's heads and of what they are padded to (backend.torchair.pad_vision_heads)."""
        width = self.shape.vision.width // self.shape.vision.heads
        padded = fast_head(width) if dict(self.options).get("pad_vision_heads") else width
        return (width, padded) if padded > width else None

    @property
    def storage(self) -> Storage:
        """Bytes of what weights and pages are stored in."""
        page = page_bytes(self.kv.itemsize, self.shape.text.head_width)
        return Storage(self.store.itemsize, self.compute.itemsize, page, self.formats)

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries of CPU kernels that the graphs call."""
        if self.kernels != "native":
            return ()
        return ("kernels", "quantised") if self.formats else ("kernels",)

    @property
    def torch_device(self) -> torch.device:
        """The device of weights, pages and inputs."""
        return torch.device("npu" if self.device == "npu-sim" else self.device)

    @property
    def placement(self) -> Placement:
        """Placement of weights and pages. An NPU's are written on the host: it runs kernels only inside graphs."""
        on_host = self.torch_device.type == "npu"
        return Placement(self.torch_device, torch.device("cpu") if on_host else self.torch_device)

    @property
    def shard(self) -> Shard:
        """This rank's part of the sharded axes."""
        return Shard(self.rank, self.world_size)

    @property
    def head_width(self) -> int:
        """Width of a head in the pages: on an NPU padded as attention needs it, so that no page is copied to pad it."""
        width = self.shape.text.head_width
        return padded_head(width, self.kv.itemsize) if self.backend == "torchair" else width

    def pages(self, allocate: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> tuple[Pages, Pages]:
        """A rank's self-attention pages and image pages, for its own heads; allocate(size, dtype) makes each tensor."""
        text = self.shape.text

        def pool(count: int, layers: int) -> Pages:
            heads = text.kv_heads // self.world_size
            size, scales = (count, self.page_size, heads, self.head_width), (count, heads, self.page_size)
            parts = [(size, self.kv)] * 2 + [(scales, torch.float32)] * (2 * (self.kv == torch.int8))
            return tuple(tuple(allocate(*part) for part in parts) for _ in range(layers))

        return pool(self.num_pages, len(text.self_layers)), pool(self.num_image_pages, len(text.cross_layers))

    def unfilled_pages(self) -> tuple[Pages, Pages]:
        """Pages with undefined contents."""
        return self.pages(lambda size, dtype: torch.empty(size, dtype=dtype, device=self.torch_device))

    def unfilled_weights(self, shard: Shard) -> Weights:
        """A rank's weight tree with undefined values."""
        pixels = Pixels(1.0, (0.0,) * 3, (1.0,) * 3)
        return build(
            self.shape,
            pixels,
            self.store,
            self.placement,
            lambda entry, part, region: None,
            lambda count: None,
            shard,
            self.formats,
            lambda entry, rows, region: None,
        )

    def prepared(self, given: Any) -> Any:
        """A step's inputs, given on the host, as an NPU's graphs take them, on the device.

        Captured kernels take integers as lengths. Their decode steps take masks instead; their prompts compute them.
        """
        captured = dict(self.options).get("mode", "max-autotune") != "max-autotune"
        if self.kv == torch.int8:
            given = with_places(given, self.page_size, self.shape.text.kv_heads // self.world_size)
        held = range(*self.shard.bounds(self.shape.embeddings)) if self.world_size > 1 else None
        if not isinstance(given, MixedInput):
            return self._prepared(given, captured, held, ())
        tokens, prompts = (self._prepared(part, captured, None, OF_ALL_ROWS) for part in (given.tokens, given.prompts))
        rows = (given if captured else prepare_rows(given, held))._replace(tokens=tokens, prompts=prompts)
        return sent(rows, self.torch_device, ("tokens", "prompts", *(() if captured else UNREAD)))

    def _prepared(self, given: Any, captured: bool, held: range | None, unread: tuple[str, ...]) -> Any:
        """`prepared` for a step, or a part of a mixed step, whose graph does not read `unread`."""
        if captured and not isinstance(given, TokenInput):
            return sent(given, self.torch_device, unread)
        if not isinstance(given, TileInput):
            forms = BSH_ALONE
            if isinstance(given, TokenInput):
                (B, J), image = given.table_BJ.shape, given.image
                forms = self.forms_of(Bucket("decode", B, len(given.ids_T), J, image.table_BJ.shape[1] if image else 0))
            packed, parts = forms.text.name == TND, (forms.text.parts, forms.image.parts)
            if captured:
                given = prepare_captured(given, self.page_size, held, parts)
                return sent(given, self.torch_device, (*UNREAD, *unread, "len_B", "image_len_B"))
            given = prepare(given, self.page_size, causal_mask(self.torch_device), held, packed, parts)
        return sent(given, self.torch_device, unread if isinstance(given, TileInput) else (*UNREAD, *unread))

    def example(self, bucket: Bucket) -> Any:
        """Harmless inputs with a bucket's shapes: one image tile, or padding rows in scratch slots.

        On an NPU they lie on the host, as `prepared` takes them.
        """
        vision, device = self.shape.vision, torch.device("cpu") if self.backend == "torchair" else self.torch_device

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32).to(device)

        def ones(size: int) -> Tensor:
            return torch.ones(size, dtype=torch.int32).to(device)

        def slots(count: int) -> Tensor:
            return torch.arange(count, dtype=torch.int32).to(device)

        if bucket.prompts:
            tokens, prompts = self.example(bucket.decoding), self.example(bucket.prompts)
            return mixed_input(tokens, prompts._replace(slot_T=prompts.slot_T + bucket.rows))
        B, T, J = bucket.rows, bucket.tokens, bucket.pages
        if bucket.phase == "vision":
            tiles = torch.zeros((vision.max_tiles, vision.channels, vision.tile, vision.tile), dtype=torch.uint8)
            # On an NPU, each number of real tiles has a graph of its own.
            real, given = (None, tiles[: bucket.tiles]) if bucket.tiles else (ones(1), tiles)
            return TileInput(given.to(device), ones(1), real, slots(vision.max_tiles * vision.tokens))
        image = (
            ImageInput(zeros(B, bucket.image_pages), zeros(B, bucket.image_pages), zeros(T, 2))
            if bucket.image_pages
            else None
        )
        if bucket.phase == "prefill":
            return PromptInput(
                ids_T=zeros(T),
                position_T=zeros(T),
                slot_T=slots(T),
                last_B=zeros(bucket.outputs or B),
                real_1=ones(1),
                outputs_1=ones(1),
                decoding_1=zeros(1),
                rows_B=zeros(B),
                past_B=zeros(B),
                table_BJ=zeros(B, J) if J else None,
                image=image,
            )
        return TokenInput(zeros(T), zeros(T), slots(T), zeros(1), zeros(B, J), ones(B), image)
