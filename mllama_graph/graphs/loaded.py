"""The graphs that one rank has loaded, and how it loads or compiles more."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch

from mllama_graph.graphs.aot import Graph, RankPackage, load_package
from mllama_graph.graphs.compiler import GraphCompiler
from mllama_graph.graphs.cuda_graphs import CapturedStep, Cuda
from mllama_graph.graphs.key import key, key_fields
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.step import PHASES, WEIGHT_PREFIX, Step, arguments
from mllama_graph.graphs.store import TORCHAIR, GraphStore
from mllama_graph.graphs.torchair import npu_graph
from mllama_graph.model.inputs import Pages
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Weights
from mllama_graph.native import BuildError
from mllama_graph.plan.bucket import Bucket


class LoadedGraphs(ABC):
    """The graphs that one rank can run."""

    def __init__(
        self,
        spec: GraphSpec,
        weights: Weights,
        pages: tuple[Pages, Pages],
        ops: Ops,
        store: GraphStore,
        say: Callable[[str], None],
    ):
        self.spec, self.weights, self.pages, self.ops, self.store, self.say = spec, weights, pages, ops, store, say
        self.ready: dict[Bucket, Graph] = {}

    @abstractmethod
    def compile(self, bucket: Bucket) -> None:
        """Start compiling a graph that will be needed, if this host's store lacks it."""

    @abstractmethod
    def load(self, bucket: Bucket) -> None:
        """Make a graph ready to run. Raises RuntimeError if it is neither stored nor can be compiled."""

    @abstractmethod
    def graph(self, bucket: Bucket, compiled: bool) -> Graph:
        """The callable for steps of a bucket: its loaded graph, or the same functions uncompiled."""


class LoadedPackages(LoadedGraphs):
    """Ahead-of-time packages, compiled by worker processes. On a CUDA device, decode steps are captured."""

    def __init__(
        self,
        spec: GraphSpec,
        weights: Weights,
        pages: tuple[Pages, Pages],
        ops: Ops,
        store: GraphStore,
        say: Callable[[str], None],
    ):
        super().__init__(spec, weights, pages, ops, store, say)
        self._compiler = GraphCompiler(spec, store, say)
        self._uncompiled = {
            phase: Step(phase, weights, spec.shape, spec.compute, ops, spec.candidates) for phase in PHASES
        }
        self._cuda = Cuda(spec.torch_device) if spec.device == "cuda" else None
        self._weights = {f"{WEIGHT_PREFIX}{name}": value for name, value in weights.state_dict().items()}

    def compile(self, bucket: Bucket) -> None:
        if self._compiler.stored(bucket) is None:
            self._compiler.compile(bucket)

    # Inference mode, as for steps: capturing runs the graph.
    @torch.inference_mode()
    def load(self, bucket: Bucket) -> None:
        """Load a stored graph. If this host's store lacks it, it is compiled while the run waits."""
        path = self._compiler.stored(bucket)
        if path is None and not self._compiler.compile(bucket):
            raise RuntimeError(f"{bucket} could not be compiled: there is no C++ compiler on this host")
        while bucket in self._compiler.requested:
            for done, error in self._compiler.collect(timeout=1.0):
                if error:
                    raise RuntimeError(f"{done} could not be compiled: {error}")
        path = path or self._compiler.stored(bucket)
        assert path is not None, "compiled just now"
        run = self._package(path)
        if self._cuda and bucket.phase == "decode":
            run = CapturedStep(run, arguments(bucket, self.spec.example(bucket), *self.pages), self._cuda, self.say)
        self.ready[bucket] = run

    def graph(self, bucket: Bucket, compiled: bool) -> Graph:
        return self.ready[bucket] if compiled else self._uncompiled[bucket.phase]

    def _package(self, path: Path) -> Graph:
        """The package at `path`. Where the engine is not the main thread, others work beside it (HTTP):
        then a CPU's package releases the GIL while it runs, if the library for that is there or can be built.
        """
        if self.spec.device == "cpu" and threading.current_thread() is not threading.main_thread():
            try:
                return RankPackage(path, self._weights, self.store.libraries)
            except BuildError as error:
                self.say(f"other threads wait while a graph runs: {error}")
        return load_package(path, self._weights, self.spec, self.store.libraries)


class LoadedNpuGraphs(LoadedGraphs):
    """torchair's graphs. Each rank compiles its own, bound to its own weights, when it loads them."""

    def compile(self, bucket: Bucket) -> None:
        """Do nothing: torchair's graphs can't be compiled ahead of time, outside of the rank."""

    # Inference mode, as for steps: a graph is compiled for the mode in which it is called.
    @torch.inference_mode()
    def load(self, bucket: Bucket) -> None:
        """Load this rank's graph, or compile it into the store. Raises torchair's errors for what it can't lower."""
        name = key(self.spec, bucket)
        with self.store.lock(name):
            path, fault = self.store.find(name)
            if fault:
                self.say(f"graph {name} ({bucket}): {fault}; compiling it again")
            if path is not None:
                self.ready[bucket] = self._graph(bucket, name, path, stored=True)
                return
            with self.store.workspace() as workspace:
                self.ready[bucket] = self._graph(bucket, name, workspace / TORCHAIR, stored=False)
                self.store.add(name, key_fields(self.spec, bucket), workspace / TORCHAIR)

    def graph(self, bucket: Bucket, compiled: bool) -> Graph:
        assert compiled, "nothing runs uncompiled on an NPU"
        return self.ready[bucket]

    def _graph(self, bucket: Bucket, name: str, folder: Path, stored: bool) -> Graph:
        return npu_graph(
            self.spec, bucket, self.weights, self.pages, self.ops, f"{bucket.phase}_{name}", folder, stored
        )
