"""Runs a function through torchair and the interpreter, and says what graph it became."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu  # noqa: F401  (makes torchair importable)
import torchair
from torch import Tensor
from torch.utils import _pytree as pytree

from mllama_graph.ascend.interpreter import SimulatedGraph, host_view, install, operations
from mllama_graph.graphs.torchair import compiler_config


def to_npu(tree: Any) -> Any:
    """Tensors of a tree on the simulated device."""
    return pytree.tree_map(lambda x: x.to("npu") if isinstance(x, Tensor) else x, tree)


def to_host(tree: Any) -> Any:
    """Copies on the CPU: the device's memory may be gone before the copy is."""
    return pytree.tree_map(lambda x: host_view(x).clone() if isinstance(x, Tensor) else x, tree)


@dataclass
class Lowered:
    """A function as torchair compiles it. `graphs` are those loaded since."""

    call: Callable
    graphs: list[SimulatedGraph]

    def __call__(self, *given: Any) -> Any:
        """Results on the CPU. What the function writes, it writes into `given`, tensors of the device."""
        before = len(SimulatedGraph.loaded)
        with torch.no_grad():
            results = to_host(self.call(*given))
        self.graphs += SimulatedGraph.loaded[before:]
        return results

    @property
    def operations(self) -> dict[str, int]:
        """The one graph's operations."""
        [graph] = self.graphs
        return dict(operations(graph.graph))


def lower(function: Callable, wide: bool = False) -> Lowered:
    """A whole graph with static shapes, compiled when it is first called; `wide` as in Interpreter."""
    install(wide)
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=compiler_config())
    return Lowered(torch.compile(function, backend=backend, dynamic=False, fullgraph=True), [])
