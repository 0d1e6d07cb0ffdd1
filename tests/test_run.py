"""The command line: run.py in a process of its own, the files that it leaves, and how it ends."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import OverrideParseException
from hypothesis import example, given, settings, strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import run as command
from checkpoints import SPECS
from engines import GRAPH_PLAN, GRAPH_SPEC, GRAPHS, arguments, serve, start
from request_cases import random_image

from mllama_graph.core.config import Run

ROOT = Path(__file__).parents[1]
# Small and quick: no compiler, and limits that hold the cases.
QUICK = ["backend=eager", "dtype=fp32", "max_input_length=300", "max_output_length=8", "model=custom"]
# Two of 90 x 60 pixels need two by two tiles of 56 each, to be shrunk in neither direction; 50 tokens a tile.
TWO_IMAGES = 2 * 4 * 50
HOSTILE = r"""a,b 'c' "d" (e) f=g [h] {i: j} ${x} ${oc.env:HOME} \ \" \${y} 图里有什么？ -m ~k +l @m % # end\\"""


@dataclass(frozen=True)
class Done:
    """A finished run.py: how it ended, what it printed, where it wrote."""

    code: int
    out: str
    err: str
    folder: Path
    seconds: float

    def result(self, job="."):
        return json.loads((self.folder / job / "result.json").read_text())

    def lines(self):
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]

    def one_line_error(self) -> str:
        """The single line on stderr that says what is wrong; the stack, if any, is in run.log alone."""
        assert "Traceback" not in self.err + self.out
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0].removeprefix("error: ")


def command_line(folder: Path, *arguments: str) -> list[str]:
    where = "sweep" if "-m" in arguments else "run"
    return [sys.executable, str(ROOT / "run.py"), *arguments, f"hydra.{where}.dir={folder}"]


def run(folder: Path, *arguments: str, cwd=None) -> Done:
    """run.py with its output in `folder`, started elsewhere than in the repository."""
    begun = time.perf_counter()
    done = subprocess.run(command_line(folder, *arguments), capture_output=True, text=True, cwd=cwd or folder.parent,
                          timeout=300)
    return Done(done.returncode, done.stdout, done.stderr, folder, time.perf_counter() - begun)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n, name in enumerate(("a.png", "b 'q', (c)=d.png")):
        random_image(90, 60 + n, "RGB", np.random.default_rng(n)).save(folder / name)
    return folder


# ---- one chat


@pytest.fixture(scope="module")
def chat(checkpoint, pictures, tmp_path_factory):
    """A chat whose prompt, system message and images hold everything that Hydra's grammar would trip over."""
    return run(tmp_path_factory.mktemp("chat") / "out", *QUICK, f"weights={checkpoint('base')}", f"prompt={HOSTILE}",
               f"system=Be brief, 'please' ({HOSTILE[:9]}).", f"image={pictures}", "batch=2")


def test_a_chat_of_hostile_characters_arrives_literally(chat, checkpoint, pictures):
    assert chat.code == 0, chat.err
    config = chat.result()["config"]
    assert config["prompt"] == HOSTILE and config["image"] == str(pictures)
    engine = start(checkpoint("base"), max_output_length=8)
    names = sorted(str(path) for path in pictures.iterdir())
    engine.submit(engine.processor.chat(0, HOSTILE, names, f"Be brief, 'please' ({HOSTILE[:9]})."))
    results = []
    engine.run(lambda delta: results.append(delta.result) if delta.result else None)
    assert chat.result()["token_ids"] == results[0].token_ids
    assert chat.result()["text"] == results[0].text
    assert chat.lines()[0]["prompt_tokens"] == results[0].prompt_tokens


def test_the_text_is_on_stdout_then_a_table_and_the_rest_on_stderr(chat):
    text = chat.result()["text"]
    assert chat.out.startswith(text + "\n")
    after = chat.out[len(text):]
    for name in ("prompt tokens", "image tokens", "new tokens", "time to first token", "time per token", "tokens/s",
                 "bytes read a step", "GB/s"):
        assert re.search(rf"^ *{re.escape(name)}  +[\d.]+", after, re.MULTILINE), name
    assert "plan: prefill_tokens=" in chat.err and "weights: " in chat.err


def test_result_json_has_the_fields_of_the_interface(chat):
    result = chat.result()
    assert set(result) == {"status", "error", "config", "versions", "metrics", "graphs", "text", "token_ids"}
    assert (result["status"], result["error"], result["graphs"]) == ("ok", None, [])
    assert {"torch", "transformers", "hydra-core"} <= set(result["versions"])
    metrics, line = result["metrics"], chat.lines()[0]
    assert metrics["prompt_tokens"] == line["prompt_tokens"] and metrics["image_tokens"] == line["image_tokens"]
    assert metrics["new_tokens"] == len(result["token_ids"]) <= 8
    for name in ("time_to_first_token_ms", "time_per_output_token_ms", "tokens_per_second", "bytes_per_step",
                 "gb_per_second", "memory_bytes"):
        assert metrics[name] > 0, name


def test_a_single_chat_leaves_its_line_too(chat):
    [line] = chat.lines()
    assert {"id", "token_ids", "text", "finish_reason", "prompt_tokens", "image_tokens", "time_to_first_token_ms",
            "time_per_output_token_ms"} == set(line)
    assert line["token_ids"] == chat.result()["token_ids"] and line["finish_reason"] in ("stop", "length")
    assert line["image_tokens"] == TWO_IMAGES


def test_a_folder_of_its_own_for_each_run_and_images_by_comma(checkpoint, pictures, tmp_path):
    """Without hydra.run.dir: outputs/<date>/<time> where it was started."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *QUICK, f"weights={checkpoint('base')}", "prompt=hi",
                           f"image={pictures}/a.png,{pictures}/a.png"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("outputs/*/*/result.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}", str(path.parent.relative_to(tmp_path / "outputs")))
    assert {"result.json", "results.jsonl", "run.log", ".hydra"} <= {entry.name for entry in path.parent.iterdir()}
    assert json.loads(path.read_text())["metrics"]["image_tokens"] == TWO_IMAGES


# ---- a file of requests


def test_bad_lines_get_an_error_each_and_the_others_their_results_in_order(checkpoint, requests, tmp_path):
    image, embeddings = SPECS["base"].vocab, SPECS["base"].vocab + 8
    good = [line for line in requests("base") if line["id"] in (
        "text_16", "text_before_image_32", "messages_images", "chain_of_two_65", "prompt_text")]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(Path(good[1]["images"][0]).read_bytes()[:300])
    bad = {
        "missing image": ({"prompt": "x", "images": ["nowhere.png"]}, "nowhere.png does not exist"),
        "corrupt image": ({"prompt": "x", "images": ["text.png"]}, "text.png"),
        "truncated image": ({"prompt": "x", "images": ["half.png"]}, "half.png"),
        "more tokens than images": ({"input_ids": [1, image, image], "images": good[1]["images"]}, "2 .* tokens for 1 images"),
        "no token for an image": ({"input_ids": [1, 2], "images": good[1]["images"]}, "0 .* tokens for 1 images"),
        "too long": ({"input_ids": [1] * 301}, "has 301 ids, max_input_length=300"),
        "too many new": ({"input_ids": [1] * 300, "max_new_tokens": 500}, "the plan holds"),
        "empty prompt": ({"prompt": ""}, "empty"), "no kind": ({"max_new_tokens": 3}, "exactly one of"),
        "empty ids": ({"input_ids": []}, "empty"), "id out of range": ({"input_ids": [embeddings]}, "ids run from 0"),
        "wrong option": ({"prompt": "x", "temperature": "hot"}, "temperature"),
        "overflow": ({"prompt": "x", "temperature": 1, "top_k": 2**70}, "top_k"),
        "long name": ({"prompt": "x", "images": ["n" * 5000]}, "image nnn"),
        "null in name": ({"prompt": "x", "images": ["a\0b"]}, "image a"),
        "bad uri": ({"prompt": "x", "images": ["data:image/png;base64,!"]}, "base64"),
        "list as id": ({"prompt": "x", "images": {"a": 1}}, "images must be"),
    }
    written, wanted = [], []
    for n, (name, (request, message)) in enumerate(bad.items()):
        if n % 4 == 0 and n // 4 < 4:
            written.append(json.dumps(good[n // 4]))
            wanted.append((good[n // 4]["id"], None))
        written.append(json.dumps({"id": name} | request))
        wanted.append((name, message))
    written += ["{not json", "", "[1, 2]", json.dumps(good[0]), json.dumps({"prompt": "no id", "max_new_tokens": 2}),
                json.dumps(good[4])]
    last = len(written)
    wanted += [(last - 5, "not valid JSON"), (last - 3, "not a JSON object"), (good[0]["id"], "used by an earlier line"),
               (last - 1, None), (good[4]["id"], None)]
    (tmp_path / "requests.jsonl").write_text("\n".join(written) + "\n")
    done = run(tmp_path / "out", *QUICK, f"weights={checkpoint('base')}", f"requests={tmp_path / 'requests.jsonl'}",
               "batch=4", "max_output_length=100")
    assert done.code == 0, done.err
    lines = done.lines()
    assert [line["id"] for line in lines] == [id for id, _ in wanted]
    expected = serve(start(checkpoint("base"), batch=2), good)
    for line, (id, message) in zip(lines, wanted):
        if message:
            assert line["finish_reason"] == "error" and re.search(message, line["error"]), line
            assert "\n" not in line["error"] and len(line["error"]) < 500
        else:
            assert "error" not in line
            if id in expected:
                assert (line["token_ids"], line["text"]) == (expected[id].token_ids, expected[id].text)
                assert ("logprobs" in line) == any("logprobs" in request for request in good if request["id"] == id)
    steps = [step for line in lines for step in line.get("logprobs", [])]
    assert steps and all(set(step) == {"id", "logprob", "top_ids", "top_logprobs"} for step in steps)
    assert done.result()["metrics"]["requests"] == len(good) + 1


def interrupted(tmp_path, requests: int, *arguments: str) -> Done:
    """A run of many requests of 100 tokens each, stopped by Ctrl-C when the third is finished."""
    lines = [{"id": n, "input_ids": [n + 1] * 20, "max_new_tokens": 100, "ignore_eos": True} for n in range(requests)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command_line(folder, f"requests={tmp_path / 'requests.jsonl'}", "max_output_length=100", *arguments), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        results, until = folder / "results.jsonl", time.monotonic() + 120
        while not (results.exists() and results.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return Done(process.returncode, out, err, folder, 0)


def assert_kept(done: Done, requests: int) -> None:
    """The interrupt ended the run, and every finished request is there whole."""
    assert done.code == 130
    assert "interrupted" in done.one_line_error()
    kept = done.lines()
    assert 3 <= len(kept) < requests
    assert all(len(line["token_ids"]) == 100 for line in kept)
    assert done.result()["status"] == "error"


def test_an_interrupt_keeps_every_finished_line(checkpoint, tmp_path):
    assert_kept(interrupted(tmp_path, 200, *QUICK, f"weights={checkpoint('base')}"), 200)


# ---- errors


@pytest.mark.parametrize("arguments, message", [
    (["model=custom"], "weights= is not given.*weights=random"),
    (["weights=nowhere/at/all"], "weights=nowhere/at/all is not a folder.*weights=random"),
    (["model=custom", "weights=random"], "model=custom takes its shapes from a checkpoint"),
    (["weights=random", "model=11b", "dtype=fp8"], "dtype=fp8 is not one of auto, fp32, fp16, bf16"),
    (["weights=random", "model=11b", "tp=3"], r"tp=3 does not divide the model's heads \(32 query, 8 key-value, 16 vision\)"
     r"\. tp can be 1, 2, 4, 8\."),
    (["weights=random", "model=11b", "timeout=0"], "timeout=0 must be above 0 seconds"),
    (["weights=random", "model=11b", "collectives=mpi"], "collectives=mpi is not one of auto, shared_memory, distributed"),
    (["quant=w8a8"], "quant=w8a8"),
    (["device=npu"], "device=npu needs torch_npu, which is not installed. Install it|needs 1 npu devices; this machine shows 0"),
    (["backend=torchair", "device=cpu"], "backend=torchair compiles for an NPU, not for device=cpu"),
    (["backend=eager", "device=npu-sim"], "backend=eager does not run on device=npu-sim. Use backend=torchair"),
    (["backend.torchair.mode=fast"], "backend.torchair.mode=fast is not one of max-autotune, npugraph_ex"),
    (["weights=random", "model=11b", "top_p=0"], "top_p=0"),
    (["weights=random", "model=11b", "requests=nowhere.jsonl"], "nowhere.jsonl can't be read"),
])
def test_a_users_error_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(tmp_path / "out", *arguments)
    assert done.code == 2
    assert re.search(message, done.one_line_error())
    assert done.result()["status"] == "error" and done.result()["error"] == done.one_line_error()
    assert "Traceback" in (done.folder / "run.log").read_text()


@pytest.mark.parametrize("arguments, message", [
    (["tpp=4"], "there is no key 'tpp'. Did you mean tp"), (["model=12b"], "model=12b is not one of 11b, 90b, custom, mid, tiny"),
    (["tp=four"], "tp.*four"), (["batch=1.5"], "batch"), (["plan.page_sise=3"], "plan.page_sise"),
    (["backend=cuda"], "backend=cuda is not one of"), (["prompt"], "prompt"), (["seed=(1"], "seed"),
    (["experiment=nope"], "experiment=nope is not one of buckets"), (["batch_sizes=2"], r"batch_sizes=2 must be a list. Use batch_sizes=\[2\]"),
    (["batch=1,4"], "Use -m to run a job for each"), (["task.nope=1"], "no key 'task.nope'. conf/task/ and"),
])
def test_what_cant_be_composed_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(tmp_path / "out", *arguments)
    assert done.code == 2
    assert re.search(message, done.one_line_error())


@pytest.mark.parametrize("model, needed", [("90b", 177), ("11b", 21)])
def test_a_machine_too_small_is_told_within_seconds_what_is_needed_and_what_there_is(model, needed, tmp_path):
    done = run(tmp_path / "out", f"model={model}", "weights=random", "memory_gib=4")
    assert done.code == 2
    error = done.one_line_error()
    found = re.search(r"weights ([\d.]+) .* = ([\d.]+) GB needed, 3\.\d+ GB available", error)
    assert found, error
    assert needed <= float(found[1]) < float(found[2])
    # Imports of torch on a busy machine included; nothing of the model's size is touched.
    assert done.seconds < 30


def test_a_checkpoint_that_is_not_the_model_says_how_they_differ(checkpoint, tmp_path):
    done = run(tmp_path / "out", "model=11b", f"weights={checkpoint('base')}")
    assert done.code == 2
    assert re.search("is not model=11b: text.vocab: expected 128256, found 409.*model=custom", done.one_line_error())


# ---- sweeps


def test_a_sweep_with_a_failing_job_finishes_the_others_and_fails(checkpoint, tmp_path):
    done = run(tmp_path / "out", "-m", "backend=eager", "dtype=fp8,fp32", "max_output_length=4",
               f"weights={checkpoint('base')}", "prompt=one, two")
    assert done.code != 0
    assert "dtype=fp8" in done.one_line_error()
    jobs = sorted(path.name for path in done.folder.iterdir() if path.is_dir())
    assert [name.split("_")[0] for name in jobs] == ["0", "1"] and "dtype=fp32" in jobs[1]
    assert not any("prompt" in name for name in jobs)
    assert done.result(jobs[0])["status"] == "error"
    good = done.result(jobs[1])
    assert good["status"] == "ok" and good["token_ids"] and good["config"]["prompt"] == "one, two"
    said = (done.folder / "summary.md").read_text()
    assert "| 0 | fp8 | error | - | - | - | - |" in said and "- job 0: dtype=fp8 is not one of" in said
    assert re.search(r"\| 1 \| fp32 \| ok \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", said)
    with (done.folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["dtype"], row["status"]) for row in rows] == [("0", "fp8", "error"), ("1", "fp32", "ok")]
    assert rows[1]["tokens_per_second"] and (done.folder / "first_token_ms.png").is_file()
    assert "job 2 of 2, about" in done.err


@pytest.mark.parametrize("launcher", ["parallel", "submitit_local"])
def test_jobs_run_elsewhere_and_a_failing_one_is_counted(launcher, checkpoint, tmp_path):
    done = run(tmp_path / "out", "-m", f"hydra/launcher={launcher}", "backend=eager", "dtype=fp8,fp32", "max_output_length=4",
               f"weights={checkpoint('base')}", "prompt=one")
    assert done.code == 2, done.err
    with (done.folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["dtype"], row["status"]) for row in rows] == [("0", "fp8", "error"), ("1", "fp32", "ok")]
    assert "Traceback" not in done.out + done.err


def jobs_of(*given):
    """What each job of a sweep is given, as Hydra composes it: nothing is run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(given), return_hydra_config=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name):
    ConfigStore.instance().store(name="schema", node=Run)
    composed = jobs_of(f"experiment={name}")
    swept = composed.hydra.sweeper.get("params") or {}
    assert bool(swept) == (name not in ("performance", "h200"))
    if name == "performance":
        assert list(composed.batch_sizes) == list(range(1, 11)) and composed.task.name == "bench"


def test_a_cold_start_compiles_and_a_warm_one_finds(checkpoint, tmp_path):
    # One token: the graph of the prompt alone. Without kernels, which a graph store of its own would compile too.
    plan = GRAPH_PLAN | {"max_output_length": 1, "kernels": "plain"}
    done = run(tmp_path / "out", "-m", "experiment=cold_vs_warm", f"weights={checkpoint(GRAPH_SPEC)}", "prompt=one",
               *arguments(plan))
    assert done.code == 0, done.err
    with (done.folder / "summary.csv").open() as file:
        cold, warm = csv.DictReader(file)
    assert (cold["plan.compile"], warm["plan.compile"]) == ("wait", "never")
    assert float(cold["start_to_first_token_s"]) > float(warm["start_to_first_token_s"]) > 0


# ---- the graph store


def cache(store, folder, *arguments):
    return run(folder, "task=cache", f"graph_cache={store}", *arguments)


def test_a_warm_store_serves_a_run_that_may_not_compile(warm, checkpoint, tmp_path):
    common = [f"weights={checkpoint(GRAPH_SPEC)}", f"graph_cache={warm[0]}", *arguments(GRAPH_PLAN)]
    done = run(tmp_path / "chat", *common, "prompt=Hi, you", "plan.compile=never")
    assert done.code == 0, done.err
    assert [(g["phase"], g["source"]) for g in done.result()["graphs"]] == [("prefill", "hit"), ("decode", "hit")]
    again = run(tmp_path / "warmup", "task=warmup", *common)
    assert again.code == 0 and again.result()["metrics"]["compiled"] == 0, again.err
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


# ---- quoting


@pytest.fixture(scope="module")
def composed():
    """composed(arguments) -> the Run that run.py would make of them."""
    ConfigStore.instance().store(name="schema", node=Run)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *arguments: OmegaConf.to_object(
            compose("config", overrides=[command.literal(argument) for argument in arguments]))


GRAMMAR = st.text(alphabet=r"""ab\"'$${{}},=()[]:~+ @#图😀/%*?!&|;<>^`.-_0""" + "\n\t", max_size=25)
ANY = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=25)


@given(text=GRAMMAR | ANY, key=st.sampled_from(command.LITERAL_KEYS))
@example(text=HOSTILE, key="prompt")
@example(text="null", key="prompt")
@example(text="", key="prompt")
@example(text="1,2", key="image")
@settings(max_examples=60)
def test_a_literal_value_arrives_unchanged(text, key, composed):
    assert attrgetter(key)(composed(f"{key}={text}")) == text


def test_three_question_marks_which_the_configuration_can_t_hold_are_refused(composed):
    # OmegaConf writes a missing value so, and has no escape for it.
    with pytest.raises(MissingMandatoryValue) as error:
        composed("prompt=???")
    assert command.explain(error.value) == (
        "prompt=??? is how the configuration writes a missing value. Give something else.")


def test_what_hydra_cannot_read_is_named_with_how_to_write_it(composed):
    with pytest.raises(OverrideParseException) as error:
        composed("batch_sizes=[3,")
    told = command.explain(error.value)
    assert told.startswith("batch_sizes=[3, can't be read") and "key=[1,2] without spaces" in told and "\n" not in told


@given(text=ANY)
def test_other_arguments_are_left_to_hydra(text):
    for argument in (f"batch={text}", f"--{text}", f"+prompt.{text}", text.replace("=", "")):
        key = argument.partition("=")[0]
        assert key in command.LITERAL_KEYS or command.literal(argument) == argument


def test_without_a_compiler_the_text_is_the_same_and_one_line_says_why_it_is_slower(tmp_path, monkeypatch):
    asked = ["prompt=How many shapes are there?", f"image={ROOT / 'mllama_graph/tiny/scene.png'}"]
    eager = run(tmp_path / "eager", *asked, "backend=eager")
    monkeypatch.setenv("CXX", "no-such-compiler")
    without = run(tmp_path / "without", *asked, f"graph_cache={tmp_path / 'graphs'}")
    assert (eager.code, without.code) == (0, 0), without.err
    text = lambda done: done.out.partition("\n\n")[0]  # noqa: E731
    assert text(without) == text(eager) and "three shapes" in text(eager)
    assert without.err.count("no C++ compiler") == 1 and "could not" not in without.err
    warmup = run(tmp_path / "warmup", "task=warmup", f"graph_cache={tmp_path / 'graphs'}")
    assert warmup.code == 2 and warmup.err.count("no C++ compiler") == 1 and "graphs could not be compiled" in warmup.err, warmup.err


def test_what_a_compiler_left_serves_without_one(tmp_path, monkeypatch, empty_store):
    asked = ["prompt=Hello", "image=", "max_output_length=4", f"graph_cache={empty_store}", "plan.compile=wait"]
    first = run(tmp_path / "first", *asked)
    monkeypatch.setenv("CXX", "no-such-compiler")
    again = run(tmp_path / "again", *asked)
    assert (first.code, again.code) == (0, 0), again.err
    assert "no C++ compiler" not in again.err and again.out.partition("\n")[0] == first.out.partition("\n")[0]
    assert [{graph["source"] for graph in done.result()["graphs"]} for done in (first, again)] == [{"compiled"}, {"hit"}]
