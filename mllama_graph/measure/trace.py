"""Analyses a profiler's trace: its steps, and the time by phase, operation and part of the model.

A compiled graph has no named ranges. The profiler sees its products with weights in the order in which the model's
functions compute them, and this order gives the layer of each product. A range ends where its last product ends; later
operations, such as adding the residual and the next norm, belong to the next range.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Names of the ranges that a rank records: a step (followed by its bucket), the graph inside it, and sampling.
STEP, GRAPH, SAMPLE = "step ", "graph", "sample"
# Operations that multiply by a weight, by their names in several libraries; and attention, which has no weights.
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
# The rest of a graph's time, between the operations that the profiler sees.
GENERATED = "generated loops and launches"
# One step's parts: (part, begin, end) in microseconds.
Parts = list[tuple[str, float, float]]


def kind_of(part: str) -> str:
    """A part's name without its layer number."""
    return ".".join(name for name in part.split(".") if not name.isdigit())


@dataclass
class Traced:
    """A step of a trace: its bucket's name, and the events of its thread within the step, in order. In microseconds."""

    name: str
    event: dict[str, Any]
    inside: list[dict[str, Any]]
    # Device events that began during the step, which waits for its result.
    kernels: list[dict[str, Any]]

    @property
    def phase(self) -> str:
        return self.name.split()[0]

    def annotated(self, name: str) -> dict[str, Any] | None:
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
    """(operation, self time in microseconds) for the operations of a step's thread."""
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
    """One row per phase and operation, the longest first: calls, and self time in ms on the host or the device."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for step in steps:
        for name, own in own_times(step):
            name = GENERATED if name == GRAPH else "input tensors and graph call" if name.startswith(STEP) else name
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


def parts_of_step(step: Traced, names: list[str]) -> Parts:
    """(part, begin, end) of a step's graph, without gaps; empty where the trace does not show the model's products."""
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
    parts: Parts = []
    begun = graph["ts"]
    for index, (name, end) in enumerate(zip(names, ends)):
        if index + 1 == len(names):
            end = _end(graph)
        elif names[index + 1] == name:
            continue
        parts.append((name, begun, end))
        begun = end
    return parts


def parts_rows(parts: list[tuple[Traced, Parts]]) -> list[dict[str, Any]]:
    """One row per phase and part, in the model's order: the number of runs, and milliseconds."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for step, found in parts:
        for name, begun, end in found:
            sums[step.phase, name][0] += 1
            sums[step.phase, name][1] += end - begun
    return [
        {"phase": phase, "part": name, "runs": int(runs), "ms": round(spent / 1e3, 4)}
        for (phase, name), (runs, spent) in sums.items()
    ]


def ranges(parts: list[tuple[Traced, Parts]]) -> list[dict[str, Any]]:
    """The parts as trace events on a line of their own."""
    if not parts:
        return []
    pid, line = parts[0][0].event["pid"], "parts of the model"
    made: list[dict[str, Any]] = [{"ph": "M", "name": "thread_name", "pid": pid, "tid": line, "args": {"name": line}}]
    return made + [
        {"ph": "X", "cat": "user_annotation", "name": name, "pid": pid, "tid": line, "ts": begun, "dur": end - begun}
        for _, found in parts
        for name, begun, end in found
    ]
