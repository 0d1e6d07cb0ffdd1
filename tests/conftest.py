"""Fixtures: the small checkpoints of checkpoints.py, written once a session, and what is loaded from them."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

# Where torch_npu is installed, torch would load it, which fails without CANN; tests/ascend loads it itself.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# Tests share the cores with each other; their runs of run.py would wait for threads that have none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A third of the seconds of a small graph: probing AVX, and optimising the code that calls its kernels.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import pytest
import torch
from checkpoints import SPECS, write_checkpoint
from commands import kept
from engines import GRAPH_PLAN, GRAPH_SPEC, Model, arguments, load_model
from hypothesis import HealthCheck, settings

from mllama_graph.core.paths import default_store

# Shared machines have slow seconds: a slow example is no failure, and runs repeat exactly.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")
# One thread adds in one order, so that a tolerance means the same on every machine.
torch.set_num_threads(1)


SHARED = "MLLAMA_GRAPH_TESTS_SHARE"


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder that all processes of a session share, sessions that a test starts among them."""
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache_home(shared):
    """No test reads or fills the user's own store of graphs. Yields the session's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        patch.setenv(SHARED, str(shared))
        yield default_store()


@pytest.fixture
def empty_store(cache_home, tmp_path):
    """A graph store without graphs; the libraries, which cost a minute of compiling, are the session's."""
    (cache_home / "native").mkdir(parents=True, exist_ok=True)
    folder = tmp_path / "graphs"
    folder.mkdir()
    (folder / "native").symlink_to(cache_home / "native")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(spec name) -> folder."""

    @cache
    def write(name: str):
        folder = tmp_path_factory.mktemp(name) / "checkpoint"
        write_checkpoint(folder, SPECS[name])
        return folder

    return write


@pytest.fixture(scope="session")
def model(checkpoint):
    """model(spec name) -> weight tree in fp32, and the shape."""

    @cache
    def load(name: str) -> Model:
        return load_model(checkpoint(name))

    return load


@pytest.fixture(scope="session")
def oracle(checkpoint):
    """oracle(spec name) -> Hugging Face's model, corrected to Meta's semantics."""
    from oracle import Oracle

    return cache(lambda name: Oracle(checkpoint(name)))


@pytest.fixture(scope="session")
def requests(tmp_path_factory):
    """requests(spec name) -> the lines of a requests file; their images lie in a folder of the session."""
    from request_cases import cases

    @cache
    def write(name: str) -> str:
        return json.dumps(cases(tmp_path_factory.mktemp(name) / "images", SPECS[name], SPECS[name].seed))

    return lambda name: json.loads(write(name))


@pytest.fixture(scope="session")
def warm(shared):
    """(graph store, run.py's result.json, what it printed): task=warmup for GRAPH_SPEC and GRAPH_PLAN, once a session."""
    folder = shared / "warm"

    def make():
        write_checkpoint(folder / "checkpoint", SPECS[GRAPH_SPEC])
        done = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).parents[1] / "run.py"),
                "task=warmup",
                f"weights={folder / 'checkpoint'}",
                f"graph_cache={folder / 'graphs'}",
                f"hydra.run.dir={folder / 'out'}",
                *arguments(GRAPH_PLAN),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return folder / "graphs", json.loads((folder / "out" / "result.json").read_text()), done.stderr

    return kept(folder / "made", make)
