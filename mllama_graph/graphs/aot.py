"""Inductor's ahead-of-time packages: tracing a step, compiling it, and running the package.

Packages contain no weights: all graphs of a run bind the same Parameters.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllama_graph import native
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.step import Flat, Output, Step, arguments, tensors
from mllama_graph.model.ops import Ops
from mllama_graph.model.table import Shard
from mllama_graph.ops.ranks import GROUP
from mllama_graph.ops.select import ops_for
from mllama_graph.plan.bucket import Bucket

# Runs a step's graph: takes the step's arguments, returns its output.
Graph = Callable[..., Output]


def ops_of(spec: GraphSpec) -> Ops:
    """The operations with which a spec's graphs are traced."""
    mode = dict(spec.options).get("mode")
    return ops_for(spec.device, spec.world_size, spec.collectives, spec.kernels, mode, spec.tiled)


def trace(spec: GraphSpec, bucket: Bucket, shard: Shard | None = None) -> torch.export.ExportedProgram:
    """Export one rank's step of a bucket as a whole graph with static shapes. Raises the errors of torch.export."""
    weights = spec.unfilled_weights(shard or Shard(0, spec.world_size))
    inputs = arguments(bucket, spec.example(bucket), *spec.unfilled_pages())
    step = Flat(Step(bucket.phase, weights, spec.shape, spec.compute, ops_of(spec), spec.candidates), inputs)
    return torch.export.export(step, tuple(tensors(inputs)), strict=False)


def compile_package(spec: GraphSpec, bucket: Bucket, path: Path) -> None:
    """Compile a bucket's step into a package at `path`. Weights are allocated for tracing, but never written."""
    # This import loads the compiler.
    from mllama_graph.graphs.build import build_package

    # The generated loops need the number of threads that they were built for: more would overrun their buffers.
    settings = {"cpp.threads": spec.threads} | dict(spec.options)
    # Whether all nodes call operators of ours: torch.distributed's collectives are torch's, and so is the search for
    # candidates.
    calls = spec.kernels == "native" and (spec.world_size == 1 or spec.collectives == "shared_memory")
    calls = calls and not spec.candidates
    build_package(trace(spec, bucket), path, settings, spec.device == "cpu", calls)


_stand_in: torch.distributed.ProcessGroup | None = None


def prepare_tracing(spec: GraphSpec, folder: Path) -> None:
    """Prepare a process that is not a rank to trace graphs of ranks. `folder` holds native libraries."""
    global _stand_in
    if spec.kernels == "native":
        for library in spec.libraries:
            native.declare_operators(library)
    if spec.world_size > 1 and spec.collectives == "shared_memory":
        native.load("collectives", folder)
        native.declare(spec.world_size)
    elif spec.world_size > 1 and _stand_in is None:
        # Inductor looks up the group to log its size. The registry does not keep it alive.
        # torch's stub lacks this overload.
        _stand_in = torch.distributed.ProcessGroup(0, spec.world_size)  # type: ignore[call-arg]
        torch._C._distributed_c10d._register_process_group(GROUP, _stand_in)


def _output(outputs: list[Tensor]) -> Output:
    return tuple(outputs) if len(outputs) > 1 else outputs[0] if outputs else None


class Package:
    """A loaded package, bound to the run's weights. Does not import the compiler."""

    def __init__(self, path: Path, weights: dict[str, Tensor], captured: bool = False):
        # The third argument is run_single_threaded, which capturing the package in a CUDA graph requires.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", captured, 1, -1)
        names = self._loader.get_constant_fqns()
        # (constants, use_inactive, check_full_update, user_managed)
        self._loader.load_constants({name: weights[name] for name in names}, False, True, True)

    @property
    def weight_names(self) -> list[str]:
        """Names of the weights that the package takes, as in `Flat`."""
        return list(self._loader.get_constant_fqns())

    def __call__(self, *inputs: Any) -> Output:
        return _output(self._loader.boxed_run(tensors(inputs)))


class RankPackage:
    """A loaded package of a CPU rank, which releases the GIL while it runs, since it may wait for other ranks.

    A package that waits for gloo would otherwise hold the GIL that gloo's own thread needs (pytorch issue 197516).
    """

    def __init__(self, path: Path, weights: dict[str, Tensor], folder: Path):
        native.load("runner", folder)
        self._ops = torch.ops.mllama_graph
        self._handle = self._ops.load_package(str(path), -1)
        names = self._ops.constant_names(self._handle)
        self._ops.load_constants(self._handle, names, [weights[name] for name in names])

    def __call__(self, *inputs: Any) -> Output:
        outputs, _ = self._ops.run_package(self._handle, tensors(inputs))
        return _output(outputs)


def load_package(path: Path, weights: dict[str, Tensor], spec: GraphSpec, folder: Path) -> Graph:
    """Load a stored graph, which is called with a step's arguments. `folder` holds native libraries."""
    if spec.world_size > 1 and spec.device == "cpu":
        return RankPackage(path, weights, folder)
    return Package(path, weights, captured=spec.device == "cuda")
