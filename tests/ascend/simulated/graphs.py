"""Buckets and specs to capture graphs of the small models, and copies of graphs with one change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from checkpoints import SPECS, model_config
from torchair._ge_concrete_graph import ge_ir_pb2

from mllama_graph.ascend.capture import Capture
from mllama_graph.core.devices import CANDIDATES
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.bucket import Bucket

VISION = Bucket("vision", 1, 1, 0, 2, 1)
DECODE, LEAN = Bucket("decode", 2, 2, 3, 8), Bucket("decode", 2, 2, 3, 0)
PREFILL, PREFILL_LEAN = Bucket("prefill", 1, 32, 0, 8), Bucket("prefill", 1, 32, 0, 0)
CHUNK, CHUNK_LEAN = Bucket("prefill", 1, 32, 3, 8), Bucket("prefill", 1, 32, 3, 0)
PACKED, PACKED_LEAN = Bucket("prefill", 2, 32, 3, 8), Bucket("prefill", 2, 32, 3, 0)
MIXED, MIXED_LEAN = Bucket("mixed", 2, 34, 3, 8, prompts=CHUNK), Bucket("mixed", 2, 34, 3, 0, prompts=CHUNK_LEAN)
MIXED_PACKED = Bucket("mixed", 2, 34, 3, 8, prompts=PACKED)
CLASSES = (
    *(VISION, DECODE, LEAN, PREFILL, PREFILL_LEAN, CHUNK, CHUNK_LEAN, PACKED, PACKED_LEAN),
    *(MIXED, MIXED_LEAN, MIXED_PACKED),
)


def spec_of(name: str, ranks: int = 1, **changes: Any) -> GraphSpec:
    """The spec of a small model's graphs: bf16, with pools for two sequences of up to four images each."""
    changes = {"candidates": CANDIDATES} | changes
    pools = {"page_size": 128, "num_pages": 12, "num_image_pages": 16}
    spec = GraphSpec(
        shape_of(model_config(SPECS[name])),
        store=torch.bfloat16,
        compute=torch.bfloat16,
        kv=torch.bfloat16,
        backend="torchair",
        device="npu-sim",
        threads=1,
        world_size=ranks,
        collectives="distributed",
        **pools,
    )
    return replace(spec, **changes)


def broken(captured: Capture, change: Callable[[dict[str, Any]], None]) -> Capture:
    """A copy of a captured graph, modified by `change`, which gets {name: operation}."""
    graph = ge_ir_pb2.GraphDef()
    graph.CopyFrom(captured.graph)
    change({op.name: op for op in graph.op})
    return replace(captured, graph=graph)
