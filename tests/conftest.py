"""Fixtures: the small checkpoints of checkpoints.py, written once per session, and the models loaded from them."""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

# torch would load an installed torch_npu by itself, which fails without CANN; tests/ascend imports it explicitly.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# Tests run in parallel: with more threads than cores, the processes that they start would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Probing for AVX and optimising the wrapper code take a third of the compile time of a small graph.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import pytest
import torch
from checkpoints import SPECS, write_checkpoint
from commands import kept
from engines import GRAPH_PLAN, GRAPH_SPEC, Model, arguments, load_model
from hypothesis import HealthCheck, settings

from mllama_graph.core.paths import default_store

# Shared machines are slow at times, so there is no deadline; derandomize makes runs reproducible.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")
# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread has one order of summation, so that a tolerance means the same on every machine.
torch.set_num_threads(1)


SHARED = "MLLAMA_GRAPH_TESTS_SHARE"


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all processes of a test session share, including sessions that a test starts."""
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache_home(shared):
    """Replaces the user's own graph store, which no test may read or write, by the session's; yields its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        patch.setenv(SHARED, str(shared))
        yield default_store()


@pytest.fixture
def empty_store(cache_home, tmp_path):
    """A graph store without graphs. It shares the session's native libraries, which take a minute to compile."""
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
    """requests(spec name) -> the lines of a requests file; their images are in a temporary folder."""
    from request_cases import cases

    @cache
    def write(name: str) -> str:
        return json.dumps(cases(tmp_path_factory.mktemp(name) / "images", SPECS[name], SPECS[name].seed))

    return lambda name: json.loads(write(name))


@pytest.fixture(scope="session")
def warm(shared):
    """(graph store, result.json, stderr) of task=warmup for GRAPH_SPEC and GRAPH_PLAN, run once per session."""
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
