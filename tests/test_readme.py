"""README.zh-CN.md says the same as README.md: the commands, the figures, the tables."""

import csv
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def sections(name: str) -> list[str]:
    """The text from each heading of the second level to the next."""
    return re.split(r"^## .*$", (ROOT / name).read_text(encoding="utf8"), flags=re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of all code blocks, without what is said of them after #."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]


ENGLISH, CHINESE = sections("README.md"), sections("README.zh-CN.md")


def test_both_have_the_same_sections():
    assert len(ENGLISH) == len(CHINESE) > 5


@pytest.mark.parametrize("section", range(len(ENGLISH)))
def test_commands_code_figures_and_rows_are_the_same(section):
    one, other = ENGLISH[section], CHINESE[section]
    assert commands(one) == commands(other)
    code = lambda text: Counter(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))  # noqa: E731
    assert code(one) == code(other)
    assert Counter(NUMBER.findall(one)) == Counter(NUMBER.findall(other))
    rows = lambda text: sum(line.startswith("|") for line in text.splitlines())  # noqa: E731
    assert rows(one) == rows(other)


def test_the_chinese_one_is_in_chinese():
    for one, other in zip(ENGLISH, CHINESE, strict=True):
        assert len(re.findall(r"[\u4e00-\u9fff]", other)) > len(one) / 20


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf8")
    # GitHub's anchors: lower case, spaces to hyphens, other punctuation gone.
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (ROOT / target).exists(), target


def test_torch_npu_is_installed_as_the_package_asks_for_it():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["npu"]
    [line] = [line for line in commands("".join(ENGLISH)) if "--target" in line]
    assert [part for part in shlex.split(line) if re.match("torch_npu|protobuf", part)] == asked


def test_figures_of_speed_are_those_of_the_committed_sessions():
    rows = [line for line in ENGLISH[0].splitlines() + "\n".join(ENGLISH).splitlines() if line.startswith("| [")]
    assert rows
    for row in rows:
        folder = re.search(r"\]\((profiles/[^)]+)\)", row)[1]
        with (ROOT / folder / "bench.csv").open(encoding="utf8") as file:
            measured = [
                float(value) for line in csv.DictReader(file) for value in line.values() if NUMBER.fullmatch(value)
            ]
        for figure, unit in re.findall(r"(\d+(?:\.\d+)?) (ms|s|%)(?= |$)", row.partition("](")[2]):
            scale, digits = {"ms": 1, "s": 1e3, "%": 0.01}[unit], len(figure.partition(".")[2])
            assert any(round(value / scale, digits) == float(figure) for value in measured), (
                f"{figure} {unit} is not in {folder}"
            )
