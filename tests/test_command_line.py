"""Command-line arguments: which are taken literally, and which are refused in one line with rule and remedy."""

import re
from operator import attrgetter

import pytest
from commands import HOSTILE, ROOT, run
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import OverrideParseException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import mllama_graph
from mllama_graph import compose as command
from mllama_graph.__main__ import main
from mllama_graph.core.config import check, unused, with_task_keys
from mllama_graph.core.devices import CUDA
from mllama_graph.core.errors import UserError
from mllama_graph.plan.resolve import resolve


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model=custom"], "weights= is not given.*weights=random"),
        (["weights=nowhere/at/all"], "weights=nowhere/at/all is not a folder.*weights=random"),
        (
            ["model=custom", "weights=random"],
            "model=custom takes its shapes from a checkpoint.*11b, model=90b or model=mid",
        ),
        (["weights=random", "model=11b", "dtype=fp8"], "dtype=fp8 is not one of auto, fp32, fp16, bf16"),
        (
            ["weights=random", "model=11b", "tp=3"],
            r"tp=3 does not divide the model's heads \(32 query, 8 key-value, 16 vision\)"
            r"\. tp can be 1, 2, 4, 8\.",
        ),
        (["weights=random", "model=11b", "timeout=0"], "timeout=0 must be above 0 seconds"),
        (
            ["weights=random", "model=11b", "collectives=mpi"],
            "collectives=mpi is not one of auto, shared_memory, distributed",
        ),
        (["quant=int3"], "quant=int3 is not one of none, w8a16, w8a8, w4a16, w4a8, fp8"),
        (
            ["device=npu"],
            "device=npu needs torch_npu, which is not installed. Install it|no NPU device is visible; this machine",
        ),
        (["backend=torchair", "device=cpu"], "backend=torchair compiles for an NPU, not for device=cpu"),
        (["backend=eager", "device=npu-sim"], "backend=eager does not run on device=npu-sim. Use backend=torchair"),
        (["backend.torchair.mode=fast"], "backend.torchair.mode=fast is not one of max-autotune, npugraph_ex"),
        (["weights=random", "model=11b", "top_p=0"], "top_p=0"),
        (["weights=random", "model=11b", "requests=nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (
            ["requests=a.jsonl", "system=Be brief"],
            "system= and requests= exclude each other.*Leave system= or requests=",
        ),
        (["image=", "prompt=hi"], "image= is empty. .*leave image= out for a prompt without a picture"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(tmp_path / "out", *arguments)
    assert done.code == 2
    assert re.search(message, done.one_line_error())
    assert done.result()["status"] == "error" and done.result()["error"] == done.one_line_error()
    assert "Traceback" in (done.folder / "run.log").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tpp=4"], "there is no key 'tpp'. Did you mean tp"),
        (["model=12b"], "model=12b is not one of 11b, 90b, custom, mid, tiny"),
        (["model=meta/Llama-3"], "model=meta/Llama-3 is not one of 11b, .*folder goes to weights=.*are not downloaded"),
        (["--model=tiny"], "--model=tiny: keys are written without dashes. Write model=tiny."),
        (["--max-images", "3"], "--max-images: keys are written without dashes. Write max_images=VALUE."),
        (["--no-such"], "--no-such is not an option. Keys are written as key=value"),
        (["plan.page_sise=3"], "plan.page_sise"),
        (["backend=cuda"], "backend=cuda is not one of"),
        (["experiment=nope"], "experiment=nope is not one of buckets"),
        (["batch_sizes=2"], r"batch_sizes=2 must be a list. Use batch_sizes=\[2\]"),
        (["batch=1,4"], "Use -m to run one job per value"),
        (["task.nope=1"], "no key 'task.nope'. conf/task/ and"),
    ],
)
def test_an_invalid_override_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(tmp_path / "out", *arguments)
    assert done.code == 2
    assert re.search(message, done.one_line_error())


@pytest.mark.parametrize("model, needed", [("90b", 177), ("11b", 21)])
def test_too_little_memory_is_reported_within_seconds_with_both_amounts(model, needed, tmp_path):
    done = run(tmp_path / "out", f"model={model}", "weights=random", "memory_gib=4")
    assert done.code == 2
    error = done.one_line_error()
    found = re.search(r"weights ([\d.]+) .* = ([\d.]+) GB needed, 3\.\d+ GB available", error)
    assert found, error
    assert needed <= float(found[1]) < float(found[2])
    # This includes importing torch on a busy machine; no memory of the model's size is allocated.
    assert done.seconds < 30


def test_a_checkpoint_that_is_not_the_model_says_how_they_differ(checkpoint, tmp_path):
    done = run(tmp_path / "out", "model=11b", f"weights={checkpoint('base')}")
    assert done.code == 2
    assert re.search("is not model=11b: text.vocab: expected 128256, found 409.*model=custom", done.one_line_error())


# ---- quoting


@pytest.fixture(scope="module")
def composed():
    """composed(arguments) -> the Run that the command line would make of them."""
    command.register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):

        def compose(*arguments):
            return OmegaConf.to_object(hydra_compose("config", [command.literal(argument) for argument in arguments]))

        yield compose


GRAMMAR = st.text(alphabet=r"""ab\"'$${{}},=()[]:~+ @#图😀/%*?!&|;<>^`.-_0""" + "\n\t", max_size=25)
ANY = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=25)


@given(text=GRAMMAR | ANY, key=st.sampled_from(command.LITERAL_KEYS))
@example(text=HOSTILE, key="prompt")
@example(text="null", key="prompt")
@example(text="", key="prompt")
@example(text="1,2", key="image")
@settings(max_examples=60)
def test_a_literal_value_arrives_unchanged(text, key, composed):
    task = {
        "task.a": ["task=compare"],
        "task.b": ["task=compare"],
        "task.measured": ["task=roofline"],
        "task.against": ["task=evaluate"],
        "task.calibration": ["task=quantize"],
        "task.folder": ["task=train_tiny"],
        "task.api_key": ["task=serve"],
        "task.files_below": ["task=serve"],
        "task.input": ["task=batch"],
        "task.output": ["task=batch"],
    }.get(key, [])
    assert attrgetter(key)(composed(*task, f"{key}={text}")) == text


def test_a_value_of_three_question_marks_is_refused(composed):
    # OmegaConf uses ??? for a missing value and has no escape for it.
    with pytest.raises(MissingMandatoryValue) as error:
        composed("prompt=???")
    assert command.explain(error.value) == (
        "prompt=??? is how the configuration writes a missing value. Give something else."
    )


@pytest.mark.parametrize(
    "argument, message",
    [
        ("temperature=abc", "temperature=abc must be a number."),
        ("tp=four", "tp=four must be a whole number."),
        ("batch=1.5", "batch=1.5 must be a whole number."),
        ("plan.page_size=x", "plan.page_size=x must be a whole number."),
        ("resume=maybe", "resume=maybe must be true or false."),
        ("speculate=null", "speculate=null: it must have a value. Leave speculate= out for its default, or use specu"),
        ("quant=null", "quant=null: it must have a value. Leave quant= out for its default, or use quant=none."),
        (
            "plan.page_size=null",
            "plan.page_size=null: it must have a value. Leave plan.page_size= out for its default.",
        ),
        ("min_p=0.1", "there is no key 'min_p': it is a field of requests. Write it on the lines of requests="),
        ("max_new_tokens=5", "there is no key 'max_new_tokens': it is a field of requests."),
        ("prompt", "prompt has no value. Write prompt=VALUE, and quote a value with spaces."),
        ("hello", "hello is not of the form key=value. Quote a value with spaces: prompt='two words'."),
        ("seed=(1", "seed=(1 can't be read. Write it as key=value, a list as key=[1,2] without spaces"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_without_hydras_words(argument, message, composed):
    with pytest.raises(command.COMPOSING_ERRORS) as error:
        composed(argument)
    assert command.explain(error.value).startswith(message)


@pytest.mark.parametrize("argument", ["task=null", "model=null", "backend=null"])
def test_a_group_without_a_choice_is_refused(argument):
    with pytest.raises(UserError, match=f"{argument}: it must have a value. Use one of .*, or leave .*= out."):
        command.refuse_odd([argument])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["speculate=draft", "draft=/nowhere"],
            "draft=/nowhere is not a folder. Give a Hugging Face checkpoint folder.",
        ),
        (["task=evaluate", "task.each=0"], "task.each=0 must be at least 1."),
        (
            ["task=quantize", "task.folder=/nowhere", "quant=w4a16", "task.rounding=gptq", "max_images=1"]
            + ["task.calibration=/nowhere"],
            "task.calibration=/nowhere can't be read: No such file or directory.",
        ),
    ],
    ids=str,
)
def test_an_error_names_the_key_that_was_given(arguments, message, composed, tmp_path):
    run = composed(*arguments)
    run.output_dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        check(run)
        resolve(run, None)
    assert str(error.value) == message


def test_keys_without_effect_are_named(composed):
    said = unused(composed("speculate_tokens=8", "quant=w8a16", "quant_group=64", "quant_parts=[text,head]"))
    assert [line.partition(":")[0] for line in said] == ["speculate_tokens=8 is not used", "quant_group=64 is not used"]
    assert unused(composed("quant_parts=[head]")) == ("quant_parts=[head] is not used: quant=none quantises nothing",)
    assert not unused(composed("speculate=ngram", "speculate_tokens=8", "quant=w4a16", "quant_group=64"))


def test_a_missing_device_is_told_apart_from_too_few():
    for environment, message in (
        ({"CUDA_VISIBLE_DEVICES": ""}, "device=cuda: no CUDA device is visible; CUDA_VISIBLE_DEVICES= shows none"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "tp=2 needs 2 cuda devices; CUDA_VISIBLE_DEVICES=0 shows 1. Lower tp"),
    ):
        with pytest.raises(UserError, match=message):
            CUDA.check_count(2, environment)


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--version"])
    assert main() == 0 and capsys.readouterr().out == f"mllama_graph {mllama_graph.__version__}\n"


def test_a_value_that_hydra_cannot_parse_is_named_with_the_right_syntax(composed):
    with pytest.raises(OverrideParseException) as error:
        composed("batch_sizes=[3,")
    told = command.explain(error.value)
    assert told.startswith("batch_sizes=[3, can't be read") and "key=[1,2] without spaces" in told and "\n" not in told


@given(text=ANY)
def test_other_arguments_are_left_to_hydra(text):
    for argument in (f"batch={text}", f"--{text}", f"+prompt.{text}", text.replace("=", "")):
        key = argument.partition("=")[0]
        assert key in command.LITERAL_KEYS or command.literal(argument) == argument


@pytest.mark.parametrize("short, key", [("batch_sizes=[3,4]", "task.batch_sizes"), ("lengths=[7]", "task.lengths")])
def test_short_names_are_keys_of_the_task_that_owns_them(short, key, composed):
    name, _, value = short.partition("=")
    by_short = with_task_keys(composed("task=bench", short))
    assert by_short == composed("task=bench", f"{key}={value}")
    with pytest.raises(UserError, match=rf"{name}=.*only task=bench, profile and roofline.* or leave {name}= out"):
        with_task_keys(composed("task=generate", short))
