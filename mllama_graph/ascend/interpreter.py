"""Executes the graphs that torchair hands to CANN, on the CPU, operation by operation.

`install` puts it in the place of torchair's own executor, so that whatever torchair compiles runs. The tensors' memory
is the stubs' device memory, which is host memory: nothing is copied, and pages are written in place as on a device.
"""

import ctypes
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch_npu  # noqa: F401  (registers the device, makes torchair importable)
from torch import Tensor
from torchair._ge_concrete_graph import fx2ge_converter, ge_ir_pb2
from torchair.core import _backend, _torchair

from mllama_graph.ascend.ge_ops import OPERATIONS, GraphError

INPUTS = ("Data", "RefData")
# Not operations but the graph's edges.
EDGES = (*INPUTS, "Const", "NetOutput")
META = re.compile(r"dtype=torch\.(\w+), shape=torch\.Size\(\[([^\]]*)\]\)")
# What torchair's views leave behind an operation: it may write the view's shape into the operation's metadata.
VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze")
CONSTANTS = {"DT_FLOAT": torch.float32, "DT_FLOAT16": torch.float16, "DT_BF16": torch.bfloat16, "DT_INT8": torch.int8,
             "DT_UINT8": torch.uint8, "DT_INT16": torch.int16, "DT_INT32": torch.int32, "DT_INT64": torch.int64,
             "DT_BOOL": torch.bool, "DT_DOUBLE": torch.float64}


@dataclass
class Step:
    """An operation of a graph: where its inputs come from, and what its outputs must be."""

    name: str
    kind: str
    inputs: list[tuple[str, str]]  # (name of the input, value), where one is fed
    attributes: dict[str, Any]
    metas: list[Optional[tuple[torch.dtype, tuple[int, ...]]]]


def attribute(value: Any) -> Any:
    """A protobuf attribute as a Python value."""
    kind = value.WhichOneof("value")
    if kind == "list":
        for field in ("i", "f", "s", "b"):
            found = list(getattr(value.list, field))
            if found:
                return [x.decode() if isinstance(x, bytes) else x for x in found]
        return []
    found = getattr(value, kind) if kind else None
    return found.decode() if isinstance(found, bytes) else found


def constant(tensor: Any) -> Tensor:
    """A Const's value. An empty one has no data."""
    dtype, shape = CONSTANTS[ge_ir_pb2.DataType.Name(tensor.desc.dtype)], list(tensor.desc.shape.dim)
    data = bytearray(tensor.data)
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)


def metadata(description: Any) -> Optional[tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) that torchair noted for an output, or None. Raises GraphError for a symbolic shape."""
    text = attribute(description.attr["_meta"]) if "_meta" in description.attr else ""
    found = META.search(text + ")")
    if not found:
        return None
    sizes = [size for size in found.group(2).split(",") if size.strip()]
    if not all(size.strip().isdigit() for size in sizes):
        raise GraphError(f"a symbolic shape: {text}. Graphs are static here: dynamic=False.")
    return getattr(torch, found.group(1)), tuple(map(int, sizes))


class Interpreter:
    """A graph, read once: checked against the table, put in order, ready to run.

    `wide` lets attention take fp32: the same graph in fp32 arithmetic, which no device runs. Raises GraphError for an
    operation, input or attribute that the table doesn't know, and for pages that are copied, or read before the write.
    """

    def __init__(self, graph: Any, wide: bool = False):
        self.wide = wide
        self.constants = {f"{op.name}:0": constant(op.attr["value"].t) for op in graph.op if op.type == "Const"}
        self.inputs = {f"{op.name}:0": op.attr["index"].i for op in graph.op if op.type in INPUTS}
        self.outputs = [name for op in graph.op if op.type == "NetOutput" for name in op.input]
        self.histogram = Counter(op.type for op in graph.op)
        unknown = sorted(set(self.histogram) - set(OPERATIONS) - set(EDGES))
        if unknown:
            raise GraphError(f"the table has no {', '.join(unknown)}")
        self.steps = _in_order([_step(op, wide) for op in graph.op if op.type not in EDGES],
                               {*self.constants, *self.inputs})
        self._consumers: dict[str, list[str]] = {}
        for step in self.steps:
            for _, value in step.inputs:
                self._consumers.setdefault(value, []).append(step.name)
        self._kinds = {step.name: step.kind for step in self.steps}
        for step in self.steps:
            self._check_written(step)

    def _check_written(self, step: Step) -> None:
        """What an operation overwrites is a graph input that nothing else reads: GE promises no other order."""
        written = OPERATIONS[step.kind].written
        for name, value in step.inputs:
            if name in written and value not in self.inputs:
                raise GraphError(f"{step.name} writes to {value}, a copy. Hand it the graph's own input.")
            if name in written and len(self._consumers[value]) > 1:
                readers = self._consumers[value]
                raise GraphError(f"{value} is written by {step.name} and read by {readers}: all others must read "
                                 "what was written")

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The graph's outputs. `given` are CPU tensors in the order of the graph's inputs; what it writes, it writes
        there. Raises GraphError where a rule does not hold, naming the operation."""
        values = dict(self.constants) | {name: given[index] for name, index in self.inputs.items()}
        waiting = Counter(value for step in self.steps for _, value in step.inputs)
        waiting.update(self.outputs)
        for step in self.steps:
            try:
                results = self._compute(step, values)
                for index, (result, meta) in enumerate(zip(results, step.metas, strict=False)):
                    self._check_output(f"{step.name}:{index}", result, meta)
                    values[f"{step.name}:{index}"] = result
            except (GraphError, KeyError, RuntimeError, IndexError, TypeError) as error:
                raise GraphError(f"{step.kind} {step.name}: {error}") from error
            for _, value in step.inputs:
                waiting[value] -= 1
                if not waiting[value]:
                    values.pop(value)
        return [values[name] for name in self.outputs]

    def _compute(self, step: Step, values: dict[str, Tensor]) -> tuple:
        entry = OPERATIONS[step.kind]
        arguments: dict[str, Any] = {name: [] for name in entry.lists}
        for name, value in step.inputs:
            parameter, tensor = entry.parameter(name), values[value]
            if tensor is None:
                raise GraphError(f"{value} is read, which is not computed")
            if parameter in entry.lists:
                arguments[parameter].append(tensor)
            else:
                arguments[parameter] = tensor
        results = entry.compute(**arguments, **step.attributes)
        return results if isinstance(results, tuple) else (results,)

    def _check_output(self, name: str, result: Optional[Tensor], meta: Optional[tuple]) -> None:
        if result is None or meta is None:
            return
        dtype, shape = meta
        viewed = any(self._kinds[consumer] in VIEWS for consumer in self._consumers.get(name, []))
        fits = result.numel() == torch.Size(shape).numel() if viewed else tuple(result.shape) == shape
        if result.dtype != dtype or not fits:
            raise GraphError(f"output {name} is {result.dtype} {tuple(result.shape)}, the graph says {dtype} {shape}")


def _step(op: Any, wide: bool) -> Step:
    """Reads an operation; what the table doesn't know of it raises GraphError."""
    entry = OPERATIONS[op.type]
    attributes = {name: attribute(value) for name, value in op.attr.items() if not name.startswith("_")}
    names = attribute(op.attr["_input_name_key"])
    # A control edge is an order that data already gives, or none that matters here.
    sources = [source for source in op.input if not source.endswith(":-1")]
    fed = [(name, source) for name, source in zip(names, sources, strict=True) if source]
    try:
        for name, _ in fed:
            entry.parameter(name)
        unknown = sorted(set(attributes) - set(entry.attributes))
        if unknown:
            raise GraphError(f"attributes {unknown} are not known")
    except GraphError as error:
        raise GraphError(f"{op.type} {op.name}: {error}") from error
    if wide and "wide" in entry.attributes:
        attributes["wide"] = True
    return Step(op.name, op.type, fed, attributes, [metadata(description) for description in op.output_desc])


def _in_order(steps: list[Step], known: set[str]) -> list[Step]:
    """Every operation behind those that it takes from. torchair appends most in that order, not all."""
    known, ordered, waiting = set(known), [], steps
    while waiting:
        later = []
        for step in waiting:
            if all(value in known for _, value in step.inputs):
                ordered.append(step)
                known.update(f"{step.name}:{index}" for index in range(max(1, len(step.metas))))
            else:
                later.append(step)
        if len(later) == len(waiting):
            raise GraphError(f"{later[0].name} waits for itself or for nothing: {later[0].inputs}")
        waiting = later
    return ordered


def host_view(x: Tensor) -> Tensor:
    """A tensor of the simulated device as a CPU tensor over the same memory, which must outlive it."""
    if x.device.type == "cpu":
        return x
    if not x.is_contiguous():
        raise GraphError(f"an input of shape {tuple(x.shape)} is not contiguous")
    if not x.numel():
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


class SimulatedGraph:
    """In the place of torchair.core._backend.TorchNpuGraph."""

    wide = False
    # Every graph that was loaded, in order.
    loaded: list["SimulatedGraph"] = []

    def __init__(self, name: str = ""):
        self.name = str(name)

    def load(self, graph: Any, options: Optional[dict] = None) -> None:
        """Takes over a GraphDef and GE's options."""
        self.graph, self.options = graph, dict(options or {})
        SimulatedGraph.loaded.append(self)

    def compile(self) -> None:
        """Reads the graph. Raises GraphError for what the interpreter can't vouch for."""
        self.interpreter = Interpreter(self.graph, self.wide)

    def run(self, inputs: Sequence[Any], assigned_outputs: Sequence[Optional[Tensor]] = (),
            stream: Any = None) -> list[Tensor]:
        """Outputs on the inputs' device; one that is an input, written in place, is that input."""
        given = [host_view(x) if isinstance(x, Tensor) else torch.tensor(x) for x in inputs]
        device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
        results = []
        for index, result in enumerate(self.interpreter.run(given)):
            target = assigned_outputs[index] if index < len(assigned_outputs) else None
            if target is None:
                target = result.contiguous().clone().to(device)
            elif host_view(target).data_ptr() != result.data_ptr():
                host_view(target).copy_(result.view(target.shape))
            results.append(target)
        return results


def install(wide: bool = False) -> None:
    """From here on, what torchair compiles in this process is executed here; `wide` as in `Interpreter`."""
    SimulatedGraph.wide = wide
    _backend.TorchNpuGraph = SimulatedGraph
    # Newer operations ask which CANN there is; "" says that nothing is missing.
    _torchair.check_cann_compat = lambda *_: ""
    # A stored graph names its group by ranks. On a device HCCL's own name takes that place when the graph is loaded.
    fx2ge_converter.codegen_refresh_cache_pgname = _find_groups
    torch_npu.distributed._is_support_hccl_comm_name = lambda: True


def _find_groups(used: dict[str, tuple[list[int], str]]) -> str:
    """Code of a stored graph: the ranks' own group is the one that torchair will find under the names that it keeps."""
    distributed = "torch.distributed.distributed_c10d"
    return "\n".join(f"assert {distributed}._find_pg_by_ranks_and_tag({tag!r}, {list(ranks)}) is {distributed}.GroupMember.WORLD"
                     for ranks, tag in used.values())


def operations(graph: Any) -> Counter:
    """How many operations of each kind a GraphDef has, its edges left out."""
    return Counter(op.type for op in graph.op if op.type not in EDGES)
