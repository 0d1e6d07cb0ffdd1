"""Compiled graphs: what a graph is, what its key says, how it is compiled and loaded.

Inductor graphs are ahead-of-time packages with the weights outside: every bucket of a run binds the same Parameters.
A package checks nothing when it is loaded, not even the CPU's instruction set, so its key is all that guards it:
whatever can change a graph is a field of `GraphSpec` or of the environment that `GraphSpec.key_fields` adds.
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mllama_graph import __version__, native
from mllama_graph.graphs import torchair as lowering
from mllama_graph.plan.buckets import Bucket
from mllama_graph.model.checkpoint import Pixels, build
from mllama_graph.model.text import decode, prefill
from mllama_graph.model.tree import ImageInput, Node, Pages, PromptInput, TileInput, TokenInput
from mllama_graph.model.vision import encode_image
from mllama_graph.model.ops import Ops, padded_head
from mllama_graph.ops.cpu import CPU
from mllama_graph.ops.plain import PLAIN
from mllama_graph.ops.ranks import COLLECTIVES, GROUP, ranked
from mllama_graph.model.shape import ModelShape
from mllama_graph.graphs.store import PACKAGE, GraphStore, key_of
from mllama_graph.model.table import Shard

# Source that decides what a graph computes.
SOURCES = ("model", "ops", "graphs/aot.py", "graphs/build.py", "graphs/torchair.py", "native/graph.h",
           "native/operators.py", "plan/cost.py")


class Step(nn.Module):
    """One phase over the shared weight tree, as the module that compilers ask for."""

    def __init__(self, phase: str, weights: Node, shape: ModelShape, ops: Ops):
        super().__init__()
        self.phase, self.weights, self.shape, self.ops = phase, weights, shape, ops

    def forward(self, given, pages, image_pages):
        if self.phase == "vision":
            return encode_image(self.weights, given, image_pages, self.shape, self.ops)
        function = prefill if self.phase == "prefill" else decode
        return function(self.weights.text, given, pages, image_pages, self.shape, self.ops)


class Flat(nn.Module):
    """A step as a function of the tensors of its inputs alone, in tree order: what a package can be called with."""

    def __init__(self, step: Step, inputs: tuple):
        super().__init__()
        self.step = step
        leaves, self.spec = pytree.tree_flatten(inputs)
        self.present = [isinstance(leaf, Tensor) for leaf in leaves]

    def forward(self, *given: Tensor):
        remaining = iter(given)
        leaves = [next(remaining) if present else None for present in self.present]
        return self.step(*pytree.tree_unflatten(leaves, self.spec))


# Weights appear in packages under their names in `Flat`.
WEIGHT_PREFIX = "step.weights."


@dataclass(frozen=True)
class GraphSpec:
    """Everything but the bucket that decides a graph. `options` are (name, value) pairs for the compiler.

    `device` is cpu, cuda, npu or npu-sim. `rank` counts where ranks don't share their graphs: torchair's hold it.
    """

    shape: ModelShape
    page_size: int
    num_pages: int
    num_image_pages: int
    store: torch.dtype
    compute: torch.dtype
    backend: str
    device: str
    threads: int
    world_size: int = 1
    collectives: str = COLLECTIVES[0]
    kernels: str = "plain"
    deterministic: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    rank: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device of weights, pages and inputs."""
        return torch.device("npu" if self.device == "npu-sim" else self.device)

    @property
    def head_width(self) -> int:
        """Width of a head in the pages: an NPU's attention takes multiples of 16, and pages are never copied to be padded."""
        width = self.shape.text.head_width
        return padded_head(width) if self.backend == "torchair" else width

    def key_fields(self, bucket: Bucket) -> dict[str, Any]:
        """All that can change the graph of a bucket, readable."""
        fields = {
            "engine": __version__, "torch": torch.__version__, "source": source_hash(), "backend": self.backend,
            "device": device_name(self.device),
            "threads": self.threads, "world_size": self.world_size, "options": dict(self.options),
            "deterministic": self.deterministic, "kernels": self.kernels,
            "weights": str(self.store), "compute": str(self.compute), "page_size": self.page_size,
            "bucket": asdict(bucket), "model": asdict(self.shape),
        }
        # A graph takes only the pools that it reads or writes. Ranks share their graphs: what differs is a weight.
        if bucket.phase != "vision":
            fields["num_pages"] = self.num_pages
        if bucket.image_pages:
            fields["num_image_pages"] = self.num_image_pages
        if self.world_size > 1:
            fields["collectives"] = self.collectives
        if self.device == "cuda":
            from mllama_graph.ops.cuda import triton_version

            fields["triton"] = triton_version()
        if self.backend == "torchair":
            fields |= lowering.key_fields() | {"rank": self.rank}
        return fields

    def key(self, bucket: Bucket) -> str:
        """The name of the bucket's entry in the store."""
        return key_of(self.key_fields(bucket))

    def pages(self, allocate: Callable[..., Tensor]) -> tuple[Pages, Pages]:
        """A rank's self-attention pages and image pages, of its own heads; `allocate` is torch.zeros, or torch.empty where none is touched."""
        text = self.shape.text

        def pool(count: int, layers: int) -> Pages:
            size = (count, self.page_size, text.kv_heads // self.world_size, self.head_width)
            new = lambda: allocate(size, dtype=self.compute, device=self.torch_device)  # noqa: E731
            return tuple((new(), new()) for _ in range(layers))

        return pool(self.num_pages, len(text.self_layers)), pool(self.num_image_pages, len(text.cross_layers))

    def example(self, bucket: Bucket) -> Any:
        """Inputs of a bucket's shapes that do no harm: one image tile, tokens that are padding, in scratch slots."""
        vision, device = self.shape.vision, self.torch_device
        ints = lambda *size: torch.zeros(size, dtype=torch.int32).to(device)  # noqa: E731
        ones = lambda size: torch.ones(size, dtype=torch.int32).to(device)  # noqa: E731
        slots = lambda count: torch.arange(count, dtype=torch.int32).to(device)  # noqa: E731
        B, T, J = bucket.rows, bucket.tokens, bucket.pages
        if bucket.phase == "vision":
            tiles = torch.zeros((vision.max_tiles, vision.channels, vision.tile, vision.tile), dtype=torch.uint8)
            return TileInput(tiles.to(device), ones(1), ones(1), slots(vision.max_tiles * vision.tokens))
        image = ImageInput(ints(B, bucket.image_pages), ints(B, bucket.image_pages), ints(T, 2))
        image = image if bucket.image_pages else None
        if bucket.phase == "prefill":
            return PromptInput(ints(T), ints(T), slots(T), ints(1), ones(1), ints(1), ints(J) if J else None, image)
        return TokenInput(ints(T), ints(T), slots(T), ints(1), ints(B, J), ones(B), image)


def arguments(bucket: Bucket, given: Any, pages: Pages, image_pages: Pages) -> tuple:
    """A step's arguments: each phase takes only the pages that it uses."""
    return given, () if bucket.phase == "vision" else pages, image_pages if bucket.image_pages else ()


@lru_cache
def source_hash() -> str:
    """Hash of the source that decides what a graph computes."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for source in SOURCES:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def device_name(device: str) -> str:
    """The device that a graph is compiled for, as exactly as it matters."""
    if device == "cpu":
        return processor_name()
    return torch.cuda.get_device_name() if device == "cuda" else f"{device} {torch.npu.get_device_name()}"


@lru_cache
def processor_name() -> str:
    """The CPU and its vector instructions: a package built for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        flags = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:8]
        name = f"{fields.get('model name', platform.machine())} flags {flags}"
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree in the order in which a graph takes them."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Package:
    """A loaded ahead-of-time package, bound to the run's weights. Imports no compiler."""

    def __init__(self, path: Path, weights: dict[str, Tensor], captured: bool = False):
        # The third argument, that one thread runs it at a time, is what a package needs that is captured.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", captured, 1, -1)
        names = self._loader.get_constant_fqns()
        # (constants, into the inactive buffer, all must be given, memory stays ours)
        self._loader.load_constants({name: weights[name] for name in names}, False, True, True)

    def __call__(self, *inputs: Any) -> Optional[Tensor]:
        outputs = self._loader.boxed_run(tensors(inputs))
        return outputs[0] if outputs else None


class NpuGraph:
    """A graph that torchair has compiled for this rank's step: the weights are the module's own."""

    def __init__(self, run: Callable):
        self._run = run

    def __call__(self, *inputs: Any) -> Optional[Tensor]:
        return self._run(*tensors(inputs))


def npu_graph(spec: GraphSpec, bucket: Bucket, weights: Node, pages: tuple[Pages, Pages], ops: Ops, folder: Path,
              stored: bool) -> NpuGraph:
    """A bucket's graph for the rank whose weights and pages these are: from `folder`, or compiled into it.

    Compiling runs the graph once, on padding. What can't be lowered raises.
    """
    inputs = arguments(bucket, spec.example(bucket), *pages)
    step = Flat(Step(bucket.phase, weights, spec.shape, ops), inputs)
    options, name = dict(spec.options), f"{bucket.phase}_{spec.key(bucket)}"
    if stored:
        return NpuGraph(lowering.load_step(step, name, options, folder))
    return NpuGraph(lowering.compile_step(step, name, tensors(inputs), options, folder))


class RankPackage:
    """The same for a CPU rank: the interpreter is free while the package runs, since it may wait for other ranks.

    A package that waits for gloo would otherwise hold what gloo's own thread needs (pytorch issue 197516).
    """

    def __init__(self, path: Path, weights: dict[str, Tensor], folder: Path):
        native.load("runner", folder)
        self._ops = torch.ops.mllama_graph
        self._handle = self._ops.load_package(str(path), -1)
        names = self._ops.constant_names(self._handle)
        self._ops.load_constants(self._handle, names, [weights[name] for name in names])

    def __call__(self, *inputs: Any) -> Optional[Tensor]:
        outputs = self._ops.run_package(self._handle, tensors(inputs))
        return outputs[0] if outputs else None


def package(path: Path, weights: dict[str, Tensor], spec: GraphSpec, folder: Path) -> Callable:
    """A stored graph, ready to be called with a step's arguments. `folder` is the store's."""
    if spec.world_size > 1 and spec.device == "cpu":
        return RankPackage(path, weights, folder)
    return Package(path, weights, captured=spec.device == "cuda")


def compile_package(spec: GraphSpec, bucket: Bucket, path: Path) -> None:
    """Compile a bucket's step into a package at `path`. Needs no weights: their memory is reserved and never touched."""
    # Imports the compiler.
    from mllama_graph.graphs.build import build_package

    # A package runs its loops on as many threads as it was built for; more would read past its buffers.
    settings = {"cpp.threads": spec.threads} | dict(spec.options)
    # torch.distributed's collectives are operations of torch.
    calls = spec.kernels == "native" and (spec.world_size == 1 or spec.collectives == "shared_memory")
    build_package(trace(spec, bucket), path, settings, spec.device == "cpu", calls)


def unfilled(spec: GraphSpec, shard: Shard) -> Node:
    """A rank's weight tree without values."""
    return build(spec.shape, Pixels(1.0, (0.0,) * 3, (1.0,) * 3), spec.store, spec.torch_device,
                 lambda entry, part, region: None, lambda count: None, shard)


def trace(spec: GraphSpec, bucket: Bucket, shard: Optional[Shard] = None) -> torch.export.ExportedProgram:
    """A bucket's step of one rank as a whole graph with static shapes. What can't be traced raises."""
    weights = unfilled(spec, shard or Shard(0, spec.world_size))
    inputs = arguments(bucket, spec.example(bucket), *spec.pages(torch.empty))
    step = Flat(Step(bucket.phase, weights, spec.shape, ops_of(spec)), inputs)
    return torch.export.export(step, tuple(tensors(inputs)), strict=False)


_stand_in: Optional[torch.distributed.ProcessGroup] = None


def ops_of(spec: GraphSpec) -> Ops:
    """The operations of a rank, except on an NPU."""
    if spec.device == "cuda":
        # Imports Triton.
        from mllama_graph.ops.cuda import cuda_ops

        return cuda_ops(spec.world_size)
    return ranked(spec.world_size, spec.collectives, CPU if spec.kernels == "native" else PLAIN)


def prepare_tracing(spec: GraphSpec, folder: Path) -> None:
    """What a process needs that traces the graphs of ranks without being one."""
    global _stand_in
    if spec.kernels == "native":
        native.declare_operators("kernels")
    if spec.world_size > 1 and spec.collectives == "shared_memory":
        native.load("collectives", folder)
        native.declare(spec.world_size)
    elif spec.world_size > 1 and _stand_in is None:
        # Inductor looks the group up, if only to log its size. The registry does not keep it alive.
        _stand_in = torch.distributed.ProcessGroup(0, spec.world_size)
        torch._C._distributed_c10d._register_process_group(GROUP, _stand_in)


def compile_into(folder: Path, spec: GraphSpec, bucket: Bucket, key: str) -> float:
    """Have the store at `folder` hold a bucket's graph; the seconds that compiling took, 0 if another process did it.

    Raises RuntimeError where `key`, which the run computed, is not what this process finds.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    store, fields = GraphStore(folder), spec.key_fields(bucket)
    prepare_tracing(spec, folder)
    torch.use_deterministic_algorithms(spec.deterministic, warn_only=True)
    if key_of(fields) != key:
        raise RuntimeError("the engine's source or its environment changed since the run began")
    with store.lock(key):
        if store.find(key)[0]:
            return 0.0
        start = time.perf_counter()
        with store.workspace() as workspace:
            compile_package(spec, bucket, workspace / PACKAGE)
            store.add(key, fields, workspace / PACKAGE)
        return time.perf_counter() - start
