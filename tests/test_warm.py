"""The graph store on the command line: warm runs, task=cache, and runs without a C++ compiler."""

import os
import shutil

from commands import ROOT, run
from engines import GRAPH_PLAN, GRAPH_SPEC, GRAPHS, arguments


def cache(store, folder, *arguments):
    return run(folder, "task=cache", f"graph_cache={store}", *arguments)


def test_a_warm_store_serves_a_run_that_may_not_or_cannot_compile(warm, checkpoint, tmp_path):
    common = [f"weights={checkpoint(GRAPH_SPEC)}", f"graph_cache={warm[0]}", *arguments(GRAPH_PLAN)]
    done = run(tmp_path / "chat", *common, "prompt=Hi, you", "plan.compile=never")
    assert done.code == 0, done.err
    assert [(g["phase"], g["source"]) for g in done.result()["graphs"]] == [("prefill", "hit"), ("decode", "hit")]
    again = run(tmp_path / "warmup", "task=warmup", *common, CXX="no-such-compiler")
    assert again.code == 0 and again.result()["metrics"]["compiled"] == 0, again.err
    assert "no C++ compiler" not in again.err
    other = run(tmp_path / "other", *common, "prompt=Hi", "plan.compile=never", "plan.page_size=32", "plan.pages=[3]")
    assert other.code == 2 and "is not in the graph store, and plan.compile=never" in other.err


def test_the_cache_task_lists_verifies_and_prunes(warm, tmp_path):
    store = tmp_path / "graphs"
    shutil.copytree(warm[0], store, ignore=shutil.ignore_patterns("inductor"))
    listed = cache(store, tmp_path / "list")
    assert listed.code == 0 and f"{GRAPHS} graphs, " in listed.out
    assert all(graph["key"] in listed.out and graph["bucket"] in listed.out for graph in warm[1]["graphs"])
    assert cache(store, tmp_path / "sound", "task.action=verify").code == 0
    hurt, old = (graph["key"] for graph in warm[1]["graphs"][:2])
    (store / hurt / "graph.pt2").write_bytes(b"short")
    os.utime(store / old, (0, 0))
    verified = cache(store, tmp_path / "verify", "task.action=verify")
    assert verified.code == 2 and hurt in verified.err and "graph.pt2 is altered or truncated" in verified.out
    pruned = cache(store, tmp_path / "prune", "task.action=prune", "task.max_age_days=30")
    assert pruned.code == 0 and not (store / hurt).exists() and not (store / old).exists()
    assert len([path for path in store.glob("*/key.json")]) == GRAPHS - 2
    assert cache(store, tmp_path / "all", "task.action=prune", "task.max_gb=0").code == 0
    assert not list(store.glob("*/key.json"))


def test_without_a_compiler_the_text_is_the_same_and_one_line_reports_it(tmp_path, monkeypatch):
    asked = ["prompt=How many shapes are there?", f"image={ROOT / 'mllama_graph/tiny/scene.png'}"]
    eager = run(tmp_path / "eager", *asked, "backend=eager")
    monkeypatch.setenv("CXX", "no-such-compiler")
    without = run(tmp_path / "without", *asked, f"graph_cache={tmp_path / 'graphs'}")
    assert (eager.code, without.code) == (0, 0), without.err

    def text(done):
        return done.out.partition("\n\n")[0]

    assert text(without) == text(eager) and "three shapes" in text(eager)
    assert without.err.count("no C++ compiler") == 1 and "could not" not in without.err
    warmup = run(tmp_path / "warmup", "task=warmup", f"graph_cache={tmp_path / 'graphs'}")
    assert (
        warmup.code == 2 and warmup.err.count("no C++ compiler") == 1 and "graphs could not be compiled" in warmup.err
    ), warmup.err
