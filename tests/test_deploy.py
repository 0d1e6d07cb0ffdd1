"""docs/deploy: keys that its files give the engine are known, its scripts parse, its probes and pins fit the code."""

import re
import subprocess
import tomllib

import pytest
import yaml
from commands import ROOT
from hydra import compose, initialize_config_dir

from mllama_graph.compose import literal, register_schemas
from mllama_graph.llm import composed
from mllama_graph.server.app import OPEN

DEPLOY = ROOT / "docs" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted([*DEPLOY.glob("**/*.sh"), *DEPLOY.glob("**/*.sbatch")])
KEY = re.compile(r"(?<![\w.\"'$-])[a-z][\w.]*=[\w./-]+")


def pod_of(path):
    """The specification of the engine's pods, and that of its only container."""
    [workload] = [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] in ("Deployment", "StatefulSet")]
    pod = workload["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_keys_of_a_manifest_compose_and_its_pods_have_the_time_to_drain(path):
    pod, container = pod_of(path)
    keys = KEY.findall(" ".join(container["args"]))
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = compose("config", [literal(key) for key in keys])
    assert run.task.name == "serve" and run.host == "0.0.0.0"
    pause = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    pauses = [int(found) for found in re.findall(r"sleep (\d+)", pause)]
    assert min(pauses) + run.task.drain_seconds < pod["terminationGracePeriodSeconds"]
    assert max(pauses) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_probes_ask_for_paths_without_a_key_and_a_port_that_has_a_name(path):
    _, container = pod_of(path)
    probes = [probe for name, probe in container.items() if name.endswith("Probe")]
    assert probes
    for probe in probes:
        if "httpGet" in probe:
            assert probe["httpGet"]["path"] in OPEN
            assert probe["httpGet"]["port"] in [port["name"] for port in container["ports"]]
        else:
            assert "/opt/mllama/check.py" in " ".join(probe["exec"]["command"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_application_of_ray_serve_gets_keys_that_the_library_knows():
    [application] = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text())["applications"]
    keys = dict(application["args"])
    run = composed(keys.pop("model"), keys, "serve")
    [deployment] = application["deployments"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == run.batch
    module, _, name = application["import_path"].partition(":")
    assert f"\ndef {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_the_container_pins_all_that_its_extra_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["serve"]
    names = {re.split(r"[=<>~\[]", line)[0].strip().lower().replace("-", "_") for line in asked}
    lines = (DEPLOY / "container" / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("-", "_") for line in lines if "==" in line}
    file = (DEPLOY / "container" / "Containerfile").read_text()
    # torch is pinned by an argument, since its index depends on the image.
    assert (
        names - pinned == {"torch"} and f"ARG TORCH={[one for one in asked if one.startswith('torch')][0][7:]}" in file
    )
    for copied in re.findall(r"^COPY (.+) \S+$", file, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split()), copied
