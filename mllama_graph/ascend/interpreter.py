"""Executes a GE graph on the CPU, operation by operation, and checks every output's dtype and shape.

The table of operations is ge_ops; the expected dtypes and shapes are those that torchair recorded in the graph.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor

from mllama_graph.ascend.ge_ops import OPERATIONS, GraphError
from mllama_graph.ascend.graphdef import (
    BOUNDARY,
    INPUTS,
    VIEWS,
    GraphDef,
    Meta,
    OpDef,
    attributes_of,
    constant,
    inputs_of,
    metadata,
)


@dataclass
class Node:
    """An operation of a graph. inputs: (name of the input, value). outputs: expected dtype and shape of each."""

    name: str
    type: str
    inputs: list[tuple[str, str]]
    attributes: dict[str, Any]
    outputs: list[Meta | None]


class Interpreter:
    """A graph, checked against the table of operations and sorted for execution.

    `wide` lets attention accept fp32, which no device does, to run the same graph in fp32 arithmetic. Raises GraphError
    for an operation, input or attribute that the table does not list, for pages that are copied before they are
    written, and for pages that are read and written in no defined order.
    """

    def __init__(self, graph: GraphDef, wide: bool = False):
        self.constants = {f"{op.name}:0": constant(op) for op in graph.op if op.type == "Const"}
        self.inputs: dict[str, int] = {f"{op.name}:0": op.attr["index"].i for op in graph.op if op.type in INPUTS}
        self.outputs: list[str] = [name for op in graph.op if op.type == "NetOutput" for name in op.input]
        self.histogram = Counter(op.type for op in graph.op)
        unknown = sorted(set(self.histogram) - set(OPERATIONS) - set(BOUNDARY))
        if unknown:
            raise GraphError(f"the table has no {', '.join(unknown)}")
        self.nodes = _sorted(
            [_node(op, wide) for op in graph.op if op.type not in BOUNDARY], {*self.constants, *self.inputs}
        )
        self._consumers: dict[str, list[str]] = {}
        for node in self.nodes:
            for _, value in node.inputs:
                self._consumers.setdefault(value, []).append(node.name)
        self._types = {node.name: node.type for node in self.nodes}
        for node in self.nodes:
            self._check_writes(node)

    def _check_writes(self, node: Node) -> None:
        """Checks that an operation overwrites only graph inputs, and that no other operation reads those inputs.

        GE defines no order between a write and other reads of the same input.
        """
        overwritten = OPERATIONS[node.type].overwritten
        for name, value in node.inputs:
            if name in overwritten and value not in self.inputs:
                raise GraphError(f"{node.name} writes to {value}, a copy. It must get the graph's own input.")
            if name in overwritten and len(self._consumers[value]) > 1:
                readers = self._consumers[value]
                raise GraphError(
                    f"{value} is written by {node.name} and read by {readers}: all others must read what was written"
                )

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Runs the graph on CPU tensors in the order of its inputs and returns its outputs; pages are written in place.

        Raises GraphError, which names the operation, where a documented limit does not hold.
        """
        values: dict[str, Any] = dict(self.constants) | {name: given[index] for name, index in self.inputs.items()}
        # Remaining reads of each value; a value is freed after its last read.
        reads = Counter(value for node in self.nodes for _, value in node.inputs)
        reads.update(self.outputs)
        for node in self.nodes:
            try:
                results = self._compute(node, values)
                for index, (result, meta) in enumerate(zip(results, node.outputs, strict=False)):
                    self._check_output(f"{node.name}:{index}", result, meta)
                    values[f"{node.name}:{index}"] = result
            except (GraphError, KeyError, RuntimeError, IndexError, TypeError) as error:
                raise GraphError(f"{node.type} {node.name}: {error}") from error
            for _, value in node.inputs:
                reads[value] -= 1
                if not reads[value]:
                    values.pop(value)
        return [values[name] for name in self.outputs]

    def _compute(self, node: Node, values: dict[str, Any]) -> tuple[Any, ...]:
        """An operation's outputs."""
        operation = OPERATIONS[node.type]
        arguments: dict[str, Any] = {name: [] for name in operation.lists}
        for name, value in node.inputs:
            parameter, tensor = operation.parameter(name), values[value]
            if tensor is None:
                raise GraphError(f"{value} is read, but the interpreter does not compute it")
            if parameter in operation.lists:
                arguments[parameter].append(tensor)
            else:
                arguments[parameter] = tensor
        results = operation.compute(**arguments, **node.attributes)
        return results if isinstance(results, tuple) else (results,)

    def _check_output(self, name: str, result: Tensor | None, meta: Meta | None) -> None:
        if result is None or meta is None:
            return
        # torchair may record the shape of a view of the output instead of the output's own.
        viewed = any(self._types[consumer] in VIEWS for consumer in self._consumers.get(name, []))
        fits = result.numel() == Size(meta.shape).numel() if viewed else tuple(result.shape) == meta.shape
        if result.dtype != meta.dtype or not fits:
            raise GraphError(
                f"output {name} is {result.dtype} {tuple(result.shape)}, the graph says {meta.dtype} {meta.shape}"
            )


def _node(op: OpDef, wide: bool) -> Node:
    """The node of an operation. Raises GraphError for an input or attribute that the table does not list."""
    operation, inputs, attributes = OPERATIONS[op.type], inputs_of(op), attributes_of(op)
    try:
        for name, _ in inputs:
            operation.parameter(name)
        unknown = sorted(set(attributes) - set(operation.attributes))
        if unknown:
            raise GraphError(f"attributes {unknown} are not known")
    except GraphError as error:
        raise GraphError(f"{op.type} {op.name}: {error}") from error
    if wide and "wide" in operation.attributes:
        attributes["wide"] = True
    return Node(op.name, op.type, inputs, attributes, [metadata(description) for description in op.output_desc])


def _sorted(nodes: list[Node], known: set[str]) -> list[Node]:
    """The nodes in topological order; torchair appends most of them in that order, but not all.

    `known`: the graph's inputs and constants. Raises GraphError for a cycle or a value that no operation produces.
    """
    known, ordered, waiting = set(known), [], nodes
    while waiting:
        later = []
        for node in waiting:
            if all(value in known for _, value in node.inputs):
                ordered.append(node)
                known.update(f"{node.name}:{index}" for index in range(max(1, len(node.outputs))))
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise GraphError(
                f"{later[0].name} is part of a cycle or reads values that no operation produces: {later[0].inputs}"
            )
        waiting = later
    return ordered
