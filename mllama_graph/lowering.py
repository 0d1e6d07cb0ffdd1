"""How torchair is asked to compile: its configuration, and the pass that computes once what layers have in common."""

from typing import Any

import torch
import torch.fx


def share_repeats(module: torch.fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
    """Keep one of equal operations: the masks and casts that every layer writes anew.

    A pass of torchair (CompilerConfig.post_grad_custom_pre_pass); torchair has none of its own, and runs this one on a
    graph that is functional.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    module.graph = fx_graph_cse(module.graph)
    module.recompile()


def compiler_config() -> Any:
    """torchair's CompilerConfig for graphs of the graph engine."""
    import torch_npu  # noqa: F401  (makes torchair importable)
    import torchair

    config = torchair.CompilerConfig()
    config.mode = "max-autotune"
    config.post_grad_custom_pre_pass = share_repeats
    return config
