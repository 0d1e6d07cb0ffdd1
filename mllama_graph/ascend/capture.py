"""Lowers a step to the graph that CANN would get, and stops there: nothing is executed and nothing allocated.

Weights, pages and inputs are fake tensors of the device, so that the largest model takes no memory to speak of. Dynamo,
AOT autograd and torchair are the real ones. Needs a process that was started with the stubs (stubs.environment).
"""

import contextlib
import gc
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch_npu
import torchair
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torchair._ge_concrete_graph.fx2ge_converter import _get_converter
from torchair.npu_fx_compiler import _NpuGraphConverter

from mllama_graph.ascend.interpreter import install
from mllama_graph.plan.buckets import Bucket
from mllama_graph.graphs.aot import GraphSpec, Step, arguments, unfilled
from mllama_graph.graphs.torchair import compiler_config
from mllama_graph.model.tree import Node, Pages
from mllama_graph.model.ops import Ops
from mllama_graph.ops.npu import npu_ops
from mllama_graph.ops.ranks import GROUP
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard

PACKAGE = Path(__file__).parents[1]
TORCH = (Path(torch.__file__).parent, Path(torch_npu.__file__).parent)
FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)\n\s*(.*)')
# The roots of `Capture.inputs`.
WEIGHTS, PAGES = "weights", ("pages", "image_pages")


class CaptureError(Exception):
    """A step that torchair can't lower to one static graph: what failed, and behind it the line of the model."""


@dataclass(frozen=True)
class Capture:
    """A lowered step. `graph` is the GraphDef that CANN would get.

    lines: where each operation comes from, by its name; those that torchair's own passes add are not there.
    inputs: what each Data is, by its name: weights.text.layers.0.qkv.weight, pages.0.1, image_pages.2.0, given.slot_T.
    """

    graph: Any
    lines: dict[str, str]
    inputs: dict[str, str]

    def line(self, name: str) -> str:
        """Where an operation comes from, for a message."""
        return self.lines.get(name, "added by torchair")


@dataclass
class _Record:
    """What is seen while torchair converts. `names` are those of the example inputs, in their order."""

    names: list[str] = field(default_factory=list)
    graph: Any = None
    lines: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    failure: Optional[CaptureError] = None


class _Captured(Exception):
    """Ends a compilation once the graph is there: guards and generated code are of no use."""


def capture(spec: GraphSpec, bucket: Bucket, ops: Optional[Ops] = None) -> Capture:
    """A bucket's step of the rank that `spec` names, with `ops` in the place of NPU operations.

    Raises CaptureError. Joins this process to a stand-in for the ranks' group, where there are several.
    """
    install()
    _join(spec.rank, spec.world_size)
    mode, weights, pages, image_pages = _model(spec)
    record = _Record()
    # torchair warns of each of its options and of torch's own deprecations.
    with warnings.catch_warnings(record=True), mode, torch.no_grad(), _uncollected(), _recorded(record):
        step = Step(bucket.phase, weights, spec.shape, ops or npu_ops(spec.world_size))
        given = arguments(bucket, spec.example(bucket), pages, image_pages)
        # The graph that CANN gets, whatever mode the run would compile in.
        _compile(step, given, dict(spec.options) | {"mode": "max-autotune"}, record)
    return Capture(record.graph.model.graph[0], record.lines, record.inputs)


@lru_cache(maxsize=1)
def _model(spec: GraphSpec) -> tuple[FakeTensorMode, Node, Pages, Pages]:
    """A rank's weights and pages, kept from one bucket to the next."""
    with (mode := FakeTensorMode()):
        return mode, unfilled(spec, Shard(spec.rank, spec.world_size)), *spec.pages(torch.empty)


def _join(rank: int, world: int) -> None:
    """A group of `world` ranks, of which this process is the only one there is."""
    if world == 1 or dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) == (rank, world):
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    torch._C._distributed_c10d._register_process_group(GROUP, dist.group.WORLD)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: compilers make many objects and few cycles, and it takes a third of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile(step: Step, given: tuple, options: dict[str, Any], record: _Record) -> None:
    names = _names(step, given)
    lower = torchair.get_npu_backend(compiler_config=compiler_config(**options))

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        # A tensor that is none of the step's was made before it: a constant of the program.
        record.names = [names.get(id(tensor), "constant") for tensor in inputs]
        lower(module, inputs)
        raise _Captured

    torch._dynamo.reset()
    try:
        torch.compile(step.forward, backend=backend, dynamic=False, fullgraph=True)(*given)
    except Exception as error:
        inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        if not isinstance(inner, _Captured):
            raise record.failure or _failure(inner) from error


def _names(step: Step, given: tuple) -> dict[int, str]:
    """What a step's tensors are, by their identity."""
    named = {id(tensor): f"{WEIGHTS}.{path}" for tensors in (step.weights.named_parameters, step.weights.named_buffers)
             for path, tensor in tensors()}
    for root, tree in zip(("given", *PAGES), given, strict=True):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            named[id(leaf)] = ".".join([root, *(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)])
    return named


@contextlib.contextmanager
def _recorded(record: _Record) -> Iterator[None]:
    """Has torchair's converter tell what each node of the traced graph became."""
    original, position = _NpuGraphConverter.run_node, 0

    def run_node(converter: _NpuGraphConverter, node: torch.fx.Node) -> Any:
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
            nonlocal position
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


def shortened(shape: ModelShape, selves: int = 1, crosses: int = 1, locals_: int = 1, globals_: int = 1) -> ModelShape:
    """A model of few layers of each kind and otherwise the same."""
    text, vision = shape.text, shape.vision
    selves, crosses = min(selves, len(text.self_layers)), min(crosses, len(text.cross_layers))
    locals_, globals_ = min(locals_, vision.layers), min(globals_, vision.global_layers)
    # A self-attention layer first, as in the released models; features keep their number.
    return replace(
        shape, text=replace(text, layers=selves + crosses, cross_layers=tuple(range(1, 1 + crosses))),
        vision=replace(vision, layers=locals_, global_layers=globals_,
                       features=tuple(min(layer, locals_ - 1) for layer in vision.features)))


def origin(trace: str) -> str:
    """The line of the model in a stack trace with its source, and behind it the innermost line that it calls."""
    frames = [match.groups() for match in FRAME.finditer(trace) if not any(p in Path(match[1]).parents for p in TORCH)]
    model = [frame for frame in frames if PACKAGE / "model" in Path(frame[0]).parents]
    if not model:
        return " <- ".join(_place(frame) for frame in frames[-1:]) or "no line is known"
    called = "" if frames[-1] == model[-1] else f" <- {_place(frames[-1])}"
    return f"{_place(model[-1])}: {model[-1][3]}{called}"


def _place(frame: tuple[str, str, str, str]) -> str:
    path, line, function, _ = frame
    inside = PACKAGE.parent in Path(path).parents
    return f"{Path(path).relative_to(PACKAGE.parent) if inside else Path(path).name}:{line} in {function}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _failure(error: Exception) -> CaptureError:
    """Of a trace that ended before torchair's converter began."""
    stack = getattr(error, "real_stack", None)
    trace = "".join(stack.format()) if stack else str(error)
    # Dynamo heads what an operation raised with a line of its own.
    inner = re.search(r"got (\w+\(.*\))", str(error))
    return CaptureError(f"{_first_line(error)}{f': {inner[1]}' if inner else ''}\n{origin(trace)}")
