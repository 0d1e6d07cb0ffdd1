"""Compiled graphs compute what eager computes, and the graph store returns the right graph or none."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoints import SPECS
from engines import GRAPH_PLAN, GRAPH_SPEC, GRAPHS, said, start, tokens_of

from mllama_graph.core.errors import UserError
from mllama_graph.graphs import key as keys
from mllama_graph.graphs.compiler import Record
from mllama_graph.graphs.step import WEIGHT_PREFIX
from mllama_graph.graphs.store import GraphStore, key_of

ROOT = Path(__file__).parents[1]
SPEC = GRAPH_SPEC
PLAN = GRAPH_PLAN | {"compile": "wait"}
# Number of graphs that `lines` uses: all but decode without images.
USED = 4


@pytest.fixture(scope="module")
def lines(requests):
    """Two images, text that must be chunked, one image after text, short text; the first lasts longest."""
    by_id = {line["id"]: line for line in requests(SPEC)}
    photo, grey = by_id["bos_image"]["images"], by_id["grey_26"]["images"]
    ids, image = by_id["text_257"]["input_ids"], SPECS[SPEC].vocab
    return [
        {
            "id": "two",
            "input_ids": [*ids[:4], image, *ids[4:12], image, 7],
            "images": photo + grey,
            "max_new_tokens": 20,
            "ignore_eos": True,
        },
        {"id": "chunks", "input_ids": ids[:45], "max_new_tokens": 8},
        {"id": "one", "input_ids": [*ids[20:30], image, *ids[30:45]], "images": photo, "max_new_tokens": 8},
        {"id": "text", "input_ids": ids[100:117], "max_new_tokens": 8},
    ]


@pytest.fixture(scope="module")
def store(warm):
    return warm[0]


@pytest.fixture(scope="module")
def eager(checkpoint, lines):
    """(engine, tokens) of the uncompiled functions."""
    engine = start(checkpoint(SPEC), **PLAN)
    return engine, tokens_of(engine, lines)


@pytest.fixture(scope="module")
def compiled(checkpoint, lines, store):
    """(engine, tokens, addresses of its pages before serving) of the compiled graphs."""
    engine = start(checkpoint(SPEC), backend="inductor", graph_cache=str(store), **PLAN)
    pages = addresses(engine)
    return engine, tokens_of(engine, lines), pages


def addresses(engine):
    return [
        data.data_ptr()
        for pool in (engine.executor.rank.pages, engine.executor.rank.image_pages)
        for pair in pool
        for data in pair
    ]


def test_compiled_graphs_give_the_tokens_of_eager_in_a_mixed_batch(eager, compiled):
    assert compiled[1] == eager[1]
    records = compiled[0].executor.graphs.records
    assert len(records) == USED and {record.source for record in records} == {"hit"}
    assert {record.phase for record in records} == {"vision", "prefill", "decode"}


def test_a_warm_up_compiles_every_bucket_of_the_plan_once(warm, compiled):
    _, result, said = warm
    assert result["status"] == "ok" and result["metrics"] == {"graphs": GRAPHS, "compiled": GRAPHS, "failed": 0}
    assert {graph["source"] for graph in result["graphs"]} == {"compiled"}
    assert sorted(graph["bucket"] for graph in result["graphs"]) == sorted(
        map(str, compiled[0].scheduler.plan.buckets())
    )
    assert f"{GRAPHS} graphs, 0 in" in said and "Warning" not in said, said


def test_compiled_graphs_write_the_pages_in_place_and_as_eager_does(eager, compiled):
    assert addresses(compiled[0]) == compiled[2]
    for pool in ("pages", "image_pages"):
        scratch = eager[0].scheduler.plan.scratch_pages if pool == "pages" else 0
        for ours, theirs in zip(getattr(compiled[0].executor.rank, pool), getattr(eager[0].executor.rank, pool)):
            for data, other in zip(ours, theirs):
                assert other[scratch:].any()
                # fp32 with sums in another order, values of order one to ten.
                torch.testing.assert_close(data[scratch:], other[scratch:], atol=1e-3, rtol=1e-4)


def test_an_entry_matches_its_record(warm):
    store, result, _ = warm
    for graph in result["graphs"]:
        record = Record(**graph)
        entry = store / record.key
        assert {"key.json", "checksums.json", "graph.pt2"} == {path.name for path in entry.iterdir()}
        assert key_of(json.loads((entry / "key.json").read_text())) == record.key
        assert record.bytes == (entry / "graph.pt2").stat().st_size and record.seconds > 0
    left = [path.name for path in store.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]
    assert not left, "what was written aside is left behind"


FRESH = """
import json, sys
from engines import GRAPH_PLAN, GRAPH_SPEC, GRAPHS, start, tokens_of
folder, store, plan, lines = json.loads(sys.stdin.read())
engine = start(folder, backend="inductor", graph_cache=store, **plan)
tokens = tokens_of(engine, lines)
compiling = ("torch._inductor", "torch._dynamo", "torch.export", "triton")
compilers = [name for name in sys.modules if name.startswith(compiling)]
print(json.dumps([tokens, [record.source for record in engine.executor.graphs.records], compilers]))
"""


def fresh_process(*given):
    """What FRESH prints, in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_start_hits_every_graph_and_imports_no_compiler(checkpoint, lines, store, compiled):
    tokens, sources, compilers = fresh_process(str(checkpoint(SPEC)), str(store), PLAN, lines)
    assert tokens == compiled[1]
    assert sources == ["hit"] * USED
    assert not [name for name in compilers if name.startswith("torch._inductor")]


def test_a_truncated_package_is_rebuilt(checkpoint, lines, store, compiled, tmp_path):
    copy = tmp_path / "graphs"
    shutil.copytree(store, copy)
    record = next(
        r for r in compiled[0].executor.graphs.records if r.bucket.endswith("tokens=32 pages=6 image_pages=0")
    )
    package = copy / record.key / "graph.pt2"
    whole = package.read_bytes()
    package.write_bytes(whole[: len(whole) // 2])
    engine = start(checkpoint(SPEC), backend="inductor", graph_cache=str(copy), **PLAN)
    tokens = tokens_of(engine, [lines[3] | {"max_new_tokens": 1}])
    assert [(r.source, r.key) for r in engine.executor.graphs.records] == [("compiled", record.key)]
    assert tokens["text"] == compiled[1]["text"][:1]
    assert GraphStore(copy).find(record.key) == (package, None)
    assert f"graph {record.key} ({record.bucket}): graph.pt2 is altered or truncated" in said(engine)


def test_without_waiting_steps_run_uncompiled_while_their_graphs_compile(
    checkpoint, lines, eager, compiled, store, empty_store
):
    plan = PLAN | {"compile": "background", "graph_cache": str(empty_store)}
    engine = start(checkpoint(SPEC), backend="inductor", **plan)
    try:
        assert tokens_of(engine, lines[:1]) == {"two": eager[1]["two"]}
        running = engine.executor.graphs
        assert len(running.compiler.requested) == 3 and not running.records
        assert said(engine).count("in the background; until it is ready, its steps run uncompiled") == 3
        requested = running.compiler.requested
    finally:
        running.compiler.close()
    for bucket in requested:
        name = keys.key(running.spec, bucket)
        shutil.copytree(store / name, empty_store / name)
    engine = start(checkpoint(SPEC), backend="inductor", **plan)
    assert tokens_of(engine, lines[:1]) == {"two": compiled[1]["two"]}
    assert [record.source for record in engine.executor.graphs.records] == ["hit"] * 3


def test_every_weight_of_a_step_stays_outside_its_package(compiled, store):
    # A weight baked into a graph would be wrong for another checkpoint with the same key.
    rank = compiled[0].executor.rank
    names = {}
    for bucket, package in rank.graphs.ready.items():
        names[bucket.phase, bucket.image_pages > 0] = {
            name.removeprefix(WEIGHT_PREFIX) for name in package._loader.get_constant_fqns()
        }

    def of(*starts):
        return {name for name in rank.weights.state_dict() if name.startswith(starts)}

    cross = tuple(f"text.layers.{index}." for index in rank.shape.text.cross_layers)
    kv = {name for name in of(*cross) if ".kv." in name or "k_norm" in name}
    assert names["vision", True] == of("vision", "projector") | kv
    # A single rank's embedding begins at id 0; only graphs of several ranks read `first`.
    assert names["decode", True] == of("text") - kv - {"text.embed.first"}
    assert names["prefill", False] == of("text") - of(*cross) - {"text.embed.first"}


def test_a_warm_run_refuses_to_compile(checkpoint, lines, compiled, store, empty_store):
    plan = PLAN | {"compile": "never"}
    engine = start(checkpoint(SPEC), backend="inductor", graph_cache=str(store), **plan)
    assert tokens_of(engine, lines[:1]) == {"two": compiled[1]["two"]}
    engine = start(checkpoint(SPEC), backend="inductor", graph_cache=str(empty_store), **plan)
    with pytest.raises(UserError, match="vision image_pages=4 is not in the graph store"):
        tokens_of(engine, lines[:1])


def test_records_are_plain_data(compiled):
    for record in compiled[0].executor.graphs.records:
        assert set(asdict(record)) == {"phase", "bucket", "source", "seconds", "bytes", "key"}
        json.dumps(asdict(record))
