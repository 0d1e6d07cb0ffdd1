"""The rules that a lowered graph must follow. Each yields pairs (operation, what is wrong with it).

Rules can't check what GE, its kernels and HCCL do with a graph.
"""

import re
from collections import Counter
from collections.abc import Callable

import torch

from mllama_graph.ascend import golden
from mllama_graph.ascend.device_rules import HEAD, LENGTHS, Faults, candidates, kernels, masks, paged, search, straight
from mllama_graph.ascend.form_rules import forms
from mllama_graph.ascend.ge_ops import OPERATIONS, GraphError
from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.graphdef import (
    ALL_GATHER,
    ALL_REDUCE,
    BOUNDARY,
    INPUTS,
    TRANSPOSED,
    VIEWS,
    OpDef,
    attributes_of,
    inputs_of,
)
from mllama_graph.ascend.interpreter import Interpreter
from mllama_graph.ascend.layouts import ShapeInterpreter
from mllama_graph.model.formats import DYNAMIC

# Operations that copy a whole tensor.
COPIES = ("TensorMove", "Clone")
# Operations that read a weight and write it again. Reshape and Unsqueeze only change the description of its memory.
MOVERS = (
    *COPIES,
    "Transpose",
    "Cast",
    "Identity",
    "BroadcastTo",
    "ConcatV2",
    "Pack",
    "PadV3",
    "SplitV",
    "StridedSliceV2",
    "TransData",
)
EMBED = "weights.text.embed.weight"
# Weights of the row-parallel layers that end a block, whose results are summed over ranks.
BLOCK_ENDS = {"text": ("o.weight", "down.weight"), "vision": ("o.weight", "fc2.weight")}

Rule = Callable[[LoweredGraph, Context], Faults]


def outputs(graph: LoweredGraph, context: Context) -> Faults:
    """A graph returns only logits and the candidates among them.

    Outside of decode, pages that were written in place may be returned too.
    """
    phase, logits = context.bucket.phase, 0
    for value in graph.outputs:
        made = graph.maker(graph.behind(value))
        if HEAD in {graph.role(graph.behind(source)) for _, source in inputs_of(made)}:
            logits += 1
        elif context.searches and search(graph, value):
            continue
        elif phase == "decode" or not _written_in_place(graph, value):
            yield made, f"{graph.role(value) or 'its output'} is returned, but only logits may be"
    if logits != (phase != "vision"):
        yield graph.of_type("NetOutput")[0], f"a {phase} graph returns {logits} tensors of logits"


def _overwritten(op: OpDef) -> tuple[str, ...]:
    """The inputs that an operation writes to."""
    return OPERATIONS[op.type].overwritten if op.type in OPERATIONS else ()


def _written_in_place(graph: LoweredGraph, value: str) -> bool:
    """Whether a value is made by an operation that writes to a graph input."""
    made = graph.maker(value)
    return any(name in _overwritten(made) and graph.maker(source).type in INPUTS for name, source in inputs_of(made))


def moves(graph: LoweredGraph, context: Context) -> Faults:
    """No whole tensor is copied. torchair inserts a copy where it can't write in place."""
    for op in graph.of_type(*COPIES):
        yield op, f"copies {graph.described(graph.behind(inputs_of(op)[0][1]))}"


def writes(graph: LoweredGraph, context: Context) -> Faults:
    """Every page tensor is written in place, and other operations read it only from the output of that write."""
    text, vision = context.spec.shape.text, context.bucket.phase == "vision"
    pool, layers = ("image_pages", text.cross_layers) if vision else ("pages", text.self_layers)
    tensors = 4 if context.spec.kv == torch.int8 else 2
    unwritten = dict.fromkeys(f"{pool}.{layer}.{part}" for layer in range(len(layers)) for part in range(tensors))
    for op in graph.ops.values():
        for name, value in inputs_of(op):
            if name not in _overwritten(op):
                continue
            origin = graph.behind(value, MOVERS + VIEWS)
            unwritten.pop(graph.role(origin), None)
            if graph.maker(value).type not in INPUTS:
                yield op, f"{name} is {graph.described(value)}, a copy of {graph.described(origin)}"
            for reader, _ in graph.takers[value]:
                if reader.name != op.name:
                    yield reader, f"reads {graph.described(value)} in no defined order with its write by {op.name}"
    for role in unwritten:
        yield graph.ops["NetOutput"], f"{role} is never written"


def numbers(graph: LoweredGraph, context: Context) -> Faults:
    """Nothing is float64. Only constants (shapes, axes) and attention's lengths, which must be int64, are int64."""
    for op in graph.ops.values():
        for index in range(len(op.output_desc)):
            value = f"{op.name}:{index}"
            dtype = graph.dtype(value)
            if dtype == torch.float64:
                yield op, "computes in float64"
            if dtype == torch.int64 and not graph.is_constant(op) and not _is_length(graph, op, value):
                yield op, "computes in int64, where int32 would do"


def _is_length(graph: LoweredGraph, op: OpDef, value: str) -> bool:
    """Whether a value is an input that is used only as attention's lengths."""
    return op.type in INPUTS and all(name in LENGTHS for _, name in graph.takers.get(value, []))


def weights(graph: LoweredGraph, context: Context) -> Faults:
    """No weight is rewritten in every step, except those as small as a norm's, which cost no more than a token row.

    A transposed view of a quantised weight is a flag of its product.
    """
    text, vision = context.spec.shape.text, context.spec.shape.vision
    for value in graph.weights:
        if graph.elements(value) > max(text.width, vision.width):
            for reader, _ in graph.takers.get(value, []):
                if reader.type in MOVERS and not _is_flag(graph, reader):
                    yield reader, f"rewrites {graph.role(value)} in every step"


def _is_flag(graph: LoweredGraph, op: OpDef) -> bool:
    """Whether an operation transposes a weight for products that can be told to transpose it."""
    takers = graph.takers.get(f"{op.name}:0", [])
    return op.type == "Transpose" and all(TRANSPOSED.get(taker.type) == name for taker, name in takers)


def collectives(graph: LoweredGraph, context: Context) -> Faults:
    """One all-reduce follows the embedding and each layer's attention and MLP, one all-gather the search of candidates.

    There are no others, except that int8 activations of which each rank has a part need the largest scale of all ranks
    before the product, too.
    """
    expected = Counter(
        f"the result of weights.{stack}.{layer}.{end}"
        for stack, layers in context.layers.items()
        for layer in layers
        for end in BLOCK_ENDS[stack.partition(".")[0]]
    )
    expected.update([f"the result of {EMBED}"] if context.bucket.phase != "vision" else [])
    dynamic = [f"weights.{path}.weight" for path, form in context.spec.formats if form.activations == DYNAMIC]
    expected.update([f"the scales of {role}" for role in dynamic if f"the result of {role}" in expected])
    expected.update(["the candidates"] if context.searches else [])
    if context.spec.world_size == 1:
        expected.clear()
    for op in graph.ops.values():
        if op.type.startswith("Hcom"):
            largest, found = attributes_of(op).get("reduction") == "max", search(graph, f"{op.name}:0")
            summed = _scaled_weight(graph, op) if largest else _summed_weight(graph, op)
            summed = "the candidates" if found else summed
            if op.type != (ALL_GATHER if found else ALL_REDUCE) or not expected[summed]:
                yield op, f"ranks exchange {summed} without need"
            expected[summed] -= 1
    for missing in (+expected).elements():
        role = missing.split()[-1]
        readers = (
            reader
            for op in graph.of_type(*INPUTS)
            if graph.role(f"{op.name}:0") == role
            for reader, _ in graph.takers.get(f"{op.name}:0", [])
        )
        yield next(readers, graph.of_type("NetOutput")[0]), f"ranks do not exchange {missing}"


def _summed_weight(graph: LoweredGraph, op: OpDef) -> str:
    """What an all-reduce sums: the result of a product or lookup, named by its weight."""
    while True:
        sources = [graph.behind(value) for _, value in inputs_of(op)]
        found = [graph.role(value) for value in sources if graph.is_weight(value)]
        if found or not sources:
            return f"the result of {found[0] if found else 'no weight'}"
        # The first input of a selection is its condition.
        op = graph.maker(sources[1 if op.type == "SelectV2" else 0])


def _scaled_weight(graph: LoweredGraph, op: OpDef) -> str:
    """What an all-reduce of the largest values exchanges: the scales of the rows of a product, named by its weight."""
    values, seen = [f"{op.name}:0"], set[str]()
    while values:
        for taker, name in graph.takers.get(values.pop(), []):
            if name == "pertoken_scale":
                return f"the scales of {graph.role(graph.behind(dict(inputs_of(taker))['x2']))}"
            if taker.name not in seen:
                seen.add(taker.name)
                values.append(f"{taker.name}:0")
    return "the scales of no weight"


def casts(graph: LoweredGraph, context: Context) -> Faults:
    """No cast undoes the one before it."""
    for op in graph.of_type("Cast"):
        inner = graph.behind(inputs_of(op)[0][1])
        if graph.maker(inner).type == "Cast":
            before = graph.dtype(inputs_of(graph.maker(inner))[0][1])
            if before == graph.dtype(f"{op.name}:0") != graph.dtype(inner):
                yield op, f"undoes {graph.maker(inner).name}: {before} to {graph.dtype(inner)} and back"


def known(graph: LoweredGraph, context: Context) -> Faults:
    """ge_ops lists every operation, input and attribute of the graph, with a documented source for each operation."""
    unknown = [op for op in graph.ops.values() if op.type not in OPERATIONS and op.type not in BOUNDARY]
    for op in unknown:
        yield op, "is not in the table of ascend/ge_ops"
    if not unknown:
        try:
            Interpreter(graph.captured.graph)
        except GraphError as error:
            yield _fault_of(graph, error)


def layouts(graph: LoweredGraph, context: Context) -> Faults:
    """The operations' documented limits hold: pages, head widths, masks, block tables, dtypes, sizes of caches."""
    try:
        shapes = ShapeInterpreter(graph)
    except GraphError:
        return  # reported by `known`
    try:
        shapes.check()
    except GraphError as error:
        yield _fault_of(graph, error)


def _fault_of(graph: LoweredGraph, error: GraphError) -> tuple[OpDef, str]:
    """The operation that an error of the interpreter names, and the rest of its message."""
    text = str(error)
    prefix = re.match(r"(\w+) (\w+): ", text)
    if prefix and prefix[2] in graph.ops:
        return graph.ops[prefix[2]], text[prefix.end() :]
    return graph.ops[next((word for word in re.findall(r"\w+", text) if word in graph.ops), "NetOutput")], text


def histogram(graph: LoweredGraph, context: Context) -> Faults:
    """A graph has the number of operations of each type that golden.json gives, without constants."""
    found, expected = golden.counts(graph), golden.expected(context)
    for name in sorted(found | expected):
        if found[name] != expected[name]:
            op = next(iter(graph.of_type(name)), graph.of_type("NetOutput")[0])
            yield op, f"{found[name]} operations of type {name}, golden.json has {expected[name]}"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        outputs,
        moves,
        straight,
        masks,
        paged,
        candidates,
        forms,
        writes,
        numbers,
        weights,
        collectives,
        casts,
        kernels,
        known,
        layouts,
        histogram,
    )
}
