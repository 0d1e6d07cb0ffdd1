"""The documented table of the lint's rules is that of the code."""

from pathlib import Path

import pytest

from mllama_graph.ascend import sources
from mllama_graph.ascend.rules import RULES

DOCS = Path(__file__).parents[3] / "docs"


def test_every_rule_names_its_source():
    assert list(sources.SOURCES) == list(RULES)
    assert all(sources.claim(rule) for rule in RULES)


@pytest.mark.parametrize("page", ["ascend.md", "zh/ascend.md"])
def test_the_documented_rules_are_those_of_the_lint(page):
    found = [tuple(line.strip("| ").split(" | ")) for line in (DOCS / page).read_text().splitlines()]
    found = [row for row in found if row[0].startswith(tuple(f"`{rule}`" for rule in RULES)) and len(row) == 3]
    expected = sources.rows()
    if page.startswith("zh"):
        # Names and sources; what a rule demands is translated.
        found, expected = ([(name, source) for name, _, source in rows] for rows in (found, expected))
    assert found == expected
