"""The memory that a rank will allocate, computed from shapes before anything is allocated."""

from dataclasses import dataclass

from mllama_graph.core.dtypes import WIDEN_ROWS
from mllama_graph.core.errors import UserError
from mllama_graph.core.machine import available_memory
from mllama_graph.model.formats import Storage, stored_bytes
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard
from mllama_graph.plan.buckets import Plan
from mllama_graph.plan.cost import GB, kv_elements, vision_rows

# Memory of a process besides weights, pages and workspace: torch and the compiled graphs.
PROCESS_BYTES = 400_000_000


@dataclass(frozen=True)
class Memory:
    """The bytes that a rank will allocate."""

    weights: int
    self_pages: int
    image_pages: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.self_pages + self.image_pages + self.workspace

    def describe(self) -> str:
        parts = (
            ("weights", self.weights),
            ("self K/V pages", self.self_pages),
            ("image K/V pages", self.image_pages),
            ("workspace", self.workspace),
        )
        return " + ".join(f"{name} {value / GB:.2f}" for name, value in parts) + f" = {self.total / GB:.2f} GB"


def memory(shape: ModelShape, plan: Plan, storage: Storage, world: int = 1) -> Memory:
    """The memory of one rank of `world`: weights, pages, and the largest intermediate results of the plan's graphs."""
    text, vision, part, compute_width = shape.text, shape.vision, Shard(0, world), storage.compute
    mlp, vocab = part.size(text.mlp), part.size(text.vocab)
    tokens = max(plan.prefill_tokens[-1], plan.decode_tokens, plan.mixed_rows)
    beside = plan.decode_tokens if plan.lengths_are_free else plan.decode_batch[-1] if plan.mixed_tokens else 0
    sampled = max(plan.decode_tokens, beside + plan.outputs)
    prefill = tokens * (4 * text.width + 3 * mlp) * compute_width
    patches = vision_rows(vision)
    encode = patches * ((8 + len(vision.features)) * vision.width + 2 * vision.mlp + text.width) * compute_width
    if not plan.tiles:
        # The attention mask of the vision encoder: one byte per pair of rows, and a copy in the compute dtype.
        encode += patches**2 * (1 + compute_width)
    logits = sampled * vocab * 4 * 2
    if storage.weight < compute_width or storage.formats:
        # A GEMM with many rows widens its weight first. The largest is the head, with one row per sampled token.
        widest = max(2 * mlp, vocab if sampled > WIDEN_ROWS else 0)
        prefill += widest * text.width * compute_width
    page = plan.page_size * storage.page
    return Memory(
        weights=sum(stored_bytes(shape, storage, part).values()),
        self_pages=round(plan.num_pages * page * kv_elements(shape, len(text.self_layers)) / world),
        image_pages=round(plan.num_image_pages * page * kv_elements(shape, len(text.cross_layers)) / world),
        workspace=max(prefill, encode) + logits,
    )


def require(needed: Memory, available: int, where: str, ranks: int = 1) -> None:
    """Raises UserError with the breakdown where `ranks` ranks need more than `available` bytes."""
    if needed.total * ranks > available:
        of_all = f" for each of {ranks} ranks, {needed.total * ranks / GB:.2f} GB" if ranks > 1 else ""
        raise UserError(
            f"not enough memory: {needed.describe()}{of_all} needed, {max(available, 0) / GB:.2f} GB available "
            f"({where}). Lower batch, max_input_length, max_images or plan.num_pages, use dtype=bf16, or use a larger "
            "machine."
        )


def require_on_host(needed: Memory, memory_gib: float | None, ranks: int) -> None:
    """Raises UserError where this host's memory can't hold `ranks` ranks."""
    available, where = (
        (int(memory_gib * 2**30), f"memory_gib={memory_gib:g}") if memory_gib is not None else available_memory()
    )
    require(needed, available - ranks * PROCESS_BYTES, where, ranks)
