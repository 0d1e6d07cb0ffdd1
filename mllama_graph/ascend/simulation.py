"""A simulated NPU: graphs that torchair compiles are executed by the interpreter instead of CANN.

The tensors' memory is the stubs' device memory, which is host memory: nothing is copied, and pages are written in place
as on a device.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch_npu
from torch import Tensor
from torchair._ge_concrete_graph import fx2ge_converter
from torchair.core import _backend, _torchair

from mllama_graph.ascend.ge_ops import GraphError
from mllama_graph.ascend.graphdef import GraphDef
from mllama_graph.ascend.interpreter import Interpreter


def host_view(x: Tensor) -> Tensor:
    """A tensor of the simulated device as a CPU tensor over the same memory. `x` must outlive it."""
    if x.device.type == "cpu":
        return x
    if not x.is_contiguous():
        raise GraphError(f"an input of shape {tuple(x.shape)} is not contiguous")
    if not x.numel():
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


class SimulatedGraph:
    """A compiled graph with the interface of torchair.core._backend.TorchNpuGraph, which it replaces."""

    # Whether attention accepts fp32, as in `Interpreter`.
    wide: ClassVar[bool] = False
    # Every graph that this process has loaded, in order.
    loaded: ClassVar[list["SimulatedGraph"]] = []

    def __init__(self, name: str = ""):
        self.name = str(name)

    def load(self, graph: GraphDef, options: dict[str, Any] | None = None) -> None:
        """Stores a graph and GE's options for it."""
        self.graph, self.options = graph, dict(options or {})
        SimulatedGraph.loaded.append(self)

    def compile(self) -> None:
        """Reads the graph. Raises GraphError for what the interpreter does not know."""
        self.interpreter = Interpreter(self.graph, self.wide)

    def run(
        self, inputs: Sequence[Any], assigned_outputs: Sequence[Tensor | None] = (), stream: Any = None
    ) -> list[Tensor]:
        """Runs the graph; returns its outputs on the inputs' device.

        An output with an assigned tensor is copied into it unless both share their memory already.
        """
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
    """Makes this process execute graphs of torchair with the interpreter. `wide`: see `Interpreter`."""
    SimulatedGraph.wide = wide
    _backend.TorchNpuGraph = SimulatedGraph
    # Newer operations ask which CANN is installed; "" says that nothing is missing.
    _torchair.check_cann_compat = lambda *_: ""
    # A stored graph names its process group by ranks. On a device that name is replaced by HCCL's own on loading.
    fx2ge_converter.codegen_refresh_cache_pgname = _group_check_code
    torch_npu.distributed._is_support_hccl_comm_name = lambda: True


def _group_check_code(used: dict[str, tuple[list[int], str]]) -> str:
    """Code for a stored graph which checks that each group that the graph names is the group of all ranks."""
    module = "torch.distributed.distributed_c10d"
    return "\n".join(
        f"assert {module}._find_pg_by_ranks_and_tag({tag!r}, {list(ranks)}) is {module}.GroupMember.WORLD"
        for ranks, tag in used.values()
    )
