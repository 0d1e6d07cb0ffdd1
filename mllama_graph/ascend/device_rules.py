"""Rules of CANN's own sources: what runs on the device's cores, what may stand before attention, how pages are read.

Each yields pairs (operation, what is wrong with it), as those of rules.py.
"""

from collections.abc import Iterator

import torch

from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.graphdef import (
    ALL_GATHER,
    ATTENTION,
    INPUTS,
    SCATTER,
    SCATTER_SCALES,
    SEARCHES,
    VIEWS,
    OpDef,
    attributes_of,
    constant,
    inputs_of,
)
from mllama_graph.ascend.kernels import BIAS_SOURCE, BIASES, CAST_SOURCE, CASTS, KERNELS, MISSING

PRODUCTS = ("MatMul", "MatMulV2")
HEAD = "weights.text.head.weight"
# Integer inputs that locate tokens and change from step to step.
LENGTHS = ("actual_seq_lengths", "actual_seq_lengths_kv")
PLACES = {
    ATTENTION: (*LENGTHS, "block_table"),
    SCATTER: ("slot_mapping",),
    SCATTER_SCALES: ("indices",),
    "GatherV2": ("indices",),
}
# Inputs of the decoding sequences of a mixed step.
DECODING = "given.tokens."
# Inputs of attention that are pages, or the scales of int8 pages.
PAGED = ("key0", "value0", "key_antiquant_scale", "value_antiquant_scale")
# What widens the pages of a block table where attention can't read int8 pages.
WIDENING = (*VIEWS, "Mul", "Cast", "GatherV2")

Faults = Iterator[tuple[OpDef, str]]


def kernels(graph: LoweredGraph, context: Context) -> Faults:
    """Every operation on what changes has a known kernel on the device's cores: see kernels.py."""
    for op in graph.ops.values():
        if graph.is_constant(op):
            continue
        sources = dict(inputs_of(op))
        if op.type in MISSING:
            yield op, "has no public kernel on a 910B"
        if op.type in KERNELS:
            allowed, source = KERNELS[op.type]
            for value in sources.values():
                if not graph.is_constant(graph.maker(value)) and (dtype := graph.dtype(value)) not in allowed:
                    yield op, f"has no kernel for {dtype} on a 910B's cores ({source}): it would run on AICPU"
        if op.type == "Cast":
            given, made = graph.dtype(sources["x"]), graph.dtype(f"{op.name}:0")
            if given != made and (given is None or made not in CASTS.get(given, ())):
                yield (
                    op,
                    f"has no kernel from {given} to {made} on a 910B's cores ({CAST_SOURCE}): it would run on AICPU",
                )
        if op.type in PRODUCTS and "bias" in sources:
            x, bias = graph.dtype(sources["x1"]), graph.dtype(sources["bias"])
            if x and bias not in BIASES.get(x, ()):
                yield op, f"adds a bias in {bias} to {x}, for which no kernel is known ({BIAS_SOURCE})"


def straight(graph: LoweredGraph, context: Context) -> Faults:
    """Lengths, block tables and slots come straight from the host, and so do a decode step's masks and indices.

    Attention in a static graph has a tiling task on the device that waits for its lengths (ge, tiling_schedule_optimize
    and ops-transformer, fused_infer_attention_score): arithmetic before them delays the first layer. Lengths of a
    vision graph belong to its bucket, and are constants.
    """
    vision = context.bucket.phase == "vision"
    for op in graph.of_type(*PLACES):
        decode = of_decoding(graph, context, op)
        for name, value in inputs_of(op):
            masks = decode and op.type == ATTENTION and name == "atten_mask"
            # Of gathers, those of rows of an input: the embedding.
            rows = op.type == "GatherV2" and decode and graph.maker(inputs_of(op)[0][1]).type in INPUTS
            if masks or (name in PLACES[op.type] and (rows or op.type != "GatherV2")):
                made = graph.maker(graph.behind(value))
                fixed = vision and name in LENGTHS and made.type == "Const"
                if made.type not in INPUTS and not fixed:
                    yield op, f"{name} comes from {graph.described(f'{made.name}:0')}, not straight from an input"


def masks(graph: LoweredGraph, context: Context) -> Faults:
    """A mask that never changes is an input: GE folds no LogicalAnd, LogicalOr, Less or GreaterEqual of constants.

    Causal attention takes the fixed mask for several rows only: for one row, the tiling code of CANN 8.5 to 9.1 resets
    sparse_mode to 0 and reads it as a plain mask. Attention among the rows of an image has none: a mask of 6432 rows
    would be read again for each head and layer.
    """
    for op in graph.of_type(ATTENTION):
        sources, attributes = dict(inputs_of(op)), attributes_of(op)
        if "atten_mask" in sources and graph.is_constant(graph.maker(sources["atten_mask"])):
            yield op, "its mask never changes, but is computed in the graph"
        elif "atten_mask" in sources and context.bucket.phase == "vision":
            yield op, "a mask hides rows of an image, which the order of rows and a length can do"
        elif attributes.get("sparse_mode") and "atten_mask" not in sources:
            yield op, f"sparse_mode {attributes['sparse_mode']} without its fixed mask"


def paged(graph: LoweredGraph, context: Context) -> Faults:
    """Only attention reads pages, by a block table: no other operation gathers or joins keys and values.

    Attention of several query rows takes no int8 pages: those of a block table are gathered and widened before it, for
    no operation but attention. Of a prompt after earlier pages, attention takes sparse_mode 3 and the lengths of
    queries and keys (tiling code of CANN 8.5 to 9.1, ops-transformer: accepted by its third template, for pages of a
    multiple of 128 tokens).
    """
    bucket = context.bucket.prompts or context.bucket
    widened = context.spec.kv == torch.int8 and bucket.tokens > bucket.rows
    for op in graph.of_type(*INPUTS):
        if graph.role(f"{op.name}:0").startswith(("pages.", "image_pages.")):
            yield from _readers(graph, f"{op.name}:0", graph.role(f"{op.name}:0"), widened)
    if bucket.phase != "prefill" or not bucket.pages or bucket.tokens == 1:
        return
    for op in graph.of_type(ATTENTION):
        sources, attributes = dict(inputs_of(op)), attributes_of(op)
        if pool_of(graph, sources["key0"]) != "pages" or of_decoding(graph, context, op):
            continue
        missing = [name for name in (*LENGTHS, *["block_table"][widened:]) if name not in sources]
        if attributes.get("sparse_mode") != 3 or missing:
            lacks = f", without {' and '.join(missing)}" if missing else ""
            yield op, f"reads a prompt's pages with sparse_mode {attributes.get('sparse_mode', 0)}{lacks}"


def candidates(graph: LoweredGraph, context: Context) -> Faults:
    """A text graph finds the largest logits and gathers them over ranks: only those leave the device (sample.best).

    TopKV2 takes k in int32 and no sort_policy: CANN 8.5 knows no others (ops-math, top_k_v2_proto.h of its versions).
    """
    spec = context.spec
    if not context.searches:
        return
    ends = [value for value in graph.outputs if search(graph, value)]
    if not ends:
        yield graph.of_type("NetOutput")[0], "gives no candidates, so that all logits go to the host in every step"
        return
    found = search(graph, ends[0])
    assert found, "just found"
    logits = graph.behind(inputs_of(found)[0][1], (*VIEWS, "Cast", "Add"))
    products = dict(inputs_of(graph.maker(logits)))
    if graph.role(graph.behind(products.get("x2") or products.get("weight") or logits)) != HEAD:
        yield found, f"searches {graph.described(logits)}, not the logits"
    if (dtype := graph.dtype(inputs_of(found)[0][1])) != torch.float32:
        yield found, f"searches in {dtype}: sums of exponentials need fp32"
    wanted = min(spec.candidates, spec.shard.size(spec.shape.text.vocab))
    if found.type == "TopKV2":
        k = graph.maker(dict(inputs_of(found))["k"])
        if k.type != "Const" or constant(k).dtype != torch.int32 or int(constant(k)) != wanted:
            yield found, f"k is not the constant {wanted} in int32"
        if "sort_policy" in attributes_of(found):
            yield found, "has a sort_policy, which CANN 8.5 does not know"
    elif wanted != 1:
        yield found, f"finds 1 candidate, not {wanted}"


def search(graph: LoweredGraph, value: str) -> OpDef | None:
    """The search whose candidates, joined with their columns and sums and gathered over ranks, are a value."""
    joined = graph.maker(graph.behind(value, (*VIEWS, "Identity", ALL_GATHER)))
    if joined.type != "ConcatV2":
        return None
    made = graph.maker(inputs_of(joined)[0][1])
    return made if made.type in SEARCHES else None


def of_decoding(graph: LoweredGraph, context: Context, op: OpDef) -> bool:
    """Whether an operation belongs to a decode step, or is attention of the sequences that a mixed step decodes."""
    if context.bucket.phase != "mixed":
        return context.bucket.phase == "decode"
    table = dict(inputs_of(op)).get("block_table")
    return table is not None and graph.role(graph.behind(table)).startswith(DECODING)


def pool_of(graph: LoweredGraph, value: str) -> str:
    """The pool that a value is a layer's pages of, written before or not; empty if it is none's."""
    while True:
        if pool := graph.role(value).partition(".")[0]:
            return pool
        op, index = graph.maker(value), int(value.rpartition(":")[2])
        sources = dict(inputs_of(op))
        if op.type == SCATTER:
            value = sources[("key_cache", "value_cache")[index]]
        elif op.type in WIDENING:
            value = inputs_of(op)[0][1]
        else:
            return ""


def _readers(graph: LoweredGraph, value: str, role: str, widened: bool) -> Faults:
    """What reads pages, or what was written to them, and is neither attention nor the write itself.

    widened: whether the pages of a block table may be gathered for attention.
    """
    for op, name in graph.takers.get(value, []):
        if op.type == SCATTER and name in ("key_cache", "value_cache"):
            yield from _readers(graph, f"{op.name}:{('key_cache', 'value_cache').index(name)}", role, widened)
        elif op.type in VIEWS or (op.type, name) == (SCATTER_SCALES, "var") or widened and op.type in WIDENING:
            yield from _readers(graph, f"{op.name}:0", role, widened)
        elif op.type not in (ATTENTION, "NetOutput") or name not in PAGED and op.type == ATTENTION:
            yield op, f"reads {role}, which only attention may"
