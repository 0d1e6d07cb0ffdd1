"""The documentation: translations match, commands compose, examples run, figures equal those of the sessions."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from commands import ROOT, run
from hydra import compose, initialize_config_dir

from mllama_graph.compose import literal, register_schemas

ENGLISH = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = {
    ROOT / "README.md": ROOT / "README.zh-CN.md",
    **{path: path.parent / "zh" / path.name for path in ENGLISH if (path.parent / "zh" / path.name).exists()},
}
DOCUMENTS = [*ENGLISH, *TRANSLATED.values()]
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Placeholders that a reader replaces.
PLACEHOLDER = re.compile(r"/path/to|\.\.\.|WEIGHTS|IMAGE|BATCH|FILE|FOLDER|DATE|requests\.jsonl")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sections(text: str) -> list[str]:
    """The text between second-level headings."""
    return re.split(r"^## .*$", text, flags=re.MULTILINE)


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(text: str) -> list[str]:
    """The lines of the shell code blocks, without trailing comments."""
    return [re.sub(r"\s+#.*", "", line) for block in blocks(text) for line in block.splitlines()]


def test_the_pages_that_ascend_users_need_are_translated():
    needed = {"getting-started.md", "tensor-parallelism.md", "ascend.md", "coming-from-mindie.md"}
    assert needed <= {path.name for path in TRANSLATED}


@pytest.mark.parametrize("english", TRANSLATED, ids=name_of)
def test_a_translation_has_the_same_sections_commands_code_figures_and_rows(english):
    ours, theirs = sections(text_of(english)), sections(text_of(TRANSLATED[english]))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert commands(one) == commands(other) and blocks(one, "python") == blocks(other, "python")
        for found in (code, figures, rows):
            assert found(one) == found(other)
        assert len(re.findall(r"[\u4e00-\u9fff]", other)) > len(one) / 20, "not in Chinese"


def code(text: str) -> Counter[str]:
    return Counter(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def figures(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


def rows(text: str) -> int:
    return sum(line.startswith("|") for line in text.splitlines())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_have_targets(path):
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        # GitHub's anchors: lower case, spaces to hyphens, other punctuation gone.
        headings = re.findall(r"^#+ (.*)$", text_of(found), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_page_is_reached_from_the_readme():
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{path.name}" in text_of(ROOT / "README.md"), path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_documented_command_composes(path):
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for line in commands(text_of(path)):
            words = shlex.split(line)
            if "run.py" in words:
                given = [word for word in words[words.index("run.py") + 1 :] if word not in ("-m", "key=value", "...")]
                overrides = [
                    literal(word) for word in given if not word.startswith(("hydra/launcher", "hydra.run.dir"))
                ]
                # A job of a sweep gets one of the values.
                plain = [re.sub(r"=([^\[,\"]+),.*", r"=\1", word) if "-m" in words else word for word in overrides]
                compose("config", plain)


# Documented commands without placeholders. Those with a part in SLOW take too long to run.
SHOWN = [
    line
    for path in (
        ROOT / "README.md",
        ROOT / "docs" / "getting-started.md",
        ROOT / "docs" / "command-line.md",
        ROOT / "docs" / "graph-store.md",
        ROOT / "docs" / "tiny-model.md",
    )
    for line in commands(text_of(path))
    if line.startswith("python run.py") and not PLACEHOLDER.search(line)
]
SLOW = (
    "11b",
    "90b",
    "task=train_tiny",
    "task=evaluate",
    "-m ",
    "torchair",
    "plan.compile=wait",
    "task=bench",
    "task=cache",
)


@pytest.mark.parametrize("line", dict.fromkeys(line for line in SHOWN if not any(slow in line for slow in SLOW)))
def test_a_documented_command_runs(line, tmp_path):
    shutil.copy(ROOT / "mllama_graph" / "tiny" / "scene.png", tmp_path / "scene.png")
    shutil.copy(tmp_path / "scene.png", tmp_path / "mine.png")
    # Eager, since compiled graphs are tested elsewhere.
    done = run(
        tmp_path / "out", *shlex.split(line)[2:], *([] if "backend=" in line else ["backend=eager"]), cwd=tmp_path
    )
    assert done.code == 0 and done.out.strip(), done.err


def test_the_readmes_first_run_prints_what_the_readme_shows(tmp_path):
    shown = next(block for block in blocks(text_of(ROOT / "README.md")) if "What do you see?" in block).splitlines()
    done = run(tmp_path / "out", "backend=eager")
    assert shown[0] in done.err.replace(f"{ROOT}/", "") and done.out.splitlines()[0] == shown[1]


def test_the_library_examples_run(tmp_path):
    # The page's examples in order, with the tiny model instead of a checkpoint and without compilation.
    examples = [block for block in blocks(text_of(ROOT / "docs" / "library.md"), "python") if "..." not in block]
    given = text_of(ROOT / "README.md")
    assert examples[0] in blocks(given, "python"), "README and docs/library.md show different first examples"
    source = "\n".join(examples).replace('LLM("11b", weights="random", dtype="bf16", ', 'LLM("tiny", ')
    source = re.sub(r'LLM\("tiny", ', 'LLM("tiny", backend="eager", ', source) + "\nllm.close()\n"
    shutil.copy(ROOT / "mllama_graph" / "tiny" / "scene.png", tmp_path / "scene.png")
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    # The first example and the one of messages show the picture; the first and the streamed one ask what can be done.
    assert done.stdout.count("I see a red circle, a green triangle and a blue star.") == 2
    assert done.stdout.count("I can describe simple shapes, count them and read numbers.") == 2


def test_torch_npu_is_installed_as_the_package_asks_for_it():
    asked = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]["npu"]
    [line] = [line for line in commands(text_of(ROOT / "README.md")) if "--target" in line]
    assert [part for part in shlex.split(line) if re.match("torch_npu|protobuf", part)] == asked


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "performance.md"], ids=name_of)
def test_figures_of_speed_are_those_of_the_committed_sessions(path):
    lines = [line for line in text_of(path).splitlines() if re.match(r"\| \[.*profiles/", line)]
    assert lines
    for line in lines:
        folder = path.parent / re.search(r"\]\(([^)]*profiles/[^)]+)\)", line)[1]
        with (folder / "bench.csv").open(encoding="utf8") as file:
            measured = [
                float(value) for row in csv.DictReader(file) for value in row.values() if NUMBER.fullmatch(value)
            ]
        for figure, unit in re.findall(r"(\d+(?:\.\d+)?) (ms|s|%)(?= |$)", line.partition("](")[2]):
            scale, digits = {"ms": 1, "s": 1e3, "%": 0.01}[unit], len(figure.partition(".")[2])
            assert any(round(value / scale, digits) == float(figure) for value in measured), (
                f"{figure} {unit} is not in {folder.name}"
            )
