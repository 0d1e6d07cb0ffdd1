"""Checks the documented limits of a captured graph's operations at its real sizes, on tensors without memory."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mllama_graph.ascend.ge_ops.attention import MASK_SIDE
from mllama_graph.ascend.graph import LoweredGraph
from mllama_graph.ascend.graphdef import ALL_REDUCE, ATTENTION, INPUTS, SCATTER, described_shape
from mllama_graph.ascend.interpreter import Interpreter, Node

# Inputs whose values ge_ops checks, and for which 0 is a value that passes.
ZEROS = (("GatherV2", "indices"), ("RotaryMul", "r1"), ("RotaryMul", "r2"), (ATTENTION, "block_table"))
# A smaller constant is compared by its values, a larger one by dtype and shape alone.
SMALL = 64


class ShapeInterpreter(Interpreter):
    """The interpreter on fake tensors: it checks every limit that shapes and dtypes decide, for a model of any size."""

    def __init__(self, graph: LoweredGraph):
        super().__init__(graph.captured.graph)
        self._graph, self._mode = graph, FakeTensorMode(allow_non_fake_inputs=True)
        # Results by operation and signatures of its inputs: layers repeat.
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
        inputs = [(name, _signature(values[value])) for name, value in node.inputs]
        key = (node.type, repr(node.attributes), *inputs)
        if key not in self._done:
            self._done[key] = super()._compute(node, values | self._checked_values(node, values))
        return self._done[key]

    def _checked_values(self, node: Node, values: dict[str, Any]) -> dict[str, Tensor]:
        """Real tensors for inputs whose values ge_ops checks: the largest possible lengths, else values that pass."""
        found: dict[str, Tensor] = {}
        for name, value in node.inputs:
            x = values[value]
            if (node.type, name) in ZEROS:
                found[value] = torch.zeros(x.shape, dtype=x.dtype)
            elif (node.type, name) == (SCATTER, "slot_mapping"):
                found[value] = torch.arange(len(x), dtype=x.dtype)
            elif (node.type, name) == (ATTENTION, "actual_seq_lengths_kv"):
                found[value] = torch.full(x.shape, self._longest(node, values), dtype=x.dtype)
            elif (node.type, name) == (ATTENTION, "atten_mask"):
                causal = node.attributes.get("sparse_mode") == 3 and tuple(x.shape) == (MASK_SIDE, MASK_SIDE)
                nothing_hidden = torch.zeros(1, dtype=x.dtype).expand(x.shape)
                found[value] = torch.ones(x.shape).triu(1).to(x.dtype) if causal else nothing_hidden
        return found

    def _longest(self, node: Node, values: dict[str, Any]) -> int:
        """The most tokens that every sequence of an attention can have at once.

        All entries of a block table may be used where sequences share pages, as those of images. Other pages belong to
        one sequence, so that all together can't use more than the pool has.
        """
        inputs = dict(node.inputs)
        shape = values[inputs["block_table"]].shape
        rows, pages = shape if len(shape) == 2 else (1, 1)
        shared = self._graph.role(self._graph.behind(inputs["key0"])).startswith("image_pages")
        most = pages if shared else min(pages, len(values[inputs["key0"]]) // rows)
        return int(most * node.attributes["block_size"])


def _signature(x: Tensor) -> tuple[torch.dtype, tuple[int, ...], str]:
    """All that the limits of an operation can depend on. Constants are real tensors, everything else is fake."""
    real = not isinstance(x, FakeTensor) and x.numel() < SMALL
    return x.dtype, tuple(x.shape), repr(x.tolist()) if real else ""
