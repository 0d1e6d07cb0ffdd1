"""Reads the GraphDef that torchair hands to GE: constants, attributes, inputs by name, recorded dtypes and shapes.

A value is named `operation:index`, the output `index` of an operation. A source `operation:-1` is a control edge: it
orders execution and carries no tensor.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch_npu  # noqa: F401  (registers the device and makes torchair importable)
from torch import Tensor
from torchair._ge_concrete_graph import ge_ir_pb2

from mllama_graph.ascend.ge_ops import GraphError

# torchair's protobuf classes have no type stubs.
GraphDef = Any
OpDef = Any

# The graph's inputs.
INPUTS = ("Data", "RefData")
# Operation types at a graph's boundary, which compute nothing.
BOUNDARY = (*INPUTS, "Const", "NetOutput")
# Operations that change a shape without changing an element's value.
VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze")
# Products whose weight may be given as a transposed view: operation -> the input. CANN's fusion passes
# (QuantBatchMatmulV3TransposeFusionPass and WeightQuantBatchMatmulV2TransposeFusionPass in ops-nn) turn it into a flag.
TRANSPOSED = {"WeightQuantBatchMatmulV2": "weight", "QuantBatchMatmulV3": "x2"}
ATTENTION, SCATTER, SCATTER_SCALES = "FusedInferAttentionScore", "ScatterPaKvCache", "ScatterNdUpdate"
ALL_REDUCE, ALL_GATHER = "HcomAllReduce", "HcomAllGather"
# Operations that find the largest logits (ops/npu_candidates.py).
SEARCHES = ("TopKV2", "ArgMaxWithValue")

# What torchair records of an output's fake tensor in the attribute `_meta`.
_META = re.compile(r"dtype=torch\.(\w+), shape=torch\.Size\(\[([^\]]*)\]\)")
# Dtypes of tensor descriptions, by their names in ge_ir.proto.
_DTYPES = {
    "DT_FLOAT": torch.float32,
    "DT_FLOAT16": torch.float16,
    "DT_BF16": torch.bfloat16,
    "DT_INT8": torch.int8,
    "DT_UINT8": torch.uint8,
    "DT_INT16": torch.int16,
    "DT_INT32": torch.int32,
    "DT_INT64": torch.int64,
    "DT_BOOL": torch.bool,
    "DT_DOUBLE": torch.float64,
}


class Meta(NamedTuple):
    """The dtype and shape that torchair recorded for an output."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def attribute(value: Any) -> Any:
    """A protobuf attribute as a Python value."""
    kind = value.WhichOneof("value")
    if kind == "list":
        for field in ("i", "f", "s", "b"):
            if items := list(getattr(value.list, field)):
                return [x.decode() if isinstance(x, bytes) else x for x in items]
        return []
    found = getattr(value, kind) if kind else None
    return found.decode() if isinstance(found, bytes) else found


def constant(op: OpDef) -> Tensor:
    """The value of a Const operation. An empty tensor has no data."""
    tensor = op.attr["value"].t
    dtype, shape = described_dtype(tensor.desc), list(tensor.desc.shape.dim)
    data = bytearray(tensor.data)
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)


def described_dtype(description: Any) -> torch.dtype:
    """The dtype of a tensor description."""
    return _DTYPES[ge_ir_pb2.DataType.Name(description.dtype)]


def described_shape(op: OpDef) -> tuple[int, ...]:
    """The shape of a graph input."""
    return tuple(op.output_desc[0].shape.dim)


def metadata(description: Any) -> Meta | None:
    """What torchair recorded for an output, or None where it recorded nothing.

    Raises GraphError for a shape that is not static.
    """
    text = attribute(description.attr["_meta"]) if "_meta" in description.attr else ""
    found = _META.search(text + ")")
    if not found:
        return None
    sizes = [size for size in found.group(2).split(",") if size.strip()]
    if not all(size.strip().isdigit() for size in sizes):
        raise GraphError(f"a symbolic shape: {text}. Graphs are static here: dynamic=False.")
    return Meta(getattr(torch, found.group(1)), tuple(map(int, sizes)))


def inputs_of(op: OpDef) -> list[tuple[str, str]]:
    """(name of the input, value) for each tensor that an operation takes; control edges are left out."""
    if op.type in INPUTS:
        return []
    names = attribute(op.attr["_input_name_key"])
    sources = [source for source in op.input if not source.endswith(":-1")]
    return [(name, source) for name, source in zip(names, sources, strict=True) if source]


def attributes_of(op: OpDef) -> dict[str, Any]:
    """The attributes of CANN's IR; those of torchair begin with an underscore and are left out."""
    return {name: attribute(value) for name, value in op.attr.items() if not name.startswith("_")}


def count_operations(graph: GraphDef) -> Counter[str]:
    """Number of operations of each type, without the graph's boundary."""
    return Counter(op.type for op in graph.op if op.type not in BOUNDARY)
