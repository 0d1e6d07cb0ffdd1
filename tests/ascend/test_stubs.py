"""The stub libraries are built once for the installed wheel, and suffice to import torch_npu and copy tensors."""

import os
import subprocess
import sys

import pytest

from mllama_graph.ascend import stubs
from mllama_graph.native import BuildError

pytestmark = pytest.mark.usefixtures("without_stubs")
needs_torch_npu = pytest.mark.skipif(not stubs.installed(), reason="torch_npu is not installed; README.md says how")


@pytest.fixture(scope="module")
def folder(shared):
    """The folder under which this session builds the stubs."""
    return shared / "stubs"


@needs_torch_npu
def test_every_library_that_the_wheel_needs_is_built(folder):
    home = stubs.build(folder)
    names = {path.name for path in home.glob("*.so")}
    assert {"libascendcl.so", "libhccl.so", "libge_runner.so", "libgraph.so"} < names
    assert not [path for path in home.glob("*.so") if not path.resolve().is_file()]
    assert not list(home.glob(".aside*"))


@needs_torch_npu
def test_a_second_build_finds_the_first(folder):
    library = stubs.build(folder) / stubs.LIBRARY
    before = library.stat().st_mtime_ns
    assert stubs.build(folder) == library.parent
    assert library.stat().st_mtime_ns == before


@needs_torch_npu
def test_the_stubs_come_first_in_the_library_path(folder, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/already/there")
    variables = stubs.environment(folder)
    assert variables["LD_LIBRARY_PATH"].split(os.pathsep) == [str(stubs.build(folder)), "/already/there"]
    assert stubs.ACTIVE in variables
    assert not stubs.active()


def test_without_torch_npu_the_error_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setattr(stubs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"torch_npu is not installed. Install it with: pip install"):
        stubs.build(folder)


@needs_torch_npu
def test_an_eager_operation_raises_and_memory_moves(folder):
    code = """
import torch, torch_npu
x = torch.arange(6.0).view(2, 3)
assert torch.equal(x.to("npu").cpu(), x) and torch.npu.device_count() == 1
try:
    (x.to("npu") + 1).cpu()
except RuntimeError as error:
    print("raised", "500001" in str(error))
"""
    variables = stubs.environment(folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.stdout.splitlines()[-1:] == ["raised True"], done.stdout + done.stderr
