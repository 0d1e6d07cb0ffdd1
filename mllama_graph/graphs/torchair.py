"""How torchair compiles a step for an NPU: its configuration, and its cache of one graph in one folder.

torchair caches by the text of a module, without shapes or source, and skips all guards on what it loads. So each graph
gets a folder of its own, which the graph store names by everything that matters; nothing else guards it.
"""

import itertools
import logging
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from mllama_graph.model.tree import Node, matrices

log = logging.getLogger(__name__)

_numbers = itertools.count()

# Number of the fractal layout in which the matrix unit reads (torch_npu.Format.FRACTAL_NZ).
FRACTAL_NZ = 29


def share_repeats(module: torch.fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
    """Keep one of equal operations: the masks and casts that every layer writes anew.

    A pass of torchair (CompilerConfig.post_grad_custom_pre_pass); torchair has none of its own, and runs this one on a
    graph that is functional.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    module.graph = fx_graph_cse(module.graph)
    module.recompile()


def compiler_config(mode: str = "max-autotune", frozen_parameter: bool = True, tiling_schedule_optimize: bool = True,
                    topology_sorting_strategy: str = "StableRDFS", static_kernel_compile: bool = False,
                    **elsewhere: Any) -> Any:
    """torchair's CompilerConfig. The arguments are config.TorchairChoice's; `elsewhere` are those that are no part of it."""
    import torch_npu  # noqa: F401  (makes torchair importable)
    import torchair

    config = torchair.CompilerConfig()
    config.mode = mode
    config.post_grad_custom_pre_pass = share_repeats
    experimental = config.experimental_config
    experimental.frozen_parameter = frozen_parameter
    if mode == "max-autotune":
        experimental.tiling_schedule_optimize = tiling_schedule_optimize
        experimental.topology_sorting_strategy = topology_sorting_strategy
    else:
        experimental.aclgraph._aclnn_static_shape_kernel = static_kernel_compile
        # Pages lie still, and are too large to be copied before each replay; inputs that moved are copied all the same.
        config.debug.aclgraph.clone_input = False
        _write_pages_in_place()
    return config


def _write_pages_in_place() -> None:
    """Have captured graphs write pages where they are. torchair knows which operations can; this one is not on its list,
    and would copy the whole pool twice a layer."""
    from torchair._acl_concrete_graph.graph_pass import register_inplaceable_npu_op

    register_inplaceable_npu_op("npu_scatter_pa_kv_cache_functional", "npu_scatter_pa_kv_cache", mutated_arg=[2, 3])


def key_fields() -> dict[str, Any]:
    """The compilers' versions: torchair's cache is bound to torch_npu, GE's compiled model to CANN."""
    from importlib.metadata import version

    from torch_npu.npu.utils import get_cann_version

    return {"torch_npu": version("torch_npu"), "cann": get_cann_version()}


def _cached(step: nn.Module, name: str, options: dict[str, Any], folder: Path) -> tuple[Callable, Path]:
    """torchair's callable for `step.forward`, and the file in which it keeps the graph.

    Every callable needs a code object of its own: torchair tells its graphs apart by code, and deletes the cache of one
    that it believes to see a second time. The function's name is part of the file's, and the same in every process.
    """
    import torch_npu  # noqa: F401  (makes torchair importable)
    import torchair
    from torchair.inference._cache_compiler import CompiledModel

    forward = type(step).forward
    code = forward.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    method = types.MethodType(types.FunctionType(code, forward.__globals__, name), step)
    given = {"config": compiler_config(**options), "dynamic": False, "cache_dir": str(folder),
             "ge_cache": options["ge_cache"] and options["mode"] == "max-autotune"}
    return torchair.inference.cache_compile(method, **given), Path(CompiledModel.get_cache_bin(method, **given))


def compile_step(step: nn.Module, name: str, inputs: list[Tensor], options: dict[str, Any], folder: Path) -> Callable:
    """Compile `step.forward(*inputs)` into `folder` by running it once; what runs it from then on.

    `name` is the graph's. What can't be lowered raises.
    """
    run, file = _cached(step, name, options, folder)
    # torchair warns of each of its options; what matters of that stands in conf/backend/torchair.yaml.
    with warnings.catch_warnings(record=True) as said:
        run(*inputs)
    for warning in said:
        log.info("%s: %s", name, warning.message)
    if not file.is_file():
        raise RuntimeError(f"torchair did not keep the graph {name}; its warnings in the log say why")
    return run


def load_step(step: nn.Module, name: str, options: dict[str, Any], folder: Path) -> Callable:
    """What runs a graph that `compile_step` left in `folder`, without tracing it. Raises FileNotFoundError."""
    run, file = _cached(step, name, options, folder)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} does not hold the graph {name} as this torchair would keep it")
    return run


def cast_to_nz(weights: Node) -> None:
    """Lay the matrices of linear layers out as the matrix unit reads them, in place; only an NPU can."""
    import torch_npu

    torch.npu.config.allow_internal_format = True
    for weight in matrices(weights):
        weight.data = torch_npu.npu_format_cast(weight.data, FRACTAL_NZ)
