"""Compiling a step with torchair for an NPU: its configuration, and its cache with one folder per graph.

torchair's cache is keyed by the text of a module, without shapes or source, and loaded graphs have no guards. Each
graph therefore has its own folder, which is named by the graph store's key and so by everything that matters.
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
from mllama_graph.graphs.step import Flat, Output, Step, arguments, tensors
from mllama_graph.model.inputs import Pages
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Weights, linears
from mllama_graph.plan.bucket import Bucket

log = logging.getLogger(__name__)

_numbers = itertools.count()

# Format number of the fractal layout that the matrix unit reads (torch_npu.Format.FRACTAL_NZ).
FRACTAL_NZ = 29


def share_repeats(module: torch.fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
    """Eliminate common subexpressions, such as the masks and casts that every layer repeats.

    A pass of torchair (CompilerConfig.post_grad_custom_pre_pass): torchair has no such pass of its own, and runs
    this one on a functional graph.
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
    """torchair's CompilerConfig from the fields of config.TorchairChoice; `elsewhere` takes the other ones."""
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
        # Pages keep their address and are too large to copy before each replay; inputs that moved are still copied.
        config.debug.aclgraph.clone_input = False
        _write_pages_in_place()
    return config


def _write_pages_in_place() -> None:
    """Have captured graphs write pages in place.

    torchair has a list of operations that can. This one is missing from it, and would copy the whole pool twice per
    layer.
    """
    from torchair._acl_concrete_graph.graph_pass import register_inplaceable_npu_op

    register_inplaceable_npu_op("npu_scatter_pa_kv_cache_functional", "npu_scatter_pa_kv_cache", mutated_arg=[2, 3])


def key_fields() -> dict[str, Any]:
    """Versions of the compilers: torchair's cache depends on torch_npu's, GE's compiled model on CANN's.

    The simulation states a version of CANN, too (cann_stubs.cpp).
    """
    from importlib.metadata import version

    from torch_npu.npu.utils import get_cann_version

    return {"torch_npu": version("torch_npu"), "cann": get_cann_version()}


def _cached(step: nn.Module, name: str, options: dict[str, Any], folder: Path) -> tuple[Callable, Path]:
    """torchair's callable for `step.forward`, and the file in which it keeps the graph.

    Every callable needs its own code object: torchair identifies graphs by code object, and deletes the cache of one
    that it takes for a repetition. The function's name is part of the file's name, and the same in every process.
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

    `name` is the graph's. Raises torchair's errors for what it can't lower.
    """
    run, file = _cached(step, name, options, folder)
    # torchair warns about each of its options, which conf/backend/torchair.yaml explains: the log suffices.
    with warnings.catch_warnings(record=True) as said:
        run(*inputs)
    for warning in said:
        log.info("%s: %s", name, warning.message)
    if not file.is_file():
        raise RuntimeError(f"torchair did not keep the graph {name}; its warnings in the log say why")
    return run


def load_step(step: nn.Module, name: str, options: dict[str, Any], folder: Path) -> Callable:
    """Load the callable that `compile_step` stored in `folder`, without tracing. Raises FileNotFoundError."""
    run, file = _cached(step, name, options, folder)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} does not hold the graph {name} in the file of this torchair version")
    return run


class NpuGraph:
    """A graph that torchair compiled for this rank's step; it uses the module's own weights.

    prepared: turns a step's inputs on the host into those of the graph, on the device.
    """

    def __init__(self, run: Callable[..., Output], prepared: Callable[[Any], Any]):
        self._run, self._prepared = run, prepared

    def __call__(self, given: Any, *pages: Any, fill: Callable[[Any], Any] | None = None) -> Output:
        """Run the graph. `fill`: what else happens to the inputs on the device (engine/feedback.py)."""
        made = self._prepared(given)
        return self._run(*tensors((fill(made) if fill else made, *pages)))


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
    """A bucket's graph for the rank with these weights and pages: loaded from `folder`, or compiled into it.

    Compiling runs the graph once, on padding. `name` identifies it. Raises torchair's errors for what it can't lower.
    Image pages have no scratch slots: those that a vision graph writes when it is compiled may hold another image's
    K/V, and are restored.
    """
    inputs = arguments(bucket, spec.prepared(spec.example(bucket)), *pages)
    step = Flat(Step(bucket.phase, weights, spec.shape, spec.compute, ops, spec.candidates), inputs)
    options = dict(spec.options)
    if stored:
        return NpuGraph(load_step(step, name, options, folder), spec.prepared)
    written = [data[: bucket.image_pages] for layer in pages[1] for data in layer] if bucket.phase == "vision" else []
    kept = [data.cpu() for data in written]
    run = compile_step(step, name, tensors(inputs), options, folder)
    for data, before in zip(written, kept, strict=True):
        data.copy_(before)
    return NpuGraph(run, spec.prepared)


def cast_to_nz(weights: Weights) -> None:
    """Convert the weights of linear layers, in place and on an NPU, to the layout that its matrix unit reads.

    They have been laid out for it (npu_layout.py); quantised ones stay as they are where their kernel takes no NZ.
    """
    import torch_npu

    from mllama_graph.ops.npu_quantised import in_tiles

    torch_npu.npu.config.allow_internal_format = True
    for linear in linears(weights):
        # int8 weights have been laid out with their inputs first.
        if linear.format is None or in_tiles(linear.format, linear.weight.shape[0], True):
            linear.weight.data = torch_npu.npu_format_cast(linear.weight.data, FRACTAL_NZ)
