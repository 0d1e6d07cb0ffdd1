"""Checks the documented limits of a captured graph's operations at its real sizes, on fake tensors."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mllama_graph.ascend.ge_ops.attention import MASK_SIDE
from mllama_graph.ascend.graph import LoweredGraph
from mllama_graph.ascend.graphdef import (
    ALL_GATHER,
    ALL_REDUCE,
    ATTENTION,
    INPUTS,
    SCATTER,
    SCATTER_SCALES,
    described_shape,
)
from mllama_graph.ascend.interpreter import Interpreter, Node

# Inputs whose values ge_ops checks and for which zeros are valid.
ZEROS = (("GatherV2", "indices"), ("RotaryMul", "r1"), ("RotaryMul", "r2"), (ATTENTION, "block_table"))
# A constant with fewer elements is compared by its values, a larger one by dtype and shape alone.
SMALL = 64


class ShapeInterpreter(Interpreter):
    """The interpreter on fake tensors: checks all limits that depend on shapes and dtypes, for a model of any size."""

    def __init__(self, graph: LoweredGraph):
        super().__init__(graph.captured.graph)
        self._graph, self._mode = graph, FakeTensorMode(allow_non_fake_inputs=True)
        # Results by operation and signatures of its inputs, reused because layers repeat.
        self._done: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def check(self) -> None:
        """Runs the graph. Raises GraphError where an operation's limit does not hold."""
        ops = sorted(self._graph.of_type(*INPUTS), key=lambda op: op.attr["index"].i)
        with self._mode:
            given = [torch.empty(described_shape(op), dtype=self._graph.dtype(f"{op.name}:0")) for op in ops]
        self.run(given)

    def _compute(self, node: Node, values: dict[str, Any]) -> tuple[Any, ...]:
        if node.type == ALL_REDUCE:
            return (values[node.inputs[0][1]],)
        if node.type == ALL_GATHER:
            part = values[node.inputs[0][1]]
            return (part.new_empty((node.attributes["rank_size"] * part.shape[0], *part.shape[1:])),)
        if any(values[value] is None for _, value in node.inputs):
            return super()._compute(node, values)  # refuses the operation
        inputs = [(name, _signature(values[value])) for name, value in node.inputs]
        key = (node.type, repr(node.attributes), *inputs)
        if key not in self._done:
            self._done[key] = super()._compute(node, values | self._checked_values(node, values))
        return self._done[key]

    def _checked_values(self, node: Node, values: dict[str, Any]) -> dict[str, Tensor]:
        """Real tensors for inputs whose values ge_ops checks: the largest possible lengths, otherwise valid values."""
        found: dict[str, Tensor] = {}
        for name, value in node.inputs:
            x = values[value]
            if (node.type, name) in ZEROS:
                found[value] = torch.zeros(x.shape, dtype=x.dtype)
            elif (node.type, name) == (SCATTER, "slot_mapping"):
                found[value] = torch.arange(len(x), dtype=x.dtype)
            elif (node.type, name) == (SCATTER_SCALES, "indices"):
                sizes = values[dict(node.inputs)["var"]].shape[: x.shape[-1]]
                places = torch.unravel_index(torch.arange(x.numel() // x.shape[-1]), sizes)
                found[value] = torch.stack(places, -1).view(x.shape).to(x.dtype)
            elif (node.type, name) == (ATTENTION, "actual_seq_lengths"):
                query = values[dict(node.inputs)["query"]]
                packed = node.attributes.get("input_layout") == "TND"
                ends = torch.arange(1, len(x) + 1, dtype=x.dtype) * (len(query) // len(x))
                found[value] = ends if packed else torch.full(x.shape, query.shape[1], dtype=x.dtype)
            elif (node.type, name) == (ATTENTION, "actual_seq_lengths_kv") and "block_table" in dict(node.inputs):
                found[value] = torch.full(x.shape, self._longest(node, values), dtype=x.dtype)
            elif (node.type, name) == (ATTENTION, "actual_seq_lengths_kv") and isinstance(x, FakeTensor):
                found[value] = torch.full(x.shape, values[dict(node.inputs)["key0"]].shape[1], dtype=x.dtype)
            elif (node.type, name) == (ATTENTION, "atten_mask"):
                causal = node.attributes.get("sparse_mode") == 3 and tuple(x.shape) == (MASK_SIDE, MASK_SIDE)
                nothing_hidden = torch.zeros(1, dtype=x.dtype).expand(x.shape)
                found[value] = torch.ones(x.shape).triu(1).to(x.dtype) if causal else nothing_hidden
        return found

    def _longest(self, node: Node, values: dict[str, Any]) -> int:
        """The largest length in tokens that all sequences of an attention can have at once.

        Sequences share image pages, so that each can use every entry of its block table. Other pages belong to one
        sequence each, so that all sequences together can't use more pages than the pool has; nor can the parts of
        sequences (plan/forms.py).
        """
        inputs = dict(node.inputs)
        shape = values[inputs["block_table"]].shape
        rows, pages = shape if len(shape) == 2 else (1, 1)
        whole = not node.attributes.get("softmax_lse_flag")
        shared = whole and self._graph.role(self._graph.behind(inputs["key0"])).startswith("image_pages")
        most = pages if shared else min(pages, len(values[inputs["key0"]]) // rows)
        return int(most * node.attributes["block_size"])


def _signature(x: Tensor) -> tuple[torch.dtype, tuple[int, ...], str]:
    """Everything that an operation's limits can depend on. Constants are real tensors, all others are fake."""
    real = not isinstance(x, FakeTensor) and x.numel() < SMALL
    return x.dtype, tuple(x.shape), repr(x.tolist()) if real else ""
