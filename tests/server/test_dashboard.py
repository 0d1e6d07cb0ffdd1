"""Every metric that the documentation and the dashboard name is exported, and every exported one is documented."""

import json
import re

from commands import ROOT
from prometheus_client.parser import text_string_to_metric_families

DOCS = ROOT / "docs"
NAME = re.compile(r"\b(?:mllama_graph:|process_)\w+")


def exported(server):
    """(names of families with the endings by which tables give them, names of samples)."""
    families = list(text_string_to_metric_families(server.service.metrics.text().decode()))
    names = {family.name + "_total" * (family.type == "counter") for family in families}
    return names, {sample.name for family in families for sample in family.samples}


def test_the_dashboard_asks_for_exported_metrics_only(server):
    server.post({"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 2})
    _, samples = exported(server)
    board = json.loads((DOCS / "grafana.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries = [entry["query"] for entry in board["templating"]["list"]]
    asked = {name for text in panels + queries for name in NAME.findall(text)}
    assert asked <= samples and len(asked) > 20
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_table_of_metrics_is_complete(server):
    server.post({"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 2})
    families, _ = exported(server)
    section = (DOCS / "serving.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    named = {name for line in section.splitlines() if line.startswith("|") for name in NAME.findall(line)}
    assert named <= families
    assert {name for name in families if name.startswith("mllama_graph:")} <= named
