"""The key of a stored graph: every field that can change what the graph computes or where it can run.

torch checks nothing when it loads a stored graph, not even the CPU's instruction set, so only the key prevents loading
a wrong one. The key includes a hash of the source files that tracing and compiling import; these files are found by
following import statements.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mllama_graph.core import cann
from mllama_graph.core.machine import processor_name
from mllama_graph.core.paths import PACKAGE
from mllama_graph.graphs import torchair
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.store import key_of
from mllama_graph.plan.bucket import Bucket

# The modules that trace a step and pass it to a compiler.
ENTRIES = ("graphs/aot.py", "graphs/torchair.py")
# Source files other than Python that are compiled into a graph.
COMPILED_IN = ("native/graph.h",)
# IMPORT finds an import statement, NAME the names that it imports. Python's parser would add 0.1 s to every start.
IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|.*)|import[ \t]+([\w.]+))", re.MULTILINE)
NAME = re.compile(r"(?:^|[(,])\s*(\w+)")


def key_fields(spec: GraphSpec, bucket: Bucket) -> dict[str, Any]:
    """Everything that can change the graph of a bucket, in readable form. "source" stands for the code's version."""
    fields: dict[str, Any] = {
        "torch": torch.__version__,
        "source": source_hash(),
        "backend": spec.backend,
        "device": device_name(spec.device),
        "threads": spec.threads,
        "world_size": spec.world_size,
        "options": dict(spec.options),
        "deterministic": spec.deterministic,
        "kernels": spec.kernels,
        "weights": str(spec.store),
        "compute": str(spec.compute),
        "kv": str(spec.kv),
        "page_size": spec.page_size,
        "bucket": asdict(bucket),
        "model": asdict(spec.shape),
        "candidates": spec.candidates,
    }
    if spec.formats:
        fields["formats"] = {path: asdict(form) for path, form in spec.formats}
    # The size of a page pool matters only to graphs that read or write the pool.
    if bucket.phase != "vision":
        fields["num_pages"] = spec.num_pages
    if bucket.image_pages:
        fields["num_image_pages"] = spec.num_image_pages
    if spec.world_size > 1:
        fields["collectives"] = spec.collectives
    if spec.device == "cuda":
        # Imported only here, since this module imports Triton.
        from mllama_graph.ops.cuda import triton_version

        fields["triton"] = triton_version()
    if spec.backend == "torchair":
        # Each rank has its own graph. With the other backends, all ranks share one, since they differ only in weights.
        fields |= torchair.key_fields() | {"rank": spec.rank}
        # torch_npu asks CANN, which reads only the first of these files.
        fields["cann"] = fields["cann"] or cann.installed()
    return fields


def key(spec: GraphSpec, bucket: Bucket) -> str:
    """The name of a bucket's entry in the graph store."""
    return key_of(key_fields(spec, bucket))


def device_name(device: str) -> str:
    """The name of the device that a graph is compiled for, with every detail on which the compiled code depends."""
    if device == "cpu":
        return processor_name(torch.backends.cpu.get_cpu_capability())
    if device == "cuda":
        return torch.cuda.get_device_name()
    import torch_npu

    return f"{device} {torch_npu.npu.get_device_name()}"


@lru_cache
def source_hash(package: Path = PACKAGE) -> str:
    """Hash of the package's source files that tracing and compiling import."""
    digest = hashlib.sha256()
    for file in [*traced_files(package), *(package / name for name in COMPILED_IN)]:
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def traced_files(package: Path = PACKAGE) -> list[Path]:
    """The entry modules and every file of the package that they import, directly or indirectly, sorted.

    The package's own __init__.py is left out: it holds the version and public names, on which no graph depends.
    """
    found: set[Path] = set()
    waiting = [package / entry for entry in ENTRIES]
    while waiting:
        file = waiting.pop()
        if file in found or file == package / "__init__.py":
            continue
        found.add(file)
        waiting += [imported for name in _imports(file) if (imported := _file_of(name, package)) is not None]
    return sorted(found)


def _imports(file: Path) -> Iterator[str]:
    """Dotted names in a file's import statements, including those inside functions. Some are not modules."""
    for module, names, imported in IMPORT.findall(file.read_text(encoding="utf-8")):
        if imported:
            yield imported
        else:
            yield module
            # `from package.subpackage import module`
            yield from (f"{module}.{name}" for name in NAME.findall(names))


def _file_of(name: str, package: Path) -> Path | None:
    """The file of a dotted name, or None if it is not a module of the package."""
    root, *parts = name.split(".")
    if root != package.name:
        return None
    path = package.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
