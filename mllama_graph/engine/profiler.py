"""What a rank does between two moments: its trace with named ranges, and where the time went by phase, operation and part.

A compiled graph has no ranges of its own. Its products of weights are seen by the profiler, and come in the order in
which the model's functions ask for them: that order says which layer each belongs to. A range ends where its last
product does; what comes after belongs to the next, as the sum of the residual and the next norm do.
"""

import contextlib
import gzip
import json
import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch.profiler import ProfilerActivity, record_function

from mllama_graph.plan.buckets import Bucket
from mllama_graph.graphs.aot import GraphSpec, Step, ops_of, unfilled
from mllama_graph.core.report import write_json
from mllama_graph.plan.cost import Memory
from mllama_graph.measure.session import write_csv
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard

STEP, GRAPH, SAMPLE = "step ", "graph", "sample"
# A weight's product, as libraries call it, and attention, whose products are of no weight.
PRODUCTS = {
    "mllama_graph::linear",
    "mllama_graph::patch_embed",
    "aten::linear",
    "aten::addmm",
    "aten::mm",
    "aten::matmul",
    "aten::conv2d",
    "aten::convolution",
    "aten::_convolution",
    "aten::mkldnn_convolution",
    "mkldnn::_linear_pointwise",
    "mkldnn::_convolution_pointwise",
}
ATTENTION = ("aten::scaled_dot_product", "aten::_scaled_dot_product", "mllama_graph::attend")
# What is left of a graph's time between the operations that the profiler sees.
GENERATED = "generated loops, and launches"
# Of the parts of a layer, those that are attention's.
ATTENDING = ("qkv", "q", "o")
TRACE = "trace.json.gz"


@dataclass(frozen=True)
class Level:
    """How closely torch_npu.profiler looks: its levels 0 to 2, and the metrics of the AI cores that it counts."""

    level: int
    aic_metrics: str


class Profiler:
    """Records one rank from `begin` to `end`, which writes `folder`. Ranges are marked while it is the current one."""

    def __init__(self, spec: GraphSpec, folder: Path, planned: Memory, level: Level):
        self.spec, self.folder, self.planned = spec, folder, planned
        self._buckets: dict[str, Bucket] = {}
        self._on_npu = spec.device == "npu"
        folder.mkdir(parents=True, exist_ok=True)
        # Kineto tells that it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = (
            _npu_profile(folder, level)
            if self._on_npu
            else torch.profiler.profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if spec.device == "cuda" else [])]
            )
        )

    def begin(self) -> None:
        self._profile.__enter__()

    @contextlib.contextmanager
    def step(self, bucket: Bucket) -> Iterator[None]:
        """Marks a step."""
        self._buckets[str(bucket)] = bucket
        with record_function(f"{STEP}{bucket}"):
            yield

    def end(self) -> None:
        """Stop, and write trace.json.gz, ops.csv, parts.csv and memory.json."""
        if self.spec.device == "cuda":
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        write_json(
            self.folder / "memory.json",
            {
                "planned_bytes": asdict(self.planned) | {"total": self.planned.total},
                "most_bytes": most_bytes(self.spec.device),
            },
        )
        path = self.folder / TRACE
        if self._on_npu:
            _take_npu_trace(self.folder, path)
        else:
            self._profile.export_chrome_trace(str(path))
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


def most_bytes(device: str) -> int:
    """The most bytes that this process has held since it started: resident, or allocated on its device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "npu":
        return torch.npu.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- which product is which


def products(spec: GraphSpec, bucket: Bucket) -> list[str]:
    """The part of the model, such as text.07.self.attention, that each product of a step belongs to, in their order."""
    # Here: a run that is not profiled needs no part of a compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode

    noted: list[str] = []
    with FakeTensorMode(), torch.inference_mode():
        weights = unfilled(spec, Shard(0, spec.world_size))
        paths = {id(leaf): path for path, leaf in weights.named_modules()}
        ops = ops_of(spec)

        def linear(x, leaf, **padding):
            noted.append(part_of(paths[id(leaf)], spec.shape))
            return ops.linear(x, leaf, **padding)

        def patch_embed(x, weight):
            noted.append("vision.patches")
            return ops.patch_embed(x, weight)

        Step(bucket.phase, weights, spec.shape, replace(ops, linear=linear, patch_embed=patch_embed))(
            spec.example(bucket), *spec.pages(torch.empty)
        )
    return noted


def part_of(path: str, shape: ModelShape) -> str:
    """A leaf of the weight tree -> the name of its range."""
    names = path.split(".")
    if len(names) < 4:
        return ".".join(names)
    tower, layers, index, leaf = names[0], names[1], int(names[2]), names[3]
    what = "attention" if leaf in ATTENDING else "mlp"
    if tower == "vision":
        return f"vision.{layers.removesuffix('_layers')}.{index:02}.{what}"
    if leaf == "kv":
        return f"vision.image_kv.{index:02}"
    return f"text.{index:02}.{'cross' if index in shape.text.cross_layers else 'self'}.{what}"


def kind_of(part: str) -> str:
    """A part without the number of its layer."""
    return ".".join(name for name in part.split(".") if not name.isdigit())


# ---- what a trace says


@dataclass
class Traced:
    """A step of a trace: its bucket's name, and the events of its thread inside it, in order; times in microseconds."""

    name: str
    event: dict[str, Any]
    inside: list[dict[str, Any]]
    # Of a device, those that began meanwhile: each step waits for its result.
    kernels: list[dict[str, Any]]

    @property
    def phase(self) -> str:
        return self.name.split()[0]

    def annotated(self, name: str) -> Optional[dict[str, Any]]:
        return next((event for event in self.inside if event["name"] == name), None)


def steps_of(events: list[dict[str, Any]]) -> list[Traced]:
    """The steps of a trace, in order."""
    timed = sorted(
        (event for event in events if event.get("ph") == "X" and "dur" in event), key=lambda e: (e["ts"], -e["dur"])
    )
    steps = [
        Traced(e["name"].removeprefix(STEP), e, [], [])
        for e in timed
        if e["name"].startswith(STEP) and e.get("cat") in ("user_annotation", "cpu_op")
    ]
    at = 0
    for event in timed:
        while at < len(steps) and event["ts"] >= _end(steps[at].event):
            at += 1
        if at == len(steps):
            break
        step = steps[at]
        if event is step.event or event["ts"] < step.event["ts"]:
            continue
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            step.kernels.append(event)
        elif event["tid"] == step.event["tid"] and event.get("cat") in ("cpu_op", "user_annotation"):
            step.inside.append(event)
    return steps


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def own_times(step: Traced) -> Iterator[tuple[str, float]]:
    """(operation, microseconds outside of the operations that it calls) of a step's thread."""
    stack: list[list[Any]] = []

    def close(until: float) -> Iterator[tuple[str, float]]:
        while stack and stack[-1][1] <= until:
            name, _, own = stack.pop()
            yield name, own

    for event in [step.event, *step.inside]:
        yield from close(event["ts"])
        if stack:
            stack[-1][2] -= event["dur"]
        stack.append([event["name"], _end(event), event["dur"]])
    yield from close(float("inf"))


def ops_rows(steps: list[Traced]) -> list[dict[str, Any]]:
    """A row a phase and operation, the longest first: calls, and milliseconds of its own, on the host or the device."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for step in steps:
        for name, own in own_times(step):
            name = GENERATED if name == GRAPH else "inputs, and what calls the graph" if name.startswith(STEP) else name
            sums[step.phase, "host", name][0] += 1
            sums[step.phase, "host", name][1] += own
        for event in step.kernels:
            sums[step.phase, "device", event["name"]][0] += 1
            sums[step.phase, "device", event["name"]][1] += event["dur"]
    rows = [
        {"phase": phase, "where": where, "op": name, "calls": int(calls), "ms": round(own / 1e3, 4)}
        for (phase, where, name), (calls, own) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def parts_of_step(step: Traced, names: list[str]) -> list[tuple[str, float, float]]:
    """(part, from, to) of a step's graph, without gaps; none where the trace has not the products that the model has."""
    graph = step.annotated(GRAPH)
    if graph is None:
        return []
    ends, until = [], 0.0
    for event in step.inside:
        if event["ts"] < max(until, graph["ts"]) or event["ts"] >= _end(graph):
            continue
        if event["name"] in PRODUCTS or event["name"].startswith(ATTENTION):
            until = _end(event)
            if event["name"] in PRODUCTS:
                ends.append(until)
    if len(ends) != len(names):
        return []
    parts: list[tuple[str, float, float]] = []
    begun = graph["ts"]
    for index, (name, end) in enumerate(zip(names, ends)):
        if index + 1 == len(names):
            end = _end(graph)
        elif names[index + 1] == name:
            continue
        parts.append((name, begun, end))
        begun = end
    return parts


def parts_rows(parts: list[tuple[Traced, list[tuple[str, float, float]]]]) -> list[dict[str, Any]]:
    """A row a phase and part, in the model's order: how often it ran, and its milliseconds."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for step, found in parts:
        for name, begun, end in found:
            sums[step.phase, name][0] += 1
            sums[step.phase, name][1] += end - begun
    return [
        {"phase": phase, "part": name, "runs": int(runs), "ms": round(spent / 1e3, 4)}
        for (phase, name), (runs, spent) in sums.items()
    ]


def ranges(parts: list[tuple[Traced, list[tuple[str, float, float]]]]) -> list[dict[str, Any]]:
    """The parts as events of the trace, on a line of their own."""
    if not parts:
        return []
    pid, line = parts[0][0].event["pid"], "parts of the model"
    made: list[dict[str, Any]] = [{"ph": "M", "name": "thread_name", "pid": pid, "tid": line, "args": {"name": line}}]
    return made + [
        {"ph": "X", "cat": "user_annotation", "name": name, "pid": pid, "tid": line, "ts": begun, "dur": end - begun}
        for _, found in parts
        for name, begun, end in found
    ]


# ---- an NPU: never run on one


def _npu_profile(folder: Path, level: Level) -> Any:
    import torch_npu

    npu = torch_npu.profiler
    return npu.profile(
        activities=[npu.ProfilerActivity.CPU, npu.ProfilerActivity.NPU],
        on_trace_ready=npu.tensorboard_trace_handler(str(folder)),
        experimental_config=npu._ExperimentalConfig(
            profiler_level=getattr(npu.ProfilerLevel, f"Level{level.level}"),
            aic_metrics=getattr(npu.AiCMetrics, level.aic_metrics),
        ),
    )


def _take_npu_trace(folder: Path, path: Path) -> None:
    """torch_npu's trace under the name that every backend's has; its own output, for MindStudio Insight, stays whole."""
    found = next(folder.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json"))
    events = json.loads(found.read_text(encoding="utf8"))
    # Its times are strings in some versions.
    for event in events:
        event |= {name: float(event[name]) for name in ("ts", "dur") if name in event}
    with gzip.open(path, "wt", encoding="utf8") as file:
        json.dump({"traceEvents": events}, file)
