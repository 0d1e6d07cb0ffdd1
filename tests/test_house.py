"""Rules of this project that no linter checks: where device names are compared, and lengths of files and lines."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mllama_graph"
NAMES = {
    "cpu",
    "cuda",
    "npu",
    "npu-sim",
    "inductor",
    "torchair",
    "eager",
    "native",
    "plain",
    "shared_memory",
    "distributed",
}
# All other code uses the device's traits (core/devices.py) or its Backend (engine/device.py).
DECIDE = ("ops/", "graphs/", "ascend/", "native/", "engine/device.py", "core/devices.py", "plan/resolve.py")
LINES, COLUMNS = 350, 120


def tracked(*endings: str) -> list[Path]:
    """The project's files with the given endings."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    names = [name for name in listed.stdout.decode().split("\0") if name.endswith(endings)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def comparisons(tree: ast.AST) -> Iterator[tuple[int, set[str]]]:
    """(line, strings) of each comparison with constant strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield (
                node.lineno,
                {
                    part.value
                    for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                },
            )


def test_device_names_are_compared_only_in_device_specific_files():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {sorted(strings & NAMES)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.relative_to(PACKAGE).as_posix().startswith(DECIDE)
        for line, strings in comparisons(ast.parse(path.read_text()))
        if strings & NAMES
    ]
    assert not found


@pytest.mark.parametrize("path", tracked(".py"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_lines_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > COLUMNS]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readmes_have_at_most_150_lines(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= 150
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > COLUMNS]
