"""The package installed from a wheel, outside of the checkout: command, library and dependencies."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import ROOT, kept

import mllama_graph

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ANSWER = "I see a red circle, a green triangle and a blue star."
# Modules that an extra or another environment provides, and the files that may import them.
OPTIONAL = {
    "torch_npu": (
        "ascend/",
        "graphs/torchair.py",
        "graphs/key.py",
        "ops/npu",
        "engine/device.py",
        "engine/npu_profile.py",
    ),
    "torchair": ("ascend/", "graphs/torchair.py", "ops/npu", "engine/device.py"),
    "google": ("ascend/", "graphs/torchair.py"),
    "triton": ("ops/cuda_triton.py",),
    "matplotlib": ("measure/plots.py",),
    "starlette": ("server/", "scale/ray_serve.py"),
    "uvicorn": ("server/",),
    "prometheus_client": ("server/",),
    "llguidance": ("inputs/structured.py",),
    "ray": ("scale/",),
    "pyarrow": ("scale/",),
    "transformers": ("measure/peers/transformers.py",),
    "mistralrs": ("measure/peers/mistralrs.py",),
    "gguf": ("measure/peers/llamacpp.py",),
    "llama_cpp": ("measure/peers/llamacpp.py",),
    "nncf": ("measure/peers/openvino.py",),
    "openvino": ("measure/peers/openvino.py",),
}


@pytest.fixture(scope="session")
def site(shared):
    """A folder with the installed package, as in site-packages, inside another project's repository."""
    folder = shared / "installed"

    def make():
        source, site = folder / "source", folder / "repository" / "site"
        source.mkdir(parents=True)
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-cf", folder / "source.tar", "--null", "-T", "-"], cwd=ROOT, input=files, check=True)
        subprocess.run(["tar", "-xf", folder / "source.tar", "-C", source], check=True)
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], check=True)
        [wheel] = folder.glob("*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
        git = ["git", "-C", str(site.parent), "-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "Another project"], check=True)
        return str(site)

    return Path(kept(folder / "made", make))


def installed(site: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a program that finds the installed package, started outside of the checkout."""
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, env=os.environ | {"PYTHONPATH": str(site)}
    )


@pytest.mark.parametrize("start", ["command", "module"])
def test_the_installed_command_answers_as_run_py_does(start, site, tmp_path):
    program = [str(site / "bin" / "mllama-graph")] if start == "command" else [sys.executable, "-m", "mllama_graph"]
    done = installed(site, *program, "backend=eager", f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == ANSWER
    config = json.loads((tmp_path / "out" / "result.json").read_text())["config"]
    assert config["backend"]["name"] == "eager" and config["task"] == {"name": "generate"}


def test_an_installed_package_knows_no_commit(site, tmp_path):
    code = "from mllama_graph.measure.session import commit; print(commit())"
    assert installed(site, sys.executable, "-c", code, cwd=tmp_path).stdout == "\n"
    enclosing = subprocess.run(["git", "-C", str(site), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert re.fullmatch(r"[0-9a-f]{40}\n", enclosing), "the test needs a repository around the package"


SCRIPT = """
import io, json, os, sys
from pathlib import Path
from PIL import Image
import mllama_graph

assert mllama_graph.__file__.startswith(os.environ["PYTHONPATH"]), "this is not the installed package"
assert "torch" not in sys.modules, "importing the package imports torch"
from mllama_graph import LLM, Sampling, UserError

scene = Path(mllama_graph.__file__).parent / "tiny" / "scene.png"
picture = Image.open(scene)
asked = {"prompt": "What do you see?", "max_new_tokens": 20}
parts = [{"type": "image_url", "image_url": {"url": str(scene)}}, {"type": "text", "text": "What do you see?"}]
told = {}
with LLM("tiny", batch=4, tp=int(sys.argv[1]), backend="eager", quiet=True) as llm:
    results = llm.generate([
        "What can you do?", asked | {"images": [str(scene)]}, asked | {"images": [scene]},
        asked | {"images": [picture]}, asked | {"images": [scene.read_bytes()]}, [{"role": "user", "content": parts}],
        {"prompt": ""}, 5], max_new_tokens=30)
    told["texts"] = [result.text for result in results]
    told["errors"] = [result.error for result in results]
    told["ids"] = [result.id for result in results]
    told["stream"] = [delta.text for delta in llm.stream(asked | {"images": [picture]})]
    # Two streams share the batch; one is left early.
    one, other = llm.stream(asked | {"images": [picture]}), llm.stream([asked, asked | {"images": [picture]}])
    told["first"] = [next(one).text, next(one).text]
    told["other"] = {}
    for delta in other:
        told["other"][delta.id] = told["other"].get(delta.id, "") + delta.text
    one.close()
    told["idle"] = llm._engine.idle
    told["sampled"] = [
        llm.generate("What can you do?", Sampling(temperature=5.0, seed=seed))[0].text for seed in (1, 1, 2)]
    try:
        llm.generate("x", temperature=-1)
    except UserError as error:
        told["refused"] = str(error)
try:
    llm.generate("x")
except UserError as error:
    told["closed"] = str(error)
told["children"] = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
print(json.dumps(told))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_library_answers_streams_and_leaves_no_process(ranks, site, tmp_path):
    # The script has no `if __name__ == "__main__"`: starting ranks must not depend on it.
    (tmp_path / "script.py").write_text(SCRIPT)
    done = installed(site, sys.executable, "script.py", str(ranks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["texts"][0].startswith("I can describe") and told["texts"][1:6] == [ANSWER] * 5
    assert told["errors"][:6] == [None] * 6 and told["ids"] == list(range(8))
    assert "prompt has no text" in told["errors"][6] and "of type int" in told["errors"][7]
    assert "".join(told["stream"]) == ANSWER and len(told["stream"]) > 5
    assert "".join(told["first"]) == ANSWER[: len("".join(told["first"]))] != ANSWER
    assert told["other"]["1"] == ANSWER and told["other"]["0"] != ANSWER and told["idle"]
    assert told["sampled"][0] == told["sampled"][1] != told["sampled"][2]
    assert "temperature=-1" in told["refused"] and "closed" in told["closed"]
    assert not told["children"].split()
    assert not list(Path("/dev/shm").glob("mllama_graph-*")) and done.stderr == ""


# ---- dependencies


def test_the_wheel_holds_every_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "mllama_graph").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"mllama_graph.conf"}


def imports() -> dict[str, set[str]]:
    """Third-party module -> the files of the package that import it."""
    found: dict[str, set[str]] = {}
    package = Path(mllama_graph.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else ([node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
            )
            for name in names:
                if (top := name.partition(".")[0]) not in sys.stdlib_module_names and top != "mllama_graph":
                    found.setdefault(top, set()).add(path.relative_to(package).as_posix())
    return found


def test_every_package_that_is_imported_is_declared_and_every_declared_one_is_imported():
    declared = {re.split(r"[=<>\[]", line)[0].lower() for line in PROJECT["dependencies"]}
    provides = importlib.metadata.packages_distributions()
    needed = set()
    for module, files in imports().items():
        if module in OPTIONAL:
            assert all(file.startswith(OPTIONAL[module]) for file in files), (module, files)
        else:
            needed |= {name.lower() for name in provides[module]} & (declared | {provides[module][0].lower()})
    # omegaconf comes with hydra-core, whose configurations are its objects.
    assert needed - {"omegaconf"} == declared


def test_the_version_is_that_of_the_project():
    assert mllama_graph.__version__ == PROJECT["version"] == "0.2.0"
    assert {"npu", "plots", "sweeps", "test", "dev"} <= set(PROJECT["optional-dependencies"])
