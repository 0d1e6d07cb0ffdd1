"""The stub libraries: built from the installed wheel, once, and enough to import torch_npu and move memory."""

import os
import subprocess
import sys

import pytest

from mllama_graph.ascend import stubs
from mllama_graph.native import BuildError

pytestmark = pytest.mark.usefixtures("without_stubs")
needs_torch_npu = pytest.mark.skipif(not stubs.installed(), reason="torch_npu is not installed: README.md, Test, says how")


@pytest.fixture(scope="module")
def folder(shared):
    """Where the stubs of this session are built."""
    return shared / "stubs"


@needs_torch_npu
def test_every_library_that_the_wheel_asks_for_is_there(folder):
    home = stubs.build(folder)
    names = {path.name for path in home.glob("*.so")}
    assert {"libascendcl.so", "libhccl.so", "libge_runner.so", "libgraph.so"} < names
    assert not [path for path in home.glob("*.so") if not path.resolve().is_file()]
    assert not list(home.glob(".aside*"))


@needs_torch_npu
def test_a_second_build_is_the_first(folder):
    library = stubs.build(folder) / stubs.LIBRARY
    before = library.stat().st_mtime_ns
    assert stubs.build(folder) == library.parent and library.stat().st_mtime_ns == before


@needs_torch_npu
def test_the_environment_puts_the_stubs_before_what_is_there(folder, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/already/there")
    there = stubs.environment(folder)
    assert there["LD_LIBRARY_PATH"].split(os.pathsep) == [str(stubs.build(folder)), "/already/there"]
    assert stubs.ACTIVE in there and not stubs.active()


def test_without_torch_npu_the_remedy_is_said(folder, monkeypatch):
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=stubs.environment(folder))
    assert done.stdout.splitlines()[-1:] == ["raised True"], done.stdout + done.stderr
