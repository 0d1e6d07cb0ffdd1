"""A captured graph with lookups from a value to the operation that produces it, to its consumers and to its role."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter

import torch

from mllama_graph.ascend.capture import WEIGHTS, Capture
from mllama_graph.ascend.ge_ops.tensors import ATTRIBUTE_DTYPES
from mllama_graph.ascend.graphdef import INPUTS, VIEWS, OpDef, described_dtype, described_shape, inputs_of, metadata
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.plan.bucket import Bucket


@dataclass(frozen=True)
class Context:
    """The spec and bucket that a graph was lowered for."""

    spec: GraphSpec
    bucket: Bucket

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Indices of the layers that this graph runs, by the path of their list in the weight tree."""
        text, vision = self.spec.shape.text, self.spec.shape.vision
        if self.bucket.phase == "vision":
            return {
                "vision.local_layers": tuple(range(vision.layers)),
                "vision.global_layers": tuple(range(vision.global_layers)),
            }
        return {"text.layers": tuple(range(text.layers)) if self.bucket.image_pages else text.self_layers}

    @property
    def searches(self) -> bool:
        """Whether this graph finds the largest logits itself."""
        return self.bucket.phase != "vision" and self.spec.candidates > 0

    def runs(self, leaf: str) -> bool:
        """Whether this graph runs a linear layer, given by its path. An image's K/V belong to the vision graph."""
        first, _, rest = leaf.partition(".")
        vision = first != "text" or leaf.endswith(".kv")
        if vision or self.bucket.phase == "vision":
            return vision and self.bucket.phase == "vision"
        return rest == "head" or int(rest.split(".")[1]) in self.layers["text.layers"]


class LoweredGraph:
    """The operations of a captured graph by name. A value is named `operation:index`, as in graphdef.py."""

    def __init__(self, captured: Capture):
        self.captured = captured
        self.ops: dict[str, OpDef] = {op.name: op for op in captured.graph.op}
        # value -> (operation that takes it, name of the input)
        self.takers: dict[str, list[tuple[OpDef, str]]] = {}
        for op in self.ops.values():
            for name, value in inputs_of(op):
                self.takers.setdefault(value, []).append((op, name))

    def of_type(self, *types: str) -> list[OpDef]:
        """The operations of the given types."""
        return [op for op in self.ops.values() if op.type in types]

    def maker(self, value: str) -> OpDef:
        """The operation that produces a value."""
        return self.ops[value.rpartition(":")[0]]

    def role(self, value: str) -> str:
        """What a graph input is, as in `Capture.inputs`; empty for any other value."""
        return self.captured.inputs.get(self.maker(value).name, "")

    def behind(self, value: str, types: tuple[str, ...] = VIEWS) -> str:
        """The first value of the chain of views, or of operations of the given types, that ends in `value`."""
        while (op := self.maker(value)).type in types:
            value = inputs_of(op)[0][1]
        return value

    def described(self, value: str) -> str:
        """A description of a value, for a message."""
        op = self.maker(value)
        return self.role(value) or ("a constant" if self.is_constant(op) else f"{op.type} {op.name}")

    @property
    def outputs(self) -> list[str]:
        """The values that the graph returns."""
        return [value for op in self.of_type("NetOutput") for _, value in inputs_of(op)]

    @property
    def weights(self) -> Iterator[str]:
        """The graph inputs that are weights."""
        return (value for op in self.of_type(*INPUTS) if self.is_weight(value := f"{op.name}:0"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the graph reads."""
        return sum(
            self.elements(value) * described_dtype(self.maker(value).output_desc[0]).itemsize for value in self.weights
        )

    def elements(self, value: str) -> int:
        """Number of elements of a graph input."""
        return math.prod(described_shape(self.maker(value)))

    def is_weight(self, value: str) -> bool:
        """Whether a value is a graph input that is one of the model's weights."""
        return self.role(value).startswith(f"{WEIGHTS}.")

    @cached_property
    def roots(self) -> dict[str, frozenset[str]]:
        """Operation name -> which of given, weights, pages and image_pages it depends on; none for a constant."""
        makers = {name: {self.maker(value).name for _, value in inputs_of(op)} for name, op in self.ops.items()}
        roots: dict[str, frozenset[str]] = {}
        for name in TopologicalSorter(makers).static_order():
            own = self.captured.inputs.get(name, "").partition(".")[0]
            roots[name] = frozenset([own] if own else []).union(*(roots[maker] for maker in makers[name]))
        return roots

    def is_constant(self, op: OpDef) -> bool:
        """Whether an operation depends on no graph input, so that GE computes it when it compiles."""
        return not self.roots[op.name]

    def dtype(self, value: str) -> torch.dtype | None:
        """A value's dtype, or None for an operation that has neither inputs nor a recorded dtype.

        An operation for which torchair records no dtype is elementwise and has the dtype of its first input.
        """
        op, index = self.maker(value), int(value.rpartition(":")[2])
        if op.type == "Const":
            return described_dtype(op.attr["value"].t.desc)
        if op.type == "Cast":
            return ATTRIBUTE_DTYPES.get(op.attr["dst_type"].i)
        recorded = metadata(op.output_desc[index])
        if recorded:
            return recorded.dtype
        if op.type in INPUTS:
            return described_dtype(op.output_desc[0])
        inputs = inputs_of(op)
        return self.dtype(inputs[0][1]) if inputs else None
