"""Tests in simulated/ need a process that was started with the stubs: `python -m mllama_graph.ascend -m pytest`.

The other tests start such processes themselves, from an environment without stubs.
"""

import os

import pytest

from mllama_graph.ascend import stubs

collect_ignore = [] if stubs.active() else ["simulated"]


@pytest.fixture(scope="module")
def without_stubs():
    """Removes the variables that `python -m mllama_graph.ascend` sets from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        if stubs.active():
            paths = os.environ["LD_LIBRARY_PATH"].split(os.pathsep)
            paths.remove(os.environ[stubs.ACTIVE])
            patch.delenv(stubs.ACTIVE)
            if paths:
                patch.setenv("LD_LIBRARY_PATH", os.pathsep.join(paths))
            else:
                patch.delenv("LD_LIBRARY_PATH")
        yield
