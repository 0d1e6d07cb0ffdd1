"""Compiled graphs: what a step is, how it is compiled, where it is kept, and which bucket serves a need.

Inductor graphs are ahead-of-time packages with the weights outside: every bucket of a run binds the same Parameters.
A package checks nothing when it is loaded, so the key of its entry is all that guards it: whatever can change a graph
is a field of `key_fields`, written beside the package as plain JSON.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mllama_graph import __version__
from mllama_graph.buckets import Bucket, choose
from mllama_graph.model.text import decode, prefill
from mllama_graph.model.tree import Node
from mllama_graph.model.vision import encode_image
from mllama_graph.ops.contract import Ops
from mllama_graph.shape import ModelShape

PACKAGE = "graph.pt2"
# Folders of this package whose source decides what a graph computes.
SOURCES = ("model", "ops", "graphs.py", "shape.py")


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


@dataclass(frozen=True)
class Record:
    """What became of one graph, for result.json."""

    phase: str
    bucket: str
    source: str
    seconds: float
    bytes: int
    key: str


@dataclass(frozen=True)
class Target:
    """What a graph is compiled for, apart from its bucket."""

    backend: str
    device: str
    threads: int
    world_size: int
    rank: int
    options: dict[str, Any]


@lru_cache
def source_hash() -> str:
    """Hash of the source that decides what a graph computes."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for source in SOURCES:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


@lru_cache
def processor_name() -> str:
    """The CPU and its vector instructions: a package built for one runs on no lesser one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        name = fields.get("model name", platform.machine())
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def key_fields(step: Step, bucket: Bucket, inputs: tuple, target: Target) -> dict[str, Any]:
    """Everything that can change a graph, readable."""
    describe = lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"  # noqa: E731
    weights = {name: describe(value) for name, value in step.weights.state_dict().items()}
    device = processor_name() if target.device == "cpu" else torch.cuda.get_device_name()
    fields = asdict(target) | {"device": device}
    if target.world_size == 1:
        del fields["rank"]
    return fields | {
        "engine": __version__, "torch": torch.__version__, "source": source_hash(), "bucket": asdict(bucket),
        "model": asdict(step.shape), "inputs": [describe(t) for t in tensors(inputs)],
        "weights": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
    }


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree in the order in which a graph takes them."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def key_of(fields: dict[str, Any]) -> str:
    """The name of an entry."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]


class GraphStore:
    """Compiled graphs on disk: <folder>/<key>/{key.json, checksums.json, graph.pt2}."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Inductor's own cache lies inside, so that an empty store is really cold.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")

    def find(self, key: str) -> Optional[Path]:
        """The package of an entry whose checksum holds, or None."""
        entry = self.folder / key
        try:
            sums = json.loads((entry / "checksums.json").read_text())
            payload = entry / PACKAGE
            return payload if _sha256(payload) == sums[PACKAGE] else None
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            return None

    def add(self, key: str, fields: dict[str, Any], package: Path) -> Path:
        """Move a package in: written aside, renamed whole."""
        aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self.folder))
        shutil.move(package, aside / PACKAGE)
        (aside / "key.json").write_text(json.dumps(fields, indent=1, sort_keys=True))
        (aside / "checksums.json").write_text(json.dumps({PACKAGE: _sha256(aside / PACKAGE)}))
        entry = self.folder / key
        if entry.exists():
            shutil.rmtree(entry)
        aside.rename(entry)
        return entry / PACKAGE


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def default_store() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllama_graph"


class Package:
    """A loaded ahead-of-time package, bound to the run's weights. Imports no compiler."""

    def __init__(self, path: Path, weights: dict[str, Tensor]):
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        names = self._loader.get_constant_fqns()
        # (constants, into the inactive buffer, all must be given, memory stays ours)
        self._loader.load_constants({name: weights[name] for name in names}, False, True, True)

    def __call__(self, *inputs: Any) -> Optional[Tensor]:
        outputs = self._loader.boxed_run(tensors(inputs))
        return outputs[0] if outputs else None


def compile_package(step: Step, inputs: tuple, target: Target, path: Path) -> None:
    """Export a step with static shapes and compile it into a package at `path`.

    Export is full-graph by nature: what can't be traced raises.
    """
    import torch._inductor

    settings = {
        # Weights stay outside, one memory for all buckets, and are never folded into a graph.
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
        # A package runs its loops on as many threads as it was built for; more would read past its buffers.
        "cpp.threads": target.threads,
    }
    with warnings.catch_warnings():
        # torch's own deprecations inside export; nothing that a reader could act on.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(Flat(step, inputs), tuple(tensors(inputs)), strict=False)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=settings | target.options)


class Graphs:
    """The graphs of one rank by bucket: found in the store, or compiled on first use, each at most once."""

    def __init__(self, weights: Node, shape: ModelShape, ops: Ops, target: Target, store: GraphStore,
                 cost: Callable[[Bucket], float], reuse: float, announce: Callable[[str], None]):
        self.steps = {phase: Step(phase, weights, shape, ops) for phase in ("vision", "prefill", "decode")}
        self.weights = {f"step.weights.{name}": value for name, value in weights.state_dict().items()}
        self.target, self.store, self.cost, self.reuse, self.announce = target, store, cost, reuse, announce
        self.records: list[Record] = []
        self.sealed = False
        self._ready: dict[Bucket, Callable] = {}

    def serving(self, need: Bucket) -> Bucket:
        """The bucket that will run a step: one that is ready and not wasteful, else the exact one."""
        if self.target.backend == "eager":
            return need
        return choose(need, self._ready, self.cost, math.inf if self.sealed else self.reuse)

    def ready(self, bucket: Bucket) -> bool:
        """Whether a bucket's graph is in memory."""
        return bucket in self._ready

    def __getitem__(self, bucket: Bucket) -> Callable:
        return self._ready[bucket]

    def make(self, bucket: Bucket, inputs: tuple) -> None:
        """Find or compile the graph of a bucket; `inputs` are any of its shape.

        Raises RuntimeError once the run is warm: a compilation then would be a silent stall.
        """
        if self.sealed:
            raise RuntimeError(f"{bucket} is not compiled and the run is warm: a bucket is missing from the plan")
        assert bucket not in self._ready, f"{bucket} would be compiled twice"
        self._ready[bucket] = self._make(bucket, inputs)

    def _make(self, bucket: Bucket, inputs: tuple) -> Callable:
        step = self.steps[bucket.phase]
        if self.target.backend == "eager":
            return step
        start = time.perf_counter()
        fields = key_fields(step, bucket, inputs, self.target)
        key = key_of(fields)
        package = self.store.find(key)
        source = "hit" if package else "compiled"
        if package is None:
            self.announce(f"compiling {bucket}")
            self.store.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".build-", dir=self.store.folder) as build:
                path = Path(build) / PACKAGE
                compile_package(step, inputs, self.target, path)
                package = self.store.add(key, fields, path)
        graph = Package(package, self.weights)
        seconds = time.perf_counter() - start
        self.records.append(Record(bucket.phase, str(bucket), source, round(seconds, 3), package.stat().st_size, key))
        self.announce("")
        return graph
