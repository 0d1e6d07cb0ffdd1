"""Profiles one rank: a trace with named ranges, and tables of where the time went."""

import contextlib
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import record_function

from mllama_graph.core.report import write_json
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.graphs.step import Step
from mllama_graph.measure.session import write_csv
from mllama_graph.measure.trace import STEP, ops_rows, parts_of_step, parts_rows, ranges, steps_of
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard
from mllama_graph.model.tree import Linear
from mllama_graph.ops.plain import PLAIN
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.memory import Memory

if TYPE_CHECKING:
    from mllama_graph.engine.device import Backend

TRACE = "trace.json.gz"
# The linear layers of a text or vision layer that belong to attention; the others belong to the MLP.
ATTENTION_LAYERS = ("qkv", "q", "o")


class Profiler:
    """Records a rank from `begin` to `end`, and writes the profile to `folder`. `options`: those of task=profile."""

    def __init__(self, spec: GraphSpec, backend: "Backend", folder: Path, planned: Memory, options: Any):
        self.spec, self.backend, self.folder, self.planned = spec, backend, folder, planned
        self._buckets: dict[str, Bucket] = {}
        folder.mkdir(parents=True, exist_ok=True)
        # Keeps Kineto from printing when it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = backend.profile(folder, options)

    def begin(self) -> None:
        """Start recording."""
        self._profile.__enter__()

    @contextlib.contextmanager
    def step(self, bucket: Bucket) -> Iterator[None]:
        """Record a step as a named range."""
        self._buckets[str(bucket)] = bucket
        with record_function(f"{STEP}{bucket}"):
            yield

    def end(self) -> None:
        """Stop recording, and write trace.json.gz, ops.csv, parts.csv and memory.json."""
        self.backend.synchronize()
        self._profile.__exit__(None, None, None)
        write_json(
            self.folder / "memory.json",
            {
                "planned_bytes": asdict(self.planned) | {"total": self.planned.total},
                "most_bytes": self.backend.most_bytes(),
            },
        )
        path = self.folder / TRACE
        self.backend.export_trace(self._profile, self.folder, path)
        with gzip.open(path, "rt", encoding="utf8") as file:
            trace = json.load(file)
        steps = steps_of(trace["traceEvents"])
        write_csv(self.folder / "ops.csv", ops_rows(steps) or [{}])
        names = {name: products(self.spec, bucket) for name, bucket in self._buckets.items()}
        parts = [(step, parts_of_step(step, names[step.name])) for step in steps]
        write_csv(self.folder / "parts.csv", parts_rows(parts) or [{}])
        trace["traceEvents"] += ranges(parts)
        with gzip.open(path, "wt", encoding="utf8") as file:
            json.dump(trace, file)


def products(spec: GraphSpec, bucket: Bucket) -> list[str]:
    """The part of the model, such as text.07.self.attention, of each product of a step, in the order of computation."""
    # Imported here: a run that is not profiled needs no part of a compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode

    noted: list[str] = []
    with FakeTensorMode(), torch.inference_mode():
        weights = spec.unfilled_weights(Shard(0, spec.world_size))
        paths = {id(module): path for path, module in weights.named_modules()}

        def linear(x: Tensor, leaf: Linear) -> Tensor:
            noted.append(part_of(paths[id(leaf)], spec.shape))
            return PLAIN.linear(x, leaf)

        def patch_embed(x: Tensor, weight: Tensor) -> Tensor:
            noted.append("vision.patches")
            return PLAIN.patch_embed(x, weight)

        # Every implementation of the operations computes the products in the model's order.
        ops = replace(PLAIN, linear=linear, patch_embed=patch_embed)
        step = Step(bucket.phase, weights, spec.shape, spec.compute, ops)
        step(spec.example(bucket), *spec.unfilled_pages())
    return noted


def part_of(path: str, shape: ModelShape) -> str:
    """The named range of a linear layer, from the layer's path in the weight tree."""
    names = path.split(".")
    if len(names) < 4:
        return ".".join(names)
    tower, layers, index, leaf = names[0], names[1], int(names[2]), names[3]
    what = "attention" if leaf in ATTENTION_LAYERS else "mlp"
    if tower == "vision":
        return f"vision.{layers.removesuffix('_layers')}.{index:02}.{what}"
    if leaf == "kv":
        return f"vision.image_kv.{index:02}"
    return f"text.{index:02}.{'cross' if index in shape.text.cross_layers else 'self'}.{what}"
