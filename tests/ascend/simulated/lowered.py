"""Compiles a function with torchair, runs it in the interpreter and gives access to its graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu  # noqa: F401  (makes torchair importable)
import torchair
from torch import Tensor
from torch.utils import _pytree as pytree

from mllama_graph.ascend.graphdef import count_operations
from mllama_graph.ascend.simulation import SimulatedGraph, host_view, install
from mllama_graph.graphs.torchair import compiler_config


def to_npu(tree: Any) -> Any:
    """A tree whose tensors are on the simulated device."""
    return pytree.tree_map(lambda x: x.to("npu") if isinstance(x, Tensor) else x, tree)


def to_host(tree: Any) -> Any:
    """A tree whose tensors are copies on the CPU, since a view does not keep the device's memory alive."""
    return pytree.tree_map(lambda x: host_view(x).clone() if isinstance(x, Tensor) else x, tree)


@dataclass
class Lowered:
    """A function compiled by torchair. `graphs`: the graphs that its calls loaded."""

    call: Callable[..., Any]
    graphs: list[SimulatedGraph]

    def __call__(self, *given: Any) -> Any:
        """Results on the CPU. Writes in place change `given`, tensors of the simulated device."""
        before = len(SimulatedGraph.loaded)
        with torch.no_grad():
            results = to_host(self.call(*given))
        self.graphs += SimulatedGraph.loaded[before:]
        return results

    @property
    def operations(self) -> dict[str, int]:
        """Number of operations of each type in the only graph."""
        [graph] = self.graphs
        return dict(count_operations(graph.graph))


def lower(function: Callable[..., Any], wide: bool = False) -> Lowered:
    """Lowers a function to one graph of static shapes, at its first call. `wide`: see `Interpreter`."""
    install(wide)
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=compiler_config())
    return Lowered(torch.compile(function, backend=backend, dynamic=False, fullgraph=True), [])
