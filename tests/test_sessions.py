"""Sessions of measurements: the columns of bench.csv, the summary, the comparison of sessions, and the roofline."""

import csv
import json
import re
import shutil

import pytest
from commands import run
from test_verify import RELEASED

from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.model.formats import Storage
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cost import floor_of, work
from mllama_graph.tasks.compare import verdict

SEED = [
    "batch",
    "input_len",
    "output_len",
    "embedding_len",
    "first_token_time(ms)",
    "non_first_token_time(ms)",
    "ResponseTime(ms)",
    "E2E Throughput Average(Tokens/s)",
]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The folder of a small session."""
    folder = tmp_path_factory.mktemp("session") / "out"
    done = run(
        folder,
        "task=bench",
        "batch_sizes=[1,2]",
        "lengths=[5,40]",
        "task.new_tokens=4",
        "task.repetitions=2",
        "task.neighbours=1",
        "backend=eager",
    )
    assert done.code == 0, done.err
    return folder


def test_each_case_has_a_line_whose_first_columns_are_fixed(session):
    with (session / "bench.csv").open() as file:
        both = list(csv.DictReader(file))
    lines, beside = both[::2], both[1::2]
    assert {line["engine"] for line in beside} == {"mllama_graph, busy neighbours: 1"}
    assert list(lines[0])[:8] == SEED
    assert [(line["batch"], line["input_len"]) for line in lines] == [("1", "5"), ("1", "40"), ("2", "5"), ("2", "40")]
    for line in lines:
        figures = {name: float(value) for name, value in line.items() if name != "engine"}
        # The tiny model's picture: 2 tiles of 74 tokens, the class token included.
        assert figures["output_len"] == 4 and figures["embedding_len"] == 148
        assert figures["decode_ms_least"] <= figures["non_first_token_time(ms)"] <= figures["decode_ms_most"]
        assert figures["first_token_time(ms)"] >= figures["vision_ms"] + figures["prefill_ms"] > 0
        # The second time, the image's pages are cached and need no vision step.
        assert figures["first_token_again_ms"] > 0
        assert figures["decode_of_floor"] > 0 and figures["read_gb_per_s"] > 0
    assert float(lines[3]["self_kv_bytes"]) > float(lines[1]["self_kv_bytes"])


def test_an_unknown_peer_and_no_batch_are_refused(tmp_path):
    for task, given, said in (
        ("bench", ["peers=[vllm]"], "peers=vllm is not one of transformers"),
        ("bench", ["peers=vllm"], "peers=vllm is not one of transformers"),
        ("bench", ["batch_sizes=[0]"], "batch_sizes=0"),
        ("bench", ["peers=[mistralrs]", "task.mistralrs=no/python"], "task.mistralrs=no/python is not an executable"),
        ("bench", ["peers=[llamacpp Q8_0]", "task.llamacpp=no/python"], "pip install llama-cpp-python=="),
        ("bench", ["peers=openvino int3"], "peers=openvino int3 is not one of transformers"),
        ("profile", ["peers=[transformers]"], "only task=bench measures other engines"),
    ):
        done = run(tmp_path / "out", f"task={task}", *given)
        assert done.code == 2 and said in done.err, done.err


def test_a_session_says_which_of_its_graphs_could_not_be_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    done = run(
        tmp_path / "out",
        "task=bench",
        "backend.kernels=plain",
        "task.images=0",
        "task.new_tokens=2",
        "task.repetitions=1",
        f"graph_cache={tmp_path / 'graphs'}",
    )
    assert done.code == 0, done.err
    said = re.search(
        r"Could not be compiled, so these steps ran uncompiled: (.*)\.\*\*", (tmp_path / "out/summary.md").read_text()
    )
    assert [graph.split()[0] for graph in said[1].split("; ")] == ["decode", "prefill"]


def test_a_peer_is_measured_beside_it_on_the_same_work(tmp_path):
    done = run(
        tmp_path / "out",
        "task=bench",
        "peers=[transformers fp32]",
        "task.new_tokens=4",
        "task.repetitions=1",
        "backend=eager",
    )
    assert done.code == 0 and "can't run" not in done.err, done.err
    with (tmp_path / "out" / "bench.csv").open() as file:
        ours, peer = csv.DictReader(file)
    assert (ours["engine"], peer["engine"]) == ("mllama_graph", "transformers fp32")
    for column in ("batch", "input_len", "images", "decode_bytes", "decode_flops", "first_token_floor_ms"):
        assert peer[column] == ours[column]
    # The response time covers the first token and 3 decode steps, of which one took decode_ms_most.
    assert float(peer["ResponseTime(ms)"]) >= float(peer["first_token_time(ms)"]) + float(peer["decode_ms_most"]) > 0
    assert "- transformers fp32, batch 1, 64 ids: first token " in (tmp_path / "out" / "summary.md").read_text()


def test_a_session_records_its_origin_and_plots_its_figures(session):
    manifest = json.loads((session / "manifest.json").read_text())
    assert manifest["command"].startswith("python run.py task=bench batch_sizes=[1,2]")
    assert (
        manifest["hardware"]["cores"] > 0
        and manifest["versions"]["torch"]
        and manifest["config"]["task"]["repetitions"] == 2
    )
    assert "output_dir" not in manifest["config"]
    text = (session / "summary.md").read_text()
    for name in ("decode_step_by_batch.png", "first_token_by_batch.png", "decoded_tokens_per_s_by_batch.png"):
        assert name in text and (session / name).read_bytes().startswith(b"\x89PNG")


def altered(session, tmp_path, change):
    """A copy of a session with changed lines and manifest."""
    copy = tmp_path / "other"
    shutil.copytree(session, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    with (copy / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    change(lines, manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with (copy / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return copy


def compare(tmp_path, a, b, *given):
    return run(tmp_path / "compared", "task=compare", f"a={a}", f"b={b}", *given)


def slower(lines, manifest):
    for name in ("non_first_token_time(ms)", "decode_ms_least", "decode_ms_most"):
        # More than any spread on a busy machine.
        lines[0][name] = str(float(lines[0][name]) * 100)


def test_a_slower_figure_is_reported_and_noise_is_not(session, tmp_path):
    done = compare(tmp_path, session, altered(session, tmp_path, slower))
    assert done.code == 0, done.err
    changes = done.result()["metrics"]["changes"]
    quiet = [change for change in changes if change["engine"] == "mllama_graph"]
    told = {(change["batch"], change["ids"], change["figure"]): change["verdict"] for change in quiet}
    assert told.pop(("1", "5", "decode step")) == "slower"
    assert set(told.values()) == {"within the noise"}
    assert "1 slower" in done.out and "| slower |" in (tmp_path / "compared" / "summary.md").read_text()


def test_other_hardware_is_refused_without_the_flag(session, tmp_path):
    def move(lines, manifest):
        manifest["hardware"]["cores"] = 512

    other = altered(session, tmp_path, move)
    refused = compare(tmp_path, session, other)
    assert (
        refused.code == 2
        and "cores: " in refused.one_line_error()
        and "across_hardware=true" in refused.one_line_error()
    )
    assert compare(tmp_path, session, other, "task.across_hardware=true").code == 0


@pytest.mark.parametrize(
    "given, rule",
    [(["a=nowhere", "b=nowhere"], "nowhere is no session"), ([], "needs two sessions: a=FOLDER b=FOLDER")],
)
def test_a_comparison_without_two_sessions_is_refused(given, rule, tmp_path):
    done = run(tmp_path / "out", "task=compare", *given)
    assert done.code == 2 and rule in done.one_line_error()


@pytest.mark.parametrize(
    "before, after, spreads, told",
    [
        (10, 20, ((9, 11), (18, 22)), "slower"),
        (20, 10, ((18, 22), (9, 11)), "faster"),
        (10, 12, ((9, 13), (10.5, 14)), "within the noise"),
        (10, 12, ((9, 11), (9.5, 14)), "within the noise"),
        (10, 10.4, (None, None), "within the noise"),
        (10, 10.6, (None, None), "slower"),
    ],
)
def test_a_change_stands_out_where_neither_session_saw_the_other_median(before, after, spreads, told):
    assert verdict(before, after, *spreads) == told


def test_the_roofline_of_a_model_needs_no_weights_and_says_the_distance(session, tmp_path):
    done = run(tmp_path / "out", "task=roofline", "hardware=cpu", f"task.measured={session}")
    assert done.code == 0, done.err
    tables = done.result()["metrics"]["tables"]
    measured = tables["Measured, beside the floors of cpu"]
    assert [row["batch"] for row in measured if row["engine"] == "mllama_graph"] == [1, 1, 2, 2]
    assert all(float(row["floor reached"].removesuffix(" %")) > 0 for row in measured)
    for name in ("latency_by_batch", "tokens_by_batch", "bytes_split", "roofline"):
        assert (tmp_path / "out" / f"{name}.png").is_file()


def test_what_fits_on_eight_devices_need_not_fit_on_one(tmp_path):
    done = run(tmp_path / "out", "task=roofline", "model=90b", "tp=8")
    assert done.code == 0, done.err
    fits = {
        row["tp"]: row
        for row in next(rows for title, rows in done.result()["metrics"]["tables"].items() if "Memory" in title)
    }
    assert (fits[1]["fits"], fits[1]["largest batch"]) == ("no", 0)
    assert fits[8]["fits"] == "yes" and fits[8]["largest batch"] > 100


def test_a_floor_is_the_longer_of_memory_and_compute_time():
    bf16 = Storage(2, 2, 2)
    hardware, bucket = HardwareChoice("a", "npu", 1e14, 1e12, 64e9, 1e10), Bucket("decode", 4, 4, 2, 51)
    moved, flops = work(RELEASED, 128, bucket, bf16)
    floor = floor_of(RELEASED, 128, bucket, bf16, 1, hardware)
    assert floor.seconds == max(moved / 1e12, flops / 1e14) == floor.memory and floor.bound == "memory"
    both = floor_of(RELEASED, 128, bucket, bf16, 2, hardware)
    assert both.seconds == floor.seconds / 2 + both.links and both.links > 0
