"""Rules that a lowered graph must keep, and what two graphs have in common. A finding names the line of the model.

What no rule here can see is what GE, its kernels and HCCL do with a graph.

`python -m mllama_graph.ascend -m mllama_graph.ascend.lint` writes golden.json anew, from graphs of small models.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import TopologicalSorter
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mllama_graph.ascend.capture import WEIGHTS, Capture, capture, shortened
from mllama_graph.ascend.ge_ops import DTYPES, MASK_SIDE, OPERATIONS, GraphError
from mllama_graph.ascend.interpreter import (
    CONSTANTS, EDGES, INPUTS, VIEWS, Interpreter, Step, attribute, constant, ge_ir_pb2, metadata)
from mllama_graph.plan.buckets import Bucket
from mllama_graph.graphs.aot import GraphSpec
from mllama_graph.model.ops import padded_head
from mllama_graph.model.shape import ModelShape, shape_of

GOLDEN = Path(__file__).with_name("golden.json")
ATTENTION, SCATTER, ALL_REDUCE = "FusedInferAttentionScore", "ScatterPaKvCache", "HcomAllReduce"
COPIES = ("TensorMove", "Clone")
# What would read a weight and write it again. Reshape and Unsqueeze move nothing.
MOVERS = (*COPIES, "Transpose", "Cast", "Identity", "BroadcastTo", "ConcatV2", "Pack", "PadV3", "SplitV",
          "StridedSliceV2", "TransData")
# Integers that say where tokens are: they must be data.
PLACES = {ATTENTION: ("actual_seq_lengths", "actual_seq_lengths_kv", "block_table"), SCATTER: ("slot_mapping",)}
LENGTHS = PLACES[ATTENTION][:2]
# What operations look at that 0 is a harmless value of (ge_ops.py).
ZEROS = (("GatherV2", "indices"), ("RotaryMul", "r1"), ("RotaryMul", "r2"), (ATTENTION, "block_table"))
HEAD, EMBED = "weights.text.head.weight", "weights.text.embed.weight"
# The products that end a block, whose results ranks sum.
ENDS = {"text": ("o.weight", "down.weight"), "vision": ("o.weight", "fc2.weight")}
# Inputs whose integers are axes; all other integers among constants are sizes or follow from sizes.
AXES = ("axis", "axes", "perm", "concat_dim", "split_dim")


@dataclass(frozen=True)
class Finding:
    """A rule that a graph breaks, the operation that breaks it, and where that comes from."""

    lint: str
    message: str


@dataclass(frozen=True)
class Context:
    """What a graph was lowered for."""

    spec: GraphSpec
    bucket: Bucket

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """The layers of this graph, by the path of their stack."""
        text, vision = self.spec.shape.text, self.spec.shape.vision
        if self.bucket.phase == "vision":
            return {"vision.local_layers": tuple(range(vision.layers)),
                    "vision.global_layers": tuple(range(vision.global_layers))}
        return {"text.layers": tuple(range(text.layers)) if self.bucket.image_pages else text.self_layers}


class Graph:
    """A captured graph to walk on. A value is `operation:index`, as in the graph."""

    def __init__(self, captured: Capture):
        self.captured = captured
        self.ops = {op.name: op for op in captured.graph.op}
        self.takers: dict[str, list[tuple[Any, str]]] = {}
        for op in self.ops.values():
            for name, value in self.fed(op):
                self.takers.setdefault(value, []).append((op, name))

    def of(self, *kinds: str) -> list[Any]:
        """The operations of some kinds."""
        return [op for op in self.ops.values() if op.type in kinds]

    def fed(self, op: Any) -> list[tuple[str, str]]:
        """(name of the input, value) of what an operation takes; orders without data are left out."""
        if op.type in INPUTS:
            return []
        names = attribute(op.attr["_input_name_key"])
        sources = [source for source in op.input if not source.endswith(":-1")]
        return [(name, source) for name, source in zip(names, sources, strict=True) if source]

    def maker(self, value: str) -> Any:
        """The operation that a value comes from."""
        return self.ops[value.rpartition(":")[0]]

    def role(self, value: str) -> str:
        """What a graph input is (Capture.inputs); nothing for another value."""
        return self.captured.inputs.get(self.maker(value).name, "")

    def through(self, value: str, kinds: tuple[str, ...] = VIEWS) -> str:
        """The value behind views, or behind other operations of one input."""
        while (op := self.maker(value)).type in kinds:
            value = self.fed(op)[0][1]
        return value

    @property
    def outputs(self) -> list[str]:
        """The values that leave the graph."""
        return [value for op in self.of("NetOutput") for _, value in self.fed(op)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the graph reads."""
        values = [f"{op.name}:0" for op in self.of(*INPUTS)]
        return sum(self.size(value) * self.dtype(value).itemsize for value in values if self.is_weight(value))

    def size(self, value: str) -> int:
        """Elements of a graph input."""
        return math.prod(self.maker(value).output_desc[0].shape.dim)

    def is_weight(self, value: str) -> bool:
        """Whether a graph input is one of the model's."""
        return self.role(value).startswith(f"{WEIGHTS}.")

    @cached_property
    def roots(self) -> dict[str, frozenset[str]]:
        """Which of given, weights, pages and image_pages each operation is made of, by its name; none: a constant."""
        makers = {name: {self.maker(value).name for _, value in self.fed(op)} for name, op in self.ops.items()}
        roots: dict[str, frozenset[str]] = {}
        for name in TopologicalSorter(makers).static_order():
            own = self.captured.inputs.get(name, "").partition(".")[0]
            roots[name] = frozenset([own] if own else []).union(*(roots[maker] for maker in makers[name]))
        return roots

    def constant(self, op: Any) -> bool:
        """Whether an operation depends on no input: GE computes it when it compiles."""
        return not self.roots[op.name]

    def dtype(self, value: str) -> Optional[torch.dtype]:
        """A value's dtype. Where torchair notes none, the operation is elementwise: that of its first input."""
        op, index = self.maker(value), int(value.rpartition(":")[2])
        if op.type == "Const":
            return CONSTANTS[ge_ir_pb2.DataType.Name(op.attr["value"].t.desc.dtype)]
        if op.type == "Cast":
            return DTYPES.get(op.attr["dst_type"].i)
        noted = metadata(op.output_desc[index])
        if noted or op.type in INPUTS:
            return noted[0] if noted else CONSTANTS[ge_ir_pb2.DataType.Name(op.output_desc[0].dtype)]
        return self.dtype(self.fed(op)[0][1]) if self.fed(op) else None


Lint = Callable[[Graph, Context], Iterator[tuple[Any, str]]]


def outputs(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """Only logits leave a graph. Pages written in place may stand there too where nothing in the graph reads them."""
    phase, logits = context.bucket.phase, 0
    for value in graph.outputs:
        made = graph.maker(graph.through(value))
        if HEAD in {graph.role(taken) for _, taken in graph.fed(made)}:
            logits += 1
        elif phase == "decode" or not _written_in_place(graph, value):
            yield made, f"{graph.role(value) or 'its output'} leaves the graph, as only logits may"
    if logits != (phase != "vision"):
        yield graph.of("NetOutput")[0], f"{logits} tensors of logits leave a graph of {phase}"


def _written_in_place(graph: Graph, value: str) -> bool:
    made = graph.maker(value)
    written = OPERATIONS[made.type].written if made.type in OPERATIONS else ()
    return any(name in written and graph.maker(taken).type in INPUTS for name, taken in graph.fed(made))


def moves(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """Nothing is copied as a whole: what torchair can't write in place it copies first."""
    for op in graph.of(*COPIES):
        yield op, f"copies {_named(graph, graph.through(graph.fed(op)[0][1]))}"


def places(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """Lengths, block tables and slots are data: a constant would be of the step that was traced."""
    for op in graph.of(*PLACES):
        taken = dict(graph.fed(op))
        for name in PLACES[op.type]:
            if name in taken and "given" not in graph.roots[graph.maker(taken[name]).name]:
                made = _named(graph, taken[name])
                yield op, f"{name} is baked into the graph: it comes from {made}, not from an input"


def writes(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """What is overwritten is a graph input itself, and whoever else reads it reads what was written; no pool is left out."""
    text, vision = context.spec.shape.text, context.bucket.phase == "vision"
    pool, layers = ("image_pages", text.cross_layers) if vision else ("pages", text.self_layers)
    unwritten = dict.fromkeys(f"{pool}.{layer}.{part}" for layer in range(len(layers)) for part in range(2))
    for op in graph.ops.values():
        written = OPERATIONS[op.type].written if op.type in OPERATIONS else ()
        for name, value in graph.fed(op):
            if name not in written:
                continue
            behind = graph.through(value, MOVERS + VIEWS)
            unwritten.pop(graph.role(behind), None)
            if graph.maker(value).type not in INPUTS:
                yield op, f"{name} is {_named(graph, value)}, a copy of {_named(graph, behind)}"
            for reader, _ in graph.takers[value]:
                if reader.name != op.name:
                    yield reader, f"reads {_named(graph, value)}, which {op.name} writes, in no order"
    for role in unwritten:
        yield graph.ops["NetOutput"], f"{role} is never written"


def numbers(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """No float64, and int64 only in constants, which are shapes and axes, and as attention's lengths, which must be."""
    for op in graph.ops.values():
        for index in range(len(op.output_desc)):
            value = f"{op.name}:{index}"
            dtype = graph.dtype(value)
            if dtype == torch.float64:
                yield op, "computes in float64"
            if dtype == torch.int64 and not graph.constant(op) and not _is_length(graph, op, value):
                yield op, "computes in int64, where int32 would do"


def _is_length(graph: Graph, op: Any, value: str) -> bool:
    return op.type == "Cast" and all(name in LENGTHS for _, name in graph.takers.get(value, []))


def weights(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """No weight is rewritten each step, but for what is no larger than a norm: a row of activations costs as much."""
    text, vision = context.spec.shape.text, context.spec.shape.vision
    for value in (f"{op.name}:0" for op in graph.of(*INPUTS)):
        if graph.is_weight(value) and graph.size(value) > max(text.width, vision.width):
            for reader, _ in graph.takers.get(value, []):
                if reader.type in MOVERS:
                    yield reader, f"rewrites {graph.role(value)} in every step"


def collectives(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """Ranks sum once after attention and once after the MLP of each layer, and once after the embedding."""
    wanted = Counter(f"weights.{stack}.{layer}.{end}" for stack, layers in context.layers.items() for layer in layers
                     for end in ENDS[stack.partition(".")[0]])
    wanted.update([EMBED] if context.bucket.phase != "vision" else [])
    if context.spec.world_size == 1:
        wanted.clear()
    for op in graph.ops.values():
        if op.type.startswith("Hcom"):
            summed = _summed(graph, op)
            if op.type != ALL_REDUCE or not wanted[summed]:
                yield op, f"ranks exchange what comes from {summed}, and need not"
            wanted[summed] -= 1
    for role in (+wanted).elements():
        reader = next((reader for op in graph.of(*INPUTS) if graph.role(f"{op.name}:0") == role
                       for reader, _ in graph.takers.get(f"{op.name}:0", [])), graph.of("NetOutput")[0])
        yield reader, f"ranks do not sum what comes from {role}"


def _summed(graph: Graph, op: Any) -> str:
    """The weight whose product or lookup a collective takes."""
    while True:
        taken = [value for _, value in graph.fed(op)]
        found = [graph.role(value) for value in taken if graph.is_weight(value)]
        if found or not taken:
            return found[0] if found else "no weight"
        # Of a selection, the second: the first is the condition.
        op = graph.maker(taken[1 if op.type == "SelectV2" else 0])


def casts(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """No cast takes back another."""
    for op in graph.of("Cast"):
        inner = graph.through(graph.fed(op)[0][1])
        if graph.maker(inner).type == "Cast":
            before = graph.dtype(graph.fed(graph.maker(inner))[0][1])
            if before == graph.dtype(f"{op.name}:0") != graph.dtype(inner):
                yield op, f"takes back {graph.maker(inner).name}: {before} to {graph.dtype(inner)} and back"


def known(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """The interpreter's table has every operation, input and attribute: what it has not nobody has checked."""
    strange = [op for op in graph.ops.values() if op.type not in OPERATIONS and op.type not in EDGES]
    for op in strange:
        yield op, "is not in the table of ge_ops.py"
    if not strange:
        try:
            Interpreter(graph.captured.graph)
        except GraphError as error:
            yield _blamed(graph, error)


def _blamed(graph: Graph, error: GraphError) -> tuple[Any, str]:
    """The operation that the interpreter names, and what it says of it."""
    text = str(error)
    headed = re.match(r"(\w+) (\w+): ", text)
    if headed and headed[2] in graph.ops:
        return graph.ops[headed[2]], text[headed.end():]
    return graph.ops[next((word for word in re.findall(r"\w+", text) if word in graph.ops), "NetOutput")], text


class _Shapes(Interpreter):
    """The interpreter on tensors without memory: every rule that shapes and dtypes decide, at any size."""

    def __init__(self, graph: Graph):
        super().__init__(graph.captured.graph)
        self._graph, self._mode, self._done = graph, FakeTensorMode(allow_non_fake_inputs=True), {}

    def given(self) -> list[Tensor]:
        """The graph's inputs."""
        ops = sorted(self._graph.of(*INPUTS), key=lambda op: op.attr["index"].i)
        with self._mode:
            return [torch.empty(tuple(op.output_desc[0].shape.dim), dtype=self._graph.dtype(f"{op.name}:0"))
                    for op in ops]

    def _compute(self, step: Step, values: dict[str, Tensor]) -> tuple:
        if step.kind == ALL_REDUCE:
            return (values[step.inputs[0][1]],)
        taken = [(name, _signature(values[value])) for name, value in step.inputs]
        key = (step.kind, repr(step.attributes), *taken)
        if key not in self._done:
            self._done[key] = super()._compute(step, values | self._stand_ins(step, values))
        return self._done[key]

    def _stand_ins(self, step: Step, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Numbers in the place of those that a rule looks at: as large as they can be, and otherwise harmless."""
        held = {}
        for name, value in step.inputs:
            x = values[value]
            if (step.kind, name) in ZEROS:
                held[value] = torch.zeros(x.shape, dtype=x.dtype)
            elif (step.kind, name) == (SCATTER, "slot_mapping"):
                held[value] = torch.arange(len(x), dtype=x.dtype)
            elif (step.kind, name) == (ATTENTION, "actual_seq_lengths_kv"):
                held[value] = torch.full(x.shape, self._longest(step, values), dtype=x.dtype)
            elif (step.kind, name) == (ATTENTION, "atten_mask"):
                causal = step.attributes.get("sparse_mode") == 3 and tuple(x.shape) == (MASK_SIDE, MASK_SIDE)
                nothing = torch.zeros(1, dtype=x.dtype).expand(x.shape)
                held[value] = torch.ones(x.shape).triu(1).to(x.dtype) if causal else nothing
        return held

    def _longest(self, step: Step, values: dict[str, Tensor]) -> int:
        """The whole width of a table. Images are shared by sequences, other pages are not: they end with the pool."""
        taken = dict(step.inputs)
        shape = values[taken["block_table"]].shape
        rows, pages = shape if len(shape) == 2 else (1, 1)
        shared = self._graph.role(self._graph.through(taken["key0"])).startswith("image_pages")
        return (pages if shared else min(pages, len(values[taken["key0"]]) // rows)) * step.attributes["block_size"]


def _signature(x: Tensor) -> tuple:
    """What an operation's rules can see of a tensor. A constant is a real one."""
    small = not isinstance(x, torch._subclasses.FakeTensor) and x.numel() < 64
    return x.dtype, tuple(x.shape), repr(x.tolist()) if small else ""


def layouts(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """The operations' documented limits: pages, head widths, masks, tables, dtypes, sizes of caches."""
    try:
        shapes = _Shapes(graph)
    except GraphError:
        return  # `known` says why.
    try:
        shapes.run(shapes.given())
    except GraphError as error:
        yield _blamed(graph, error)


def histogram(graph: Graph, context: Context) -> Iterator[tuple[Any, str]]:
    """As many operations of each kind as golden.json says; those that are constant are left out (Graph.constant)."""
    found, wanted = counts(graph), expected(context)
    for kind in sorted(found | wanted):
        if found[kind] != wanted[kind]:
            op = next(iter(graph.of(kind)), graph.of("NetOutput")[0])
            yield op, f"{found[kind]} operations of kind {kind}, golden.json has {wanted[kind]}"


def counts(graph: Graph) -> Counter:
    """Operations by kind that depend on an input. Constant ones are folded by GE, and shared where sizes are equal."""
    return Counter(op.type for op in graph.ops.values() if op.type not in EDGES and not graph.constant(op))


def units(context: Context) -> dict[str, int]:
    """How often each part of golden.json is in a graph."""
    text, vision, bucket = context.spec.shape.text, context.spec.shape.vision, context.bucket
    images, past = bucket.image_pages > 0, bucket.phase == "prefill" and bucket.pages > 0
    # Heads of widths that no kernel takes are padded.
    padded_text = padded_head(text.head_width) > text.head_width
    selves, crosses, layers = len(text.self_layers), len(text.cross_layers), sum(map(len, context.layers.values()))
    ranks = context.spec.world_size > 1
    if bucket.phase == "vision":
        width = vision.width // vision.heads
        return {"once": 1, "local layer": vision.layers, "global layer": vision.global_layers, "cross layer": crosses,
                "padded layer": (padded_head(width) > width) * layers, "padded cross layer": padded_text * crosses,
                "one tile": vision.max_tiles == 1, "layer of ranks": ranks * layers}
    return {"once": 1, "self layer": selves, "images": images, "cross layer": images * crosses, "earlier pages": past,
            "self layer after earlier pages": past * selves, "padded self layer": padded_text * selves,
            "padded cross layer": padded_text * images * crosses, "ranks": ranks, "layer of ranks": ranks * layers}


def expected(context: Context) -> Counter:
    """The operations that golden.json says a graph has."""
    golden, total = json.loads(GOLDEN.read_text())[context.bucket.phase], Counter()
    for unit, times in units(context).items():
        for kind, count in golden.get(unit, {}).items():
            total[kind] += times * count
    return total


LINTS: dict[str, Lint] = {rule.__name__: rule for rule in (
    outputs, moves, places, writes, numbers, weights, collectives, casts, known, layouts, histogram)}


def lint(captured: Capture, context: Context) -> list[Finding]:
    """All that is wrong with a graph; what many layers have in common is told once."""
    graph = Graph(captured)
    findings = []
    for name, rule in LINTS.items():
        alike: dict[tuple[str, str], list[str]] = {}
        for op, text in rule(graph, context):
            key = re.sub(r"_?\d+", "", text), captured.line(op.name)
            alike.setdefault(key, []).append(f"{op.type} {op.name}: {text}")
        for (_, line), told in alike.items():
            more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
            findings.append(Finding(name, f"{told[0]}{more}, at {line}"))
    return findings


def _named(graph: Graph, value: str) -> str:
    op = graph.maker(value)
    return graph.role(value) or ("a constant" if graph.constant(op) else f"{op.type} {op.name}")


def structure(captured: Capture) -> dict[str, str]:
    """What a graph computes, whatever its sizes: a digest of each operation with all that it is made of -> what it is.

    Sizes are integer constants, but for axes. Operations that differ in sizes alone, or are written twice, count once:
    graphs whose sizes happen to be equal share more than others.
    """
    graph, digests, told = Graph(captured), {}, {}
    makers = {name: list(dict.fromkeys(source.rpartition(":")[0] for source in op.input if source))
              for name, op in graph.ops.items()}
    for name in TopologicalSorter(makers).static_order():
        op = graph.ops[name]
        taken = [(key, digests[graph.maker(value).name], value.rpartition(":")[2], _axes(graph, key, value))
                 for key, value in graph.fed(op)]
        orders = sorted(digests[source[:-3]] for source in op.input if source.endswith(":-1"))
        kept = sorted((key, attribute(value)) for key, value in op.attr.items() if not key.startswith("_"))
        own = _sizeless(op) if op.type == "Const" else graph.role(f"{name}:0") or kept
        dtypes = [graph.dtype(f"{name}:{index}") for index in range(len(op.output_desc))]
        digests[name] = sha256(repr((op.type, taken, own, orders, dtypes)).encode()).hexdigest()[:16]
        told.setdefault(digests[name], f"{op.type} {name}, at {captured.line(name)}")
    return told


def _axes(graph: Graph, key: str, value: str) -> Optional[list[int]]:
    made = graph.maker(value)
    return constant(made.attr["value"].t).reshape(-1).tolist() if key in AXES and made.type == "Const" else None


def _sizeless(op: Any) -> tuple:
    """A constant without its sizes."""
    value = constant(op.attr["value"].t)
    integers = not value.is_floating_point() and value.dtype != torch.bool
    return str(value.dtype), value.dim(), None if integers else value.tolist()


def _models() -> Iterator[tuple[ModelShape, int]]:
    """Shapes and numbers of ranks that tell all units of golden.json apart."""
    released = shape_of({"model_type": "mllama"})
    base = shortened(released)
    yield from ((base, 1), (base, 2))
    yield from ((shortened(released, **{kind: 2}), ranks) for kind in ("selves", "crosses", "locals_", "globals_")
                for ranks in (1, 2))
    for wide in (base, shortened(released, selves=2, crosses=2)):
        yield replace(wide, text=replace(wide.text, head_width=24)), 1
    yield replace(base, vision=replace(base.vision, heads=32)), 1
    yield replace(base, vision=replace(base.vision, max_tiles=1)), 1


def _golden() -> dict[str, dict[str, dict[str, int]]]:
    """The numbers of golden.json. Raises ValueError where counts are not sums over units."""
    rows: dict[str, list[tuple[dict[str, int], Counter]]] = {}
    for shape, ranks in _models():
        spec = GraphSpec(shape, 128, 64, 64, torch.bfloat16, torch.bfloat16, "torchair", "npu-sim", 1, ranks,
                         "distributed")
        for bucket in (Bucket("vision", 1, 1, 0, 1), *(Bucket("decode", 2, 2, 3, i) for i in (0, 5)),
                       *(Bucket("prefill", 1, 32, past, i) for past in (0, 3) for i in (0, 5))):
            context = Context(spec, bucket)
            rows.setdefault(bucket.phase, []).append((units(context), counts(Graph(capture(spec, bucket)))))
    return {phase: _solved(phase, found) for phase, found in rows.items()}


def _solved(phase: str, rows: list[tuple[dict[str, int], Counter]]) -> dict[str, dict[str, int]]:
    names, kinds = list(rows[0][0]), sorted({kind for _, found in rows for kind in found})
    times = torch.tensor([[float(row[name]) for name in names] for row, _ in rows], dtype=torch.float64)
    found = torch.tensor([[float(row[kind]) for kind in kinds] for _, row in rows], dtype=torch.float64)
    each = torch.linalg.lstsq(times, found, driver="gelsd").solution.round()
    if not torch.equal(times @ each, found):
        raise ValueError(f"the operations of {phase} are no sum over {names}")
    parts = [{kind: int(count) for kind, count in zip(kinds, row, strict=True) if count} for row in each.tolist()]
    return {name: part for name, part in zip(names, parts, strict=True) if part}


def _readable(golden: dict[str, dict[str, dict[str, int]]]) -> str:
    """JSON, a line for each unit."""
    phases = []
    for phase, parts in golden.items():
        lines = ",\n".join(f"    {json.dumps(unit)}: {json.dumps(found)}" for unit, found in parts.items())
        phases.append(f"  {json.dumps(phase)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(phases) + "\n}\n"


if __name__ == "__main__":
    GOLDEN.write_text(_readable(_golden()))
