"""The expected number of operations of each type in a graph, which golden.json lists per layer and other part.

`python -m mllama_graph.ascend -m mllama_graph.ascend.golden` regenerates golden.json from graphs of small models.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.graphdef import BOUNDARY
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.model.ops import padded_head
from mllama_graph.model.shape import ModelShape, shape_of
from mllama_graph.plan.bucket import Bucket

GOLDEN = Path(__file__).with_name("golden.json")

# phase -> part of a graph -> operation type -> count
Golden = dict[str, dict[str, dict[str, int]]]


def counts(graph: LoweredGraph) -> Counter[str]:
    """Number of operations of each type that depend on a graph input.

    Constants are left out: GE folds them, and torchair merges those whose sizes happen to be equal.
    """
    return Counter(op.type for op in graph.ops.values() if op.type not in BOUNDARY and not graph.is_constant(op))


def parts(context: Context) -> dict[str, int]:
    """How often a graph contains each part of golden.json."""
    text, vision, bucket = context.spec.shape.text, context.spec.shape.vision, context.bucket
    images, past = bucket.image_pages > 0, bucket.phase == "prefill" and bucket.pages > 0
    # Heads are padded where no kernel supports their width.
    padded_text = padded_head(text.head_width) > text.head_width
    selves, crosses, layers = len(text.self_layers), len(text.cross_layers), sum(map(len, context.layers.values()))
    ranks = context.spec.world_size > 1
    if bucket.phase == "vision":
        width = vision.width // vision.heads
        return {
            "once": 1,
            "local layer": vision.layers,
            "global layer": vision.global_layers,
            "cross layer": crosses,
            "padded layer": (padded_head(width) > width) * layers,
            "padded cross layer": padded_text * crosses,
            "one tile": vision.max_tiles == 1,
            "layer of ranks": ranks * layers,
        }
    return {
        "once": 1,
        "self layer": selves,
        "images": images,
        "cross layer": images * crosses,
        "earlier pages": past,
        "self layer after earlier pages": past * selves,
        "padded self layer": padded_text * selves,
        "padded cross layer": padded_text * images * crosses,
        "ranks": ranks,
        "layer of ranks": ranks * layers,
    }


def expected(context: Context) -> Counter[str]:
    """Number of operations of each type that a graph must have according to golden.json."""
    golden: Golden = json.loads(GOLDEN.read_text())
    total: Counter[str] = Counter()
    for part, times in parts(context).items():
        for name, count in golden[context.bucket.phase].get(part, {}).items():
            total[name] += times * count
    return total


def computed() -> Golden:
    """The contents of golden.json, computed from newly lowered graphs.

    Raises ValueError where the counts of a graph are not the sum over its parts.
    """
    rows: dict[str, list[tuple[dict[str, int], Counter[str]]]] = {}
    for shape, ranks in _models():
        bf16 = torch.bfloat16
        spec = GraphSpec(shape, 128, 64, 64, bf16, bf16, bf16, "torchair", "npu-sim", 1, ranks, "distributed")
        for bucket in (
            Bucket("vision", 1, 1, 0, 1),
            *(Bucket("decode", 2, 2, 3, i) for i in (0, 5)),
            *(Bucket("prefill", 1, 32, past, i) for past in (0, 3) for i in (0, 5)),
        ):
            graph = LoweredGraph(capture(spec, bucket))
            rows.setdefault(bucket.phase, []).append((parts(Context(spec, bucket)), counts(graph)))
    return {phase: _solved(phase, found) for phase, found in rows.items()}


def _models() -> Iterator[tuple[ModelShape, int]]:
    """Shapes and numbers of ranks that contain the parts of golden.json in enough combinations to solve for each."""
    released = shape_of({"model_type": "mllama"})
    base = shortened(released)
    yield from ((base, 1), (base, 2))
    yield from (
        (shortened(released, **{kind: 2}), ranks)
        for kind in ("self_layers", "cross_layers", "local_layers", "global_layers")
        for ranks in (1, 2)
    )
    for wide in (base, shortened(released, self_layers=2, cross_layers=2)):
        yield replace(wide, text=replace(wide.text, head_width=24)), 1
    yield replace(base, vision=replace(base.vision, heads=32)), 1
    yield replace(base, vision=replace(base.vision, max_tiles=1)), 1


def _solved(phase: str, rows: list[tuple[dict[str, int], Counter[str]]]) -> dict[str, dict[str, int]]:
    """The counts of each part: the solution of times @ counts = found, with one row per graph."""
    names, types = list(rows[0][0]), sorted({name for _, found in rows for name in found})
    times = torch.tensor([[float(row[name]) for name in names] for row, _ in rows], dtype=torch.float64)
    found = torch.tensor([[float(row[name]) for name in types] for _, row in rows], dtype=torch.float64)
    each = torch.linalg.lstsq(times, found, driver="gelsd").solution.round()
    if not torch.equal(times @ each, found):
        raise ValueError(f"the operation counts of the {phase} graphs are not a sum over the parts {names}")
    solved = [{name: int(count) for name, count in zip(types, row, strict=True) if count} for row in each.tolist()]
    return {name: part for name, part in zip(names, solved, strict=True) if part}


def written(golden: Golden) -> str:
    """The text of golden.json, with one line per part."""
    phases = []
    for phase, found in golden.items():
        lines = ",\n".join(f"    {json.dumps(part)}: {json.dumps(count)}" for part, count in found.items())
        phases.append(f"  {json.dumps(phase)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(phases) + "\n}\n"


if __name__ == "__main__":
    GOLDEN.write_text(written(computed()))
