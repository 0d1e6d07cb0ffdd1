"""The expected number of operations of each type in a graph, which golden.json lists per layer and other part.

`python -m mllama_graph.ascend -m mllama_graph.ascend.golden` regenerates golden.json from graphs of small models.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.graphdef import BOUNDARY
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.model.formats import CHOICES, DYNAMIC, FLOAT, STATIC, Format, Formats, chosen, leaf_of
from mllama_graph.model.ops import padded_head
from mllama_graph.model.shape import ModelShape, shape_of
from mllama_graph.model.table import table
from mllama_graph.ops.npu_quantised import inputs_first
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cores import BSH, SPLIT, Form, Forms
from mllama_graph.plan.quantised import sizes

GOLDEN = Path(__file__).with_name("golden.json")

# Kinds of quantised layers; "transposed weight" adds to each of the others.
QUANTISED = (
    "quantised layer",
    "transposed weight",
    "sorted layer",
    "int8 layer alone",
    "int8 layer after a norm",
    "int8 layer of ranks",
    "int8 layer of features rounded before",
    "static layer alone",
    "static layer after a norm",
    "static layer with a bias",
)

# Decode steps that split the keys of text alone, and those of text and images.
SPLIT_STEPS = tuple(
    (Bucket("decode", 2, 2, 8, images), Forms(Form(SPLIT, 2), Form(SPLIT if images else BSH, 3))) for images in (0, 9)
)

# phase -> part of a graph -> operation type -> count
Golden = dict[str, dict[str, dict[str, int]]]


def counts(graph: LoweredGraph) -> Counter[str]:
    """Number of operations of each type that depend on a graph input.

    Constants are left out: GE folds them, and torchair merges those whose sizes happen to be equal. So are reshapes,
    which move nothing: torchair merges chains of them only in graphs without npu_weight_quant_batchmatmul.
    """
    left_out = (*BOUNDARY, "Reshape")
    return Counter(op.type for op in graph.ops.values() if op.type not in left_out and not graph.is_constant(op))


def parts(context: Context) -> dict[str, int]:
    """How often a graph contains each part of golden.json."""
    text, vision, bucket = context.spec.shape.text, context.spec.shape.vision, context.bucket
    quantised = quantised_parts(context)
    forms, images = context.spec.forms_of(bucket), bucket.image_pages > 0
    prompts = bucket.prompts or bucket
    # The prompts of a mixed step always have pages.
    past, several = bucket.phase == "prefill" and bucket.pages > 0, prompts.phase == "prefill" and prompts.rows > 1
    # Heads are padded where no kernel supports their width.
    padded_text, int8 = context.spec.head_width > text.head_width, context.spec.kv == torch.int8
    selves, crosses, layers = len(text.self_layers), len(text.cross_layers), sum(map(len, context.layers.values()))
    ranks = context.spec.world_size > 1
    if bucket.phase == "vision":
        width = context.spec.vision_heads[1] if context.spec.vision_heads else vision.width // vision.heads
        return {
            "once": 1,
            "local layer": vision.layers,
            "global layer": vision.global_layers,
            "cross layer": crosses,
            "padded layer": (padded_head(width) > width) * layers,
            "padded cross layer": padded_text * crosses,
            "int8 cross layer": int8 * crosses,
            "padding tiles": bucket.tiles < vision.max_tiles,
            "layer of ranks": ranks * layers,
            **quantised,
        }
    return {
        "once": 1,
        "self layer": selves,
        "images": images,
        "cross layer": images * crosses,
        "earlier pages": past,
        "self layer after earlier pages": past * selves,
        "split self layer": (forms.text.name == SPLIT) * selves,
        "split cross layer": (forms.image.name == SPLIT) * images * crosses,
        "self layer of several prompts": several * selves,
        "cross layer of several prompts": several * images * crosses,
        "padded self layer": padded_text * selves,
        "padded cross layer": padded_text * images * crosses,
        "padded layer of several prompts": several * padded_text * (selves + images * crosses),
        "int8 self layer": int8 * selves,
        "int8 self layer after earlier pages": int8 * past * selves,
        "int8 cross layer": int8 * images * crosses,
        "ranks": ranks,
        "layer of ranks": ranks * layers,
        **_candidates(context),
        **quantised,
    }


def _candidates(context: Context) -> dict[str, int]:
    """How often a graph contains the parts of the search for the largest logits."""
    spec, found = context.spec, context.searches
    return {
        "candidates": found and spec.candidates > 1,
        "one candidate": found and spec.candidates == 1,
        "candidates of ranks": found and spec.world_size > 1,
        "padded vocabulary": found and spec.shape.text.vocab % spec.world_size > 0,
    }


def quantised_parts(context: Context) -> dict[str, int]:
    """How often a graph contains each kind of quantised layer, in place of one in floating point."""
    spec, found = context.spec, Counter[str]()
    split = {leaf_of(entry) for entry in table(spec.shape) if spec.world_size > 1 and entry.shard == 1}
    biased = {leaf_of(entry) for entry in table(spec.shape) if entry.path.endswith(".bias")}
    # The vision features are rounded once for all cross layers.
    of_features = [path for path, form in spec.formats if path.endswith(".kv") and form.activations == DYNAMIC]
    for path, form, _, inputs in sizes(spec.formats, spec.shape, spec.world_size):
        if not context.runs(path):
            continue
        found["quantised layer"] += form.activations == FLOAT
        found["transposed weight"] += not inputs_first(form, inputs, spec.tiled)
        found["sorted layer"] += form.sorted
        # torchair fuses what follows a residual sum and its norm with them. The first layer has no sum, and that of the
        # head is read by nothing, which the cast's pattern does not match.
        normed = path.startswith("text.layers.") and path.endswith((".qkv", ".q", ".gate_up"))
        normed |= path == "text.head" and form.activations == DYNAMIC
        place = "after a norm" if normed and path != "text.layers.0.qkv" else "alone"
        if path in of_features[1:]:
            place = "of features rounded before"
        if form.activations == DYNAMIC:
            found[f"int8 layer {'of ranks' if path in split else place}"] += 1
        if form.activations == STATIC:
            found[f"static layer {place}"] += 1
            found["static layer with a bias"] += path in biased
    return {kind: found[kind] for kind in QUANTISED}


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
    # Of a single rank in floating point, two decode steps split the keys of attention, too.
    specs = [
        _spec(shape, ranks, forms=SPLIT_STEPS if ranks == 1 and shape in _split_models() else ())
        for shape, ranks in _models()
    ]
    specs += [_spec(shape, ranks, formats=formats) for shape, ranks, formats in _quantised_models()]
    specs += [_spec(shape, ranks, candidates=count) for shape, ranks, count in _searching_models()]
    specs += [replace(_spec(shape, 1), kv=torch.int8) for shape in _split_models()]
    for spec in specs:
        for bucket in (
            *(Bucket("vision", 1, 1, 0, 1, tiles) for tiles in sorted({1, spec.shape.vision.max_tiles})),
            *(Bucket("decode", 2, 2, 3, i) for i in (0, 5)),
            *(Bucket("prefill", rows, 32, pages, i) for rows, pages in ((1, 0), (1, 3), (2, 3)) for i in (0, 5)),
            *(bucket for bucket, _ in spec.forms),
            *(_mixed(Bucket("decode", 2, 2, 4, i), rows) for rows in (1, 2) for i in (0, 5)),
            *(_mixed(bucket, 1) for bucket, _ in spec.forms),
        ):
            graph = LoweredGraph(capture(spec, bucket))
            rows.setdefault(bucket.phase, []).append((parts(Context(spec, bucket)), counts(graph)))
    return {phase: _solved(phase, found) for phase, found in rows.items()}


def _mixed(decoding: Bucket, rows: int) -> Bucket:
    """The bucket of a mixed step with `rows` prompts."""
    prompts = Bucket("prefill", rows, 32, decoding.pages, decoding.image_pages)
    return replace(decoding, phase="mixed", tokens=decoding.rows + prompts.tokens, prompts=prompts)


def _spec(shape: ModelShape, ranks: int, **changes: Any) -> GraphSpec:
    bf16 = torch.bfloat16
    return GraphSpec(shape, 128, 64, 64, bf16, bf16, bf16, "torchair", "npu-sim", 1, ranks, "distributed", **changes)


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


def _split_models() -> Iterator[ModelShape]:
    """The shapes with which decode steps split keys, too."""
    base = shortened(shape_of({"model_type": "mllama"}))
    yield from (base, replace(base, text=replace(base.text, head_width=24)))


def _quantised_models() -> Iterator[tuple[ModelShape, int, Formats]]:
    """The same for each kind of quantised layer: shape, number of ranks and formats."""
    released = shape_of({"model_type": "mllama"})
    base, crosses = shortened(released), shortened(released, cross_layers=2)
    layers, everything = ("text",), ("text", "vision", "projector")
    for shape, form, ranks, parts in (
        (base, CHOICES["w8a16"], 1, everything),
        (base, CHOICES["w4a16"], 1, everything),
        (base, Format("int4", group=128, sorted=True), 1, layers),
        (base, CHOICES["w8a8"], 1, everything),
        (base, CHOICES["w8a8"], 1, layers),
        (crosses, CHOICES["w8a8"], 1, layers),
        (base, CHOICES["w8a8"], 2, everything),
        (base, Format("int8", activations=STATIC), 1, everything),
        (base, Format("int8", activations=STATIC), 1, layers),
    ):
        leaves = chosen("w8a16", 128, parts, shape, ranks)
        yield shape, ranks, tuple((path, form) for path, _ in leaves)


def _searching_models() -> Iterator[tuple[ModelShape, int, int]]:
    """The same for graphs that find the largest logits: shape, number of ranks and of candidates."""
    shape = shortened(shape_of({"model_type": "mllama"}))
    odd = replace(shape, text=replace(shape.text, vocab=shape.text.vocab - 1))
    yield from ((shape, 1, 64), (shape, 1, 1), (shape, 2, 64), (odd, 2, 64))


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
