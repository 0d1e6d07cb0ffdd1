"""The structure of a graph, independent of its sizes: the buckets of one class must have the same structure."""

from graphlib import TopologicalSorter
from hashlib import sha256
from typing import Any

import torch

from mllama_graph.ascend.capture import Capture
from mllama_graph.ascend.graph import LoweredGraph
from mllama_graph.ascend.graphdef import OpDef, attributes_of, constant, inputs_of

# Inputs whose integers are axes. All other integer constants are sizes or derived from sizes.
AXES = ("axis", "axes", "perm", "concat_dim", "split_dim")


def structure(captured: Capture) -> dict[str, str]:
    """Digest of each operation and everything it depends on -> a description of the operation.

    Integer constants other than axes count as sizes, which a digest leaves out. Operations that differ only in sizes
    have one digest, since torchair merges them in graphs where these sizes happen to be equal.
    """
    graph = LoweredGraph(captured)
    digests: dict[str, str] = {}
    found: dict[str, str] = {}
    makers = {
        name: list(dict.fromkeys(source.rpartition(":")[0] for source in op.input if source))
        for name, op in graph.ops.items()
    }
    for name in TopologicalSorter(makers).static_order():
        op = graph.ops[name]
        inputs = [
            (key, digests[graph.maker(value).name], value.rpartition(":")[2], _axes(graph, key, value))
            for key, value in inputs_of(op)
        ]
        control = sorted(digests[source.removesuffix(":-1")] for source in op.input if source.endswith(":-1"))
        own = _without_sizes(op) if op.type == "Const" else graph.role(f"{name}:0") or sorted(attributes_of(op).items())
        dtypes = [graph.dtype(f"{name}:{index}") for index in range(len(op.output_desc))]
        digests[name] = sha256(repr((op.type, inputs, own, control, dtypes)).encode()).hexdigest()[:16]
        found.setdefault(digests[name], f"{op.type} {name}, at {captured.line(name)}")
    return found


def _axes(graph: LoweredGraph, key: str, value: str) -> list[int] | None:
    """The axes that an input holds; None for any other input."""
    made = graph.maker(value)
    return constant(made).reshape(-1).tolist() if key in AXES and made.type == "Const" else None


def _without_sizes(op: OpDef) -> tuple[str, int, Any]:
    """Dtype, number of dimensions and values of a constant; None for the values of integers."""
    value = constant(op)
    integers = not value.is_floating_point() and value.dtype != torch.bool
    return str(value.dtype), value.dim(), None if integers else value.tolist()
