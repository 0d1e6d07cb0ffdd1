"""Tests in simulated/ need a Python whose loader knew the stubs when it started: `python -m mllama_graph.ascend -m pytest`.

The others start such processes themselves, from an environment without stubs.
"""

import os

import pytest

from mllama_graph.ascend import stubs

collect_ignore = [] if stubs.active() else ["simulated"]


@pytest.fixture(scope="module")
def without_stubs():
    """An environment as before `python -m mllama_graph.ascend`."""
    with pytest.MonkeyPatch.context() as patch:
        if stubs.active():
            paths = os.environ["LD_LIBRARY_PATH"].split(os.pathsep)
            paths.remove(os.environ[stubs.ACTIVE])
            patch.delenv(stubs.ACTIVE)
            patch.setenv("LD_LIBRARY_PATH", os.pathsep.join(paths)) if paths else patch.delenv("LD_LIBRARY_PATH")
        yield
