"""Checks a lowered graph against all rules. A finding names the rule, the operation and the line of the model."""

import re
from dataclasses import dataclass

from mllama_graph.ascend.capture import Capture
from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.rules import RULES


@dataclass(frozen=True)
class Finding:
    """A rule that a graph breaks: its name in RULES, and a message with the operation and the line of the model."""

    rule: str
    message: str


def lint(captured: Capture, context: Context) -> list[Finding]:
    """All findings of a graph. Faults from one line of the model that differ only in numbers are reported once."""
    graph = LoweredGraph(captured)
    findings = []
    for name, rule in RULES.items():
        alike: dict[tuple[str, str], list[str]] = {}
        for op, text in rule(graph, context):
            key = re.sub(r"_?\d+", "", text), captured.line(op.name)
            alike.setdefault(key, []).append(f"{op.type} {op.name}: {text}")
        for (_, line), messages in alike.items():
            more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
            findings.append(Finding(name, f"{messages[0]}{more}, at {line}"))
    return findings
