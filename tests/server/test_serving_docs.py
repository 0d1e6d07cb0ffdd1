"""docs/serving.md and docs/clients.md: examples run, limits are the defaults, and exported metrics have their names."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from commands import ROOT
from prometheus_client.parser import text_string_to_metric_families

from mllama_graph.tasks.options import ServeOptions

DOCS = ROOT / "docs"
SERVING, CLIENTS = DOCS / "serving.md", DOCS / "clients.md"
SCENE = ROOT / "mllama_graph" / "tiny" / "scene.png"
NAME = re.compile(r"\b(?:mllama_graph:|process_)\w+")
SEEN, CAN = (
    "I see a red circle, a green triangle and a blue star.",
    "I can describe simple shapes, count them and read ",
)


@pytest.fixture(scope="module")
def served(running):
    """A server without a key, which has answered a request."""
    found = running.start(api_key=None)
    found.post({"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 2})
    yield found
    running.stop()


def section(page, title):
    return page.read_text(encoding="utf8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def example(page, language, served):
    """The first code block of a language among the clients', for the server that is running."""
    return re.search(rf"```{language}\n(.*?)```", section(page, "Clients"), re.DOTALL)[1].replace(
        "http://127.0.0.1:8000", served.url
    )


def run(served, tmp_path, *command):
    shutil.copy(SCENE, tmp_path)
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("page", [SERVING, CLIENTS], ids=lambda page: page.stem)
def test_the_example_for_python_runs(page, served, tmp_path):
    assert run(served, tmp_path, sys.executable, "-c", example(page, "python", served)) == SEEN


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_examples_for_curl_run(served, tmp_path):
    streamed, _, whole = run(served, tmp_path, "sh", "-c", example(CLIENTS, "sh", served)).partition("data: [DONE]\n")
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).startswith(CAN)
    assert json.loads(whole)["choices"][0]["message"]["content"] == SEEN


def test_the_limits_are_the_defaults():
    defaults = ServeOptions()
    found = dict(re.findall(r"^\| `task\.(\w+)` \| (\d+) \|", section(SERVING, "Limits"), re.MULTILINE))
    assert len(found) >= 6
    assert {name: float(value) for name, value in found.items()} == {name: getattr(defaults, name) for name in found}


PATHS = {"chat completions": "chat/completions", "completions": "completions", "responses": "responses"}


def test_parameters_are_refused_or_ignored_as_the_table_says_and_openais_client_has_no_others(served):
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as responses

    types = {"chat completions": chat.CompletionCreateParamsBase, "completions": completions.CompletionCreateParamsBase}
    types["responses"] = responses.ResponseCreateParamsBase
    table, endpoint = {}, ""
    for line in section(SERVING, "Parameters").splitlines():
        if cells := re.fullmatch(r"\| ([\w ]*)\| (honoured|ignored|refused) \| (.*) \|", line):
            endpoint = cells[1].strip() or endpoint
            table.setdefault(endpoint, {})[cells[2]] = re.findall(r"`(\w+)`", cells[3])
    for endpoint, path in PATHS.items():
        own = table[endpoint]
        named = [name for names in own.values() for name in names]
        # The client is that of the table, or an earlier one.
        unknown = types[endpoint].__annotations__.keys() - {*named}
        assert len(set(named)) == len(named) and (not unknown or version("openai") > "3.57"), unknown
        body = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "prompt": "Hi"}
        field = {"chat completions": "messages", "completions": "prompt", "responses": "input"}[endpoint]
        body = {field: body[field]} | {"max_output_tokens" if endpoint == "responses" else "max_tokens": 2}
        for name in own["refused"]:
            error = served.post(body | {name: "x"}, f"/v1/{path}")
            assert (error.status_code, error.json()["error"]["param"]) == (400, name)
        ignored = {name: {"x": 1} for name in own["ignored"]}
        answer = served.post(body | ignored, f"/v1/{path}")
        assert answer.status_code == 200, answer.json()


def exported(served):
    """(names of families with the endings by which tables give them, names of samples)."""
    families = list(text_string_to_metric_families(served.service.metrics.text().decode()))
    names = {family.name + "_total" * (family.type == "counter") for family in families}
    return names, {sample.name for family in families for sample in family.samples}


def test_the_dashboard_asks_for_exported_metrics_only(served):
    _, samples = exported(served)
    board = json.loads((DOCS / "grafana.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries = [entry["query"] for entry in board["templating"]["list"]]
    asked = {name for text in panels + queries for name in NAME.findall(text)}
    assert asked <= samples and len(asked) > 20
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_table_of_metrics_is_complete(served):
    families, _ = exported(served)
    named = {
        name for line in section(CLIENTS, "Metrics").splitlines() if line.startswith("|") for name in NAME.findall(line)
    }
    assert named <= families
    assert {name for name in families if name.startswith("mllama_graph:")} <= named
