"""run.py with device=npu-sim: its output, and new processes that load all graphs from the graph store."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, assert_kept, interrupted, kept, run
from engines import serve, start
from test_collect import members, weights_in
from test_engine import few
from test_ranks import wrong
from test_stubs import needs_torch_npu

from mllama_graph.core.paths import PACKAGE

ANSWER = "I see a red circle, a green triangle and a blue star."
SIMULATED = "no NPU here: every graph is executed on the CPU by an interpreter, slowly"

pytestmark = [needs_torch_npu, pytest.mark.usefixtures("without_stubs")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def store(shared):
    return f"graph_cache={shared / 'simulated' / 'graphs'}"


@pytest.fixture(scope="module")
def first(store, shared):
    """The tiny model's default question, on a store without its graphs."""
    folder = shared / "simulated"
    return kept(folder / "made", lambda: run(folder / "out", "backend=torchair", store))


def test_the_tiny_model_answers_through_interpreted_graphs(first):
    assert first.code == 0, first.err
    assert first.out.splitlines()[0] == ANSWER
    assert SIMULATED in first.err
    assert "Traceback" not in first.err
    assert "Warning" not in first.err
    result = first.result()
    assert result["config"]["device"] == "npu-sim"
    assert result["config"]["backend"]["name"] == "torchair"
    assert {graph["source"] for graph in result["graphs"]} == {"compiled"}
    assert {graph["phase"] for graph in result["graphs"]} == {"vision", "prefill", "decode"}


def test_a_second_process_loads_every_graph_without_tracing(first, store, tmp_path, monkeypatch):
    # Tracing is disabled: a step without a loaded graph would run eagerly, which raises on the simulated device.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    done = run(tmp_path / "out", "backend=torchair", store, "plan.compile=never")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == ANSWER
    assert {graph["source"] for graph in done.result()["graphs"]} == {"hit"}


def test_an_archive_of_the_run_holds_its_graphs_and_neither_weights_nor_the_prompt(first, store, tmp_path):
    done = run(tmp_path / "out", "task=collect", f"task.folder={first.folder}", store)
    assert done.code == 0, done.err
    files = members(tmp_path / "out")
    for graph in first.result()["graphs"]:
        inside = f"collected/graphs/{graph['key']}"
        fields = json.loads(files[f"{inside}/key.json"])
        assert fields["cann"] == "9.1.0" and fields["device"].startswith("npu-sim")
        assert [name for name in files if name.startswith(f"{inside}/torchair/") and name.endswith("compiled_module")]
    assert not [name for name, data in files.items() if b"What do you see" in data or ANSWER.encode() in data]
    assert not weights_in(files, PACKAGE / "tiny" / "checkpoint")


# simulated/test_serving.py tests every field of the key.
@pytest.mark.parametrize("change", ["backend.torchair.topology_sorting_strategy=DFS", "tp=2"])
def test_another_option_or_number_of_ranks_finds_no_graph(change, first, store, tmp_path):
    done = run(tmp_path / "out", "backend=torchair", store, "plan.compile=never", change)
    assert done.code == 2
    message = done.one_line_error().replace("rank 0: ", "")
    assert "is not in the graph store, and plan.compile=never" in message


def test_two_ranks_give_the_tokens_of_one(checkpoint, requests, store, tmp_path):
    plan = {"batch": 8, "page_size": 128}
    # Steps are launched one ahead as soon as no request is left that has log-probabilities.
    lines = [line | {"logprobs": 2 if line["max_new_tokens"] < 40 else None} for line in few(requests, "cross_first")]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = serve(start(checkpoint("cross_first"), **plan), lines)
    done = run(
        tmp_path / "out",
        "backend=torchair",
        # Every decode step in the form with the most arithmetic.
        "backend.torchair.attention=split",
        "tp=2",
        "dtype=fp32",
        "batch=8",
        "model=custom",
        store,
        "max_input_length=300",
        "max_output_length=100",
        "max_images=4",
        "plan.prefill_tokens=[32]",
        "plan.mixed_tokens=[32]",
        "plan.decode_batch=[8]",
        "plan.pages=[4]",
        "plan.images=[4]",
        f"weights={checkpoint('cross_first')}",
        f"requests={tmp_path / 'requests.jsonl'}",
    )
    assert done.code == 0, done.err
    assert len(done.lines()) == len(lines)
    assert not wrong(done.lines(), one)


def test_the_tiny_model_answers_held_out_scenes_as_with_plain_operations(store, tmp_path):
    task = [
        "task=evaluate",
        "task.each=3",
        "task.controls=false",
        "batch=8",
        "plan.decode_batch=[8]",
        "max_images=2",
        "plan.prefill_tokens=[64]",
        "plan.mixed_tokens=[64]",
        "max_input_length=64",
        "max_output_length=60",
        "plan.images=[2]",
    ]
    texts = []
    for name, backend in (("npu", ["backend=torchair", store]), ("plain", ["backend=eager", "device=cpu"])):
        done = run(tmp_path / name, *task, *backend)
        assert done.code == 0, done.err
        texts.append([line["text"] for line in done.lines()])
    assert len(texts[0]) == 66
    assert texts[0] == texts[1]


def test_an_interrupt_ends_the_run_and_keeps_every_finished_line(store, tmp_path):
    assert_kept(interrupted(tmp_path, 60, "backend=torchair", store, "max_input_length=30"), 60)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["backend.torchair.mode=npugraph_ex"], "captures kernels while they run, and the simulation has none"),
        (["plan.page_size=64"], "plan.page_size=64: an NPU's attention takes pages of 128 to 512 tokens"),
        (["plan.num_images=2", "batch=2"], "4 images for each of 2 sequences"),
        (["weights=meta", "model=11b"], "graphs are lowered without weights by task=verify"),
        (["collectives=shared_memory", "tp=2"], "collectives=shared_memory serves CPU ranks"),
        (["device=npu"], "no NPU device is visible; this machine shows none"),
    ],
)
def test_options_that_the_simulation_does_not_support_are_refused_in_one_line(given, message, tmp_path):
    done = run(tmp_path / "out", "backend=torchair", *given)
    assert done.code == 2
    assert message in done.one_line_error()


def test_under_torchrun_the_simulation_explains_how_to_start(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20031"}.items():
        monkeypatch.setenv(name, value)
    done = run(tmp_path / "out", "backend=torchair")
    assert done.code == 2
    assert "start it with python run.py" in done.one_line_error()


def test_a_cpu_run_beside_an_installed_torch_npu_needs_no_cann(tmp_path):
    assert "native" not in os.environ.get("LD_LIBRARY_PATH", "")
    done = run(tmp_path / "out", "backend=eager", "device=cpu")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == ANSWER


# Three layers, and one bucket of each kind.
SMALL = ["task=verify", "model=custom", "max_input_length=32", "max_output_length=16", "max_images=1"]


def test_verify_lowers_every_graph_of_the_plan_and_prints_a_verdict_for_each(checkpoint, tmp_path):
    done = run(tmp_path / "out", *SMALL, f"weights={checkpoint('no_template')}")
    assert done.code == 0, done.err
    result = done.result()
    assert result["metrics"]["findings"] == []
    assert result["status"] == "ok"
    buckets = {graph["bucket"] for graph in result["graphs"]}
    assert {bucket.split()[0] for bucket in buckets} == {"vision", "prefill", "decode"}
    assert all(bucket in done.out for bucket in buckets)
    assert done.out.count(" clean ") == len(buckets)
    assert "modelled ms" in done.out


def test_a_graph_that_breaks_a_rule_ends_verify_with_code_1_and_the_line_of_the_model(checkpoint, tmp_path):
    """Runs a copy of the project whose attention gets its lengths as Python numbers."""
    broken = tmp_path / "project"
    shutil.copytree(ROOT, broken, ignore=shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__"))
    source = broken / "mllama_graph" / "ops" / "npu_attention.py"
    right = re.compile(r"(actual_seq_lengths=ends_B,\s+)actual_seq_lengths_kv=len_B,")
    changed, count = right.subn(r"\1actual_seq_lengths_kv=[5] * len(len_B), captured=True,", source.read_text())
    assert count == 1
    source.write_text(changed)
    command = [
        sys.executable,
        str(broken / "run.py"),
        *SMALL,
        f"weights={checkpoint('no_template')}",
        f"hydra.run.dir={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "actual_seq_lengths_kv comes from a constant" in error
    assert "mllama_graph/model/text.py" in error
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "error"
    assert result["graphs"]
    assert result["metrics"]["findings"]
