"""Compiling a step with torchair for an NPU: its configuration, and its cache of one graph per folder.

torchair's cache is keyed by the text of a module, without shapes or source, and what it loads has no guards. Each graph
therefore has a folder of its own, whose name, the graph store's key, covers everything that matters.
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

from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.step import Flat, Step, arguments, tensors
from mllama_graph.model.inputs import Pages
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Weights, matrices
from mllama_graph.plan.bucket import Bucket

log = logging.getLogger(__name__)

_numbers = itertools.count()

# Number of the fractal layout in which the matrix unit reads (torch_npu.Format.FRACTAL_NZ).
FRACTAL_NZ = 29


def share_repeats(module: torch.fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
    """Keep one of several equal operations, such as the masks and casts that every layer repeats.

    A pass of torchair (CompilerConfig.post_grad_custom_pre_pass): torchair has none of its own, and runs this one on a
    functional graph.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    module.graph = fx_graph_cse(module.graph)
    module.recompile()


def compiler_config(
    mode: str = "max-autotune",
    frozen_parameter: bool = True,
    tiling_schedule_optimize: bool = True,
    topology_sorting_strategy: str = "StableRDFS",
    static_kernel_compile: bool = False,
    **elsewhere: Any,
) -> Any:
    """torchair's CompilerConfig. The arguments are those of config.TorchairChoice; `elsewhere` takes the ones used elsewhere."""
    import torch_npu  # noqa: F401  # torchair expects its device to be registered
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
    """Have captured graphs write pages in place.

    torchair has a list of operations that can; this one is missing from it, and would copy the whole pool twice per layer.
    """
    from torchair._acl_concrete_graph.graph_pass import register_inplaceable_npu_op

    register_inplaceable_npu_op("npu_scatter_pa_kv_cache_functional", "npu_scatter_pa_kv_cache", mutated_arg=[2, 3])


def key_fields() -> dict[str, Any]:
    """The compilers' versions: torchair's cache is bound to a torch_npu version, GE's compiled model to a CANN version."""
    from importlib.metadata import version

    from torch_npu.npu.utils import get_cann_version

    return {"torch_npu": version("torch_npu"), "cann": get_cann_version()}


def _cached(step: nn.Module, name: str, options: dict[str, Any], folder: Path) -> tuple[Callable, Path]:
    """torchair's callable for `step.forward`, and the file in which it keeps the graph.

    Every callable needs a code object of its own: torchair distinguishes graphs by code object, and deletes the cache of
    one that it believes to see again. The function's name is part of the file's name, and equal in every process.
    """
    import torch_npu  # noqa: F401  # torchair expects its device to be registered
    import torchair
    from torchair.inference._cache_compiler import CompiledModel

    forward = type(step).forward
    code = forward.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    method = types.MethodType(types.FunctionType(code, forward.__globals__, name), step)
    given = {
        "config": compiler_config(**options),
        "dynamic": False,
        "cache_dir": str(folder),
        "ge_cache": options["ge_cache"] and options["mode"] == "max-autotune",
    }
    return torchair.inference.cache_compile(method, **given), Path(CompiledModel.get_cache_bin(method, **given))


def compile_step(step: nn.Module, name: str, inputs: list[Tensor], options: dict[str, Any], folder: Path) -> Callable:
    """Compile `step.forward(*inputs)` into `folder` by running it once; returns the compiled callable.

    `name` is the graph's. Raises what can't be lowered.
    """
    run, file = _cached(step, name, options, folder)
    # torchair warns about each of its options; conf/backend/torchair.yaml says what matters of that.
    with warnings.catch_warnings(record=True) as said:
        run(*inputs)
    for warning in said:
        log.info("%s: %s", name, warning.message)
    if not file.is_file():
        raise RuntimeError(f"torchair did not keep the graph {name}; its warnings in the log say why")
    return run


def load_step(step: nn.Module, name: str, options: dict[str, Any], folder: Path) -> Callable:
    """The callable that `compile_step` left in `folder`, loaded without tracing. Raises FileNotFoundError."""
    run, file = _cached(step, name, options, folder)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} does not hold the graph {name} as this torchair would keep it")
    return run


class NpuGraph:
    """A graph that torchair compiled for this rank's step: the weights are the module's own."""

    def __init__(self, run: Callable[..., Tensor | None]):
        self._run = run

    def __call__(self, *inputs: Any) -> Tensor | None:
        return self._run(*tensors(inputs))


def npu_graph(
    spec: GraphSpec,
    bucket: Bucket,
    weights: Weights,
    pages: tuple[Pages, Pages],
    ops: Ops,
    name: str,
    folder: Path,
    stored: bool,
) -> NpuGraph:
    """A bucket's graph for the rank whose weights and pages these are: loaded from `folder`, or compiled into it.

    Compiling runs the graph once, on padding. `name` tells graphs apart. Raises what can't be lowered.
    """
    inputs = arguments(bucket, spec.example(bucket), *pages)
    step = Flat(Step(bucket.phase, weights, spec.shape, ops), inputs)
    options = dict(spec.options)
    if stored:
        return NpuGraph(load_step(step, name, options, folder))
    return NpuGraph(compile_step(step, name, tensors(inputs), options, folder))


def cast_to_nz(weights: Weights) -> None:
    """Convert the matrices of linear layers in place to the layout that the matrix unit reads; only an NPU can."""
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True
    for weight in matrices(weights):
        weight.data = torch_npu.npu_format_cast(weight.data, FRACTAL_NZ)
