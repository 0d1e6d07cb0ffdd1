"""task=profile: the time of a batch by model part, for which it adds ranges to the traces of compiled graphs."""

import csv
import gzip
import json

import pytest
from checkpoints import SPECS
from commands import run
from engines import GRAPH_PLAN, GRAPH_SPEC, arguments

from mllama_graph.measure.trace import GENERATED, GRAPH, STEP, kind_of, own_times, parts_of_step, ranges, steps_of


def event(name, begin, end, cat="cpu_op", tid=1):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "pid": 7}


# A step of 100 us with three matrix products: two of attention, one of them nested in an operation, and the head's.
EVENTS = [
    event(f"{STEP}decode batch=1", 0, 100, "user_annotation"),
    event(GRAPH, 10, 90, "user_annotation"),
    event("mllama_graph::linear", 20, 30),
    event("mllama_graph::attend_pages", 35, 45),
    event("aten::mm", 36, 40),
    event("aten::linear", 50, 60),
    event("aten::addmm", 52, 58),
    event("mllama_graph::linear", 70, 80),
    event("elsewhere", 20, 30, tid=2),
    event("after", 110, 120),
]


def test_a_range_ends_with_its_last_product_and_leaves_no_gap():
    (step,) = steps_of(EVENTS)
    parts = parts_of_step(step, ["text.00.self.attention", "text.00.self.attention", "text.head"])
    assert parts == [("text.00.self.attention", 10, 60), ("text.head", 60, 90)]
    assert [(e["name"], e["ts"], e["dur"]) for e in ranges([(step, parts)])[1:]] == [
        ("text.00.self.attention", 10, 50),
        ("text.head", 60, 30),
    ]


def test_a_graph_with_other_products_than_the_model_has_no_ranges():
    assert parts_of_step(steps_of(EVENTS)[0], ["text.00.self.attention", "text.head"]) == []


def test_own_times_add_up_to_the_step():
    own = list(own_times(steps_of(EVENTS)[0]))
    assert sum(time for _, time in own) == 100
    assert dict(own)["aten::addmm"] == 6 and dict(own)["aten::linear"] == 4 and dict(own)[GRAPH] == 40


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "name, given",
    [
        (GRAPH_SPEC, ["backend=inductor", "plan.compile=never", *arguments(GRAPH_PLAN)]),
        ("half", ["backend=eager", "tp=2", "dtype=fp32"]),
    ],
    ids=["compiled", "two_ranks"],
)
def test_traces_have_the_ranges_of_every_layer(name, given, checkpoint, warm, tmp_path):
    tp = 1 + ("tp=2" in given)
    done = run(
        tmp_path / "out",
        "task=profile",
        "model=custom",
        f"weights={checkpoint(name)}",
        f"graph_cache={warm[0]}",
        "lengths=[5]",
        "task.new_tokens=3",
        "batch_sizes=[2]",
        *given,
    )
    assert done.code == 0, done.err
    for rank in range(tp):
        folder = tmp_path / "out" / f"rank{rank}"
        with gzip.open(folder / "trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        named = {e["name"] for e in events if e.get("tid") == "parts of the model"}
        layers = {name.split(".")[1] for name in named if name.startswith("text.") and name != "text.head"}
        assert layers == {f"{index:02}" for index in range(SPECS[name].layers)}
        assert {f"text.{what}.{part}" for what in ("self", "cross") for part in ("attention", "mlp")} <= set(
            map(kind_of, named)
        )
        assert {"text.head", "vision.local.00.attention", "vision.global.00.mlp", "vision.patches"} <= named
        parts, ops = rows(folder / "parts.csv"), rows(folder / "ops.csv")
        assert {row["phase"] for row in parts} == {row["phase"] for row in ops} == {"vision", "prefill", "decode"}
        graphs = sum(float(row["ms"]) for row in parts)
        assert 0 < graphs <= sum(float(row["ms"]) for row in ops) * 1.001
        assert json.loads((folder / "memory.json").read_text())["most_bytes"] > 0
    assert any(row["op"] == GENERATED for row in ops)
    said = (tmp_path / "out" / "summary.md").read_text()
    assert "Rank 0 spent" in said and "text.self.mlp" in said and (f"rank {tp - 1} ms" in said)


def test_parts_are_summed_over_layers():
    assert kind_of("text.07.self.attention") == "text.self.attention" and kind_of("text.head") == "text.head"
