"""task=collect: the archive of an earlier run holds what explains a failure, and no weights, prompts or answers."""

import gzip
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from commands import QUICK, run
from safetensors import safe_open

from mllama_graph.core.errors import UserError
from mllama_graph.measure.private import LEFT_OUT, Private
from mllama_graph.tasks.collect import ARCHIVE, environment, newest

PROMPT = "Where did Aunt Rosalind bury the seventeen silver teaspoons? 银匙埋在花园的哪棵树下？"
# Without building kernels.
PLAIN = [*QUICK, "backend.kernels=plain"]
SYSTEM = "You whisper to Bartholomew alone."
REQUESTS = [
    {"prompt": "Name the harbour of the Zanzibar smugglers."},
    {"id": "second", "messages": [{"role": "user", "content": [{"type": "text", "text": "Recite Ottoline's diary."}]}]},
    {"prompt": ["not", "a", "string", "but", "Quillfeather"]},
]
SECRETS = ["Rosalind", "teaspoons", "银匙", "花园", "Bartholomew", "Zanzibar", "smugglers", "Ottoline", "Quillfeather"]


def members(folder):
    """name -> content of each file of the archive; compressed ones are unpacked."""
    with tarfile.open(folder / ARCHIVE) as archive:
        found = {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers() if entry.isfile()}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in found.items()}


def weights_in(files, checkpoint):
    """The tensors of a checkpoint of which a file holds the beginning."""
    found = []
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                data = bytes(tensors.get_tensor(name).reshape(-1)[:32].view(torch.uint8).tolist())
                # Norms and gates of test models are constants, as are many bytes of any file.
                if len(set(data)) > 16:
                    found += [(name, file) for file, content in files.items() if data in content]
    return found


@pytest.fixture(scope="module")
def asked(checkpoint, tmp_path_factory):
    """A run with a prompt, and one of a file of requests of which one is refused."""
    folder = tmp_path_factory.mktemp("asked")
    weights = f"weights={checkpoint('base')}"
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in REQUESTS))
    one = run(folder / "one", *PLAIN, weights, f"prompt={PROMPT}", f"system={SYSTEM}")
    many = run(folder / "many", *PLAIN, weights, f"requests={folder / 'requests.jsonl'}")
    assert one.code == many.code == 0, one.err + many.err
    return {"one": one.folder, "many": many.folder}


@pytest.mark.parametrize("name", ["one", "many"])
def test_an_archive_holds_no_prompt_no_answer_and_no_weights(asked, checkpoint, tmp_path, name):
    done = run(tmp_path / "out", "task=collect", f"task.folder={asked[name]}")
    assert done.code == 0, done.err
    files = members(tmp_path / "out")
    answers = [json.loads(line)["text"] for line in (asked[name] / "results.jsonl").read_text().splitlines()]
    for secret in [*SECRETS, *(text for text in answers if len(text) > 5)]:
        found = [file for file, data in files.items() if secret.encode() in data]
        assert not found, (secret, found)
    assert not weights_in(files, checkpoint("base"))
    # What the run left does hold them: its configuration, or its requests file.
    left = [
        path.read_text(errors="replace")
        for path in (*asked[name].rglob("*.*"), *asked[name].parent.glob("*.*"))
        if path.is_file()
    ]
    assert any(secret in text for secret in SECRETS for text in left)


def test_an_archive_holds_versions_logs_and_the_configuration(asked, tmp_path):
    done = run(tmp_path / "out", "task=collect", f"task.folder={asked['one']}")
    files = members(tmp_path / "out")
    taken = {name.removeprefix("collected/") for name in files}
    assert {"versions.json", "environment.json", "npu-smi.txt", "command.json", "run/run.log"} <= taken
    assert json.loads(files["collected/versions.json"])["packages"]["torch"]
    assert "plan: " in files["collected/run/run.log"].decode()
    result = json.loads(files["collected/run/result.json"])
    assert result["status"] == "ok" and result["config"]["prompt"] == result["text"] == LEFT_OUT
    assert f"prompt={LEFT_OUT}" in json.loads(files["collected/command.json"])
    # What was packed is printed, and is in the archive too.
    assert "run/run.log" in done.out and "run/run.log" in files["collected/contents.txt"].decode()


def test_the_newest_run_is_taken_unless_it_collected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "outputs" / "2026-01-02" / "now"
    for age, (name, word) in enumerate(
        {
            "2026-01-02/now": "task=collect",
            "2026-01-02/last": "task=collect",
            "2026-01-01/two/0": "tp=2",
            "a/b": "x=1",
        }.items()
    ):
        notes = tmp_path / "outputs" / name / ".hydra" / "overrides.yaml"
        notes.parent.mkdir(parents=True)
        notes.write_text(f"- {word}\n")
        os.utime(notes, (10**9 - age, 10**9 - age))
    assert newest(own) == Path("outputs/2026-01-01/two/0")


def test_without_an_earlier_run_the_error_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Give its folder: task.folder=FOLDER"):
        newest(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    given = f"task.folder={tmp_path / 'empty'}"
    assert "is no run's folder" in run(tmp_path / "out", "task=collect", given, cwd=tmp_path).one_line_error()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("the error: 'Where did Aunt Rosalind bury the ... end' of it", f"the error: '{LEFT_OUT} ... end' of it"),
        ("bury the seventeen silver\nteaspoons?", f"{LEFT_OUT}?"),
        ("Where did the plan go?", "Where did the plan go?"),
        ("两个图；银匙埋在花园里", f"两个图；{LEFT_OUT}里"),
        ("at once: Hello!", f"at once: {LEFT_OUT}!"),
        ("Hello", LEFT_OUT),
    ],
)
def test_quotations_are_removed_also_where_they_are_cut_or_broken(text, left):
    assert Private([PROMPT, "Hello"]).scrub(text) == left


def test_only_variables_that_concern_an_npu_are_packed():
    given = {"HCCL_CONNECT_TIMEOUT": "120", "ASCEND_HOME_PATH": "/a", "HOME": "/root", "API_TOKEN": "x"}
    assert set(environment(given)) == {"HCCL_CONNECT_TIMEOUT", "ASCEND_HOME_PATH"}
