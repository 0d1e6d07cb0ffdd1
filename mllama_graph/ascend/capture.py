"""Lowers a step to the graph that CANN would compile, without executing it or allocating device memory.

Weights, pages and inputs are fake tensors on the device, so that the largest model takes almost no memory. Dynamo, AOT
autograd and torchair are the real ones. The process must have been started with the stubs (stubs.environment).
"""

import contextlib
import gc
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  (makes torchair importable)
import torchair
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import GroupName
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torchair._ge_concrete_graph.fx2ge_converter import _get_converter
from torchair.npu_fx_compiler import _NpuGraphConverter

from mllama_graph.ascend.graphdef import GraphDef
from mllama_graph.ascend.origin import origin
from mllama_graph.ascend.simulation import install
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.step import Step, arguments
from mllama_graph.graphs.torchair import compiler_config
from mllama_graph.model.formats import Formats
from mllama_graph.model.inputs import Pages
from mllama_graph.model.ops import Ops
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.tree import Weights
from mllama_graph.ops.npu import npu_ops
from mllama_graph.ops.npu_layout import lay_out
from mllama_graph.ops.ranks import GROUP
from mllama_graph.plan.bucket import Bucket

# Prefixes of the names in `Capture.inputs`; a step's own inputs have the prefix "given".
WEIGHTS, PAGES = "weights", ("pages", "image_pages")
# The mode of torchair that compiles with GE. The other mode, npugraph_ex, produces no GraphDef.
GE_MODE = "max-autotune"


class CaptureError(Exception):
    """torchair can't lower a step to one static graph. The message gives the failure, then the line of the model."""


@dataclass(frozen=True)
class Capture:
    """A lowered step.

    graph: the GraphDef that CANN would compile.
    lines: operation name -> the line of the model it comes from; operations that torchair's own passes add are missing.
    inputs: name of a Data operation -> the tensor it stands for: weights.text.layers.0.qkv.weight, pages.0.1,
    image_pages.2.0, given.slot_T.
    """

    graph: GraphDef
    lines: dict[str, str]
    inputs: dict[str, str]

    def line(self, name: str) -> str:
        """The line of the model that an operation comes from, for a message."""
        return self.lines.get(name, "added by torchair")


@dataclass
class _Record:
    """What is recorded while torchair converts a step. names: names of the example inputs, in order."""

    names: list[str] = field(default_factory=list)
    graph: Any = None
    lines: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    failure: CaptureError | None = None


class _CapturedError(Exception):
    """Raised to end a compilation once the graph exists, since guards and generated code are not needed."""


def capture(spec: GraphSpec, bucket: Bucket, ops: Ops | None = None) -> Capture:
    """Lowers a bucket's step for the rank that `spec` names. `ops` replaces the operations of ops/npu.py.

    With several ranks, this process joins a fake process group of that size. Raises CaptureError.
    """
    install()
    _join(spec.rank, spec.world_size)
    mode, weights, pages, image_pages = _model(spec)
    record, example = _Record(), spec.prepared(spec.example(bucket))
    # torchair warns about each of its options and about deprecations inside torch.
    with warnings.catch_warnings(record=True), mode, torch.no_grad(), _without_collector(), _recorded(record):
        own = ops or npu_ops(spec.world_size, GE_MODE, spec.tiled)
        step = Step(bucket.phase, weights, spec.shape, spec.compute, own, spec.candidates)
        given = arguments(bucket, pytree.tree_map(_fake, example), pages, image_pages)
        _compile(step, given, dict(spec.options) | {"mode": GE_MODE}, record)
    return Capture(record.graph.model.graph[0], record.lines, record.inputs)


@lru_cache(maxsize=1)
def _model(spec: GraphSpec) -> tuple[FakeTensorMode, Weights, Pages, Pages]:
    """A rank's weights and pages as fake tensors, kept for the next bucket of the same spec."""
    with (mode := FakeTensorMode()):
        weights = spec.unfilled_weights(spec.shard)
        lay_out(weights, spec.compute, spec.tiled, spec.vision_heads)
        return mode, weights, *spec.unfilled_pages()


def _fake(leaf: Any) -> Any:
    """A tensor as one of the fake mode that is active."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _join(rank: int, world: int) -> None:
    """Registers a fake process group of `world` ranks, of which only this process exists."""
    if world == 1 or (dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) == (rank, world)):
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None, "initialised just now"
    torch._C._distributed_c10d._register_process_group(GroupName(GROUP), group)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Switches Python's cyclic garbage collector off.

    Compilers make many objects and few cycles; the collector would take a third of their time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile(step: Step, given: tuple[Any, Pages, Pages], options: dict[str, Any], record: _Record) -> None:
    """Lowers a step with torchair. Raises CaptureError."""
    names = _names(step, given)
    lower = torchair.get_npu_backend(compiler_config=compiler_config(**options))

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        # A tensor that is not an input of the step was created before tracing: a constant.
        record.names = [names.get(id(tensor), "constant") for tensor in inputs]
        lower(module, inputs)
        raise _CapturedError

    torch._dynamo.reset()
    try:
        torch.compile(step.forward, backend=backend, dynamic=False, fullgraph=True)(*given)
    except Exception as error:
        inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        if not isinstance(inner, _CapturedError):
            raise record.failure or _failure(inner) from error


def _names(step: Step, given: tuple[Any, Pages, Pages]) -> dict[int, str]:
    """id(tensor) -> name for all tensors of a step, as in `Capture.inputs`."""
    named = {
        id(tensor): f"{WEIGHTS}.{path}"
        for tensors in (step.weights.named_parameters, step.weights.named_buffers)
        for path, tensor in tensors()
    }
    for root, tree in zip(("given", *PAGES), given, strict=True):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            parts = (str(getattr(key, "name", getattr(key, "idx", key))) for key in path)
            named[id(leaf)] = ".".join([root, *parts])
    return named


@contextlib.contextmanager
def _recorded(record: _Record) -> Iterator[None]:
    """Records which operations torchair's converter adds for each node of the traced graph, and the node's origin."""
    original, position = _NpuGraphConverter.run_node, 0

    def run_node(converter: Any, node: torch.fx.Node) -> Any:
        nonlocal position
        graph = record.graph = converter._graph.graph
        before = len(graph.op)
        try:
            result = original(converter, node)
        except Exception as error:
            missing = node.op == "call_function" and _get_converter(node.target) is None
            what = "torchair has no converter" if missing else _first_line(error)
            record.failure = CaptureError(f"{node.target}: {what}\n{origin(node.stack_trace or '')}")
            raise
        added = [op.name for op in graph.op[before:]]
        if node.op == "placeholder":
            record.inputs |= dict.fromkeys(added, record.names[position])
            position += 1
        else:
            record.lines |= dict.fromkeys(added, origin(node.stack_trace or ""))
        return result

    _NpuGraphConverter.run_node = run_node
    try:
        yield
    finally:
        _NpuGraphConverter.run_node = original


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _failure(error: BaseException) -> CaptureError:
    """The error of a trace that failed before torchair's converter ran."""
    stack = getattr(error, "real_stack", None)
    trace = "".join(stack.format()) if stack else str(error)
    # Dynamo wraps the error that an operation raised in a message of its own.
    inner = re.search(r"got (\w+\(.*\))", str(error))
    return CaptureError(f"{_first_line(error)}{f': {inner[1]}' if inner else ''}\n{origin(trace)}")


def shortened(
    shape: ModelShape, self_layers: int = 1, cross_layers: int = 1, local_layers: int = 1, global_layers: int = 1
) -> ModelShape:
    """The same model with at most the given number of layers of each kind.

    A self-attention layer comes first, as in the released models. The vision tower returns as many features as before.
    """
    text, vision = shape.text, shape.vision
    selves, crosses = min(self_layers, len(text.self_layers)), min(cross_layers, len(text.cross_layers))
    locals_, globals_ = min(local_layers, vision.layers), min(global_layers, vision.global_layers)
    return replace(
        shape,
        text=replace(text, layers=selves + crosses, cross_layers=tuple(range(1, 1 + crosses))),
        vision=replace(
            vision,
            layers=locals_,
            global_layers=globals_,
            features=tuple(min(layer, locals_ - 1) for layer in vision.features),
        ),
    )


def shortened_formats(formats: Formats, whole: ModelShape, short: ModelShape) -> Formats:
    """The formats of a shortened model's layers: those that the layers have in the whole model."""
    kept = dict(zip(whole.text.self_layers, short.text.self_layers))
    kept |= dict(zip(whole.text.cross_layers, short.text.cross_layers))
    vision = {"vision.local_layers": short.vision.layers, "vision.global_layers": short.vision.global_layers}
    found = []
    for path, form in formats:
        if numbered := re.fullmatch(r"(.*layers)\.(\d+)\.(.*)", path):
            kind, number, leaf = numbered[1], int(numbered[2]), numbered[3]
            at = kept.get(number) if kind == "text.layers" else number if number < vision[kind] else None
            if at is None:
                continue
            path = f"{kind}.{at}.{leaf}"
        found.append((path, form))
    return tuple(found)
