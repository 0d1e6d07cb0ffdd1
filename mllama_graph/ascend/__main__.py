"""Runs Python with an NPU simulated: `python -m mllama_graph.ascend -m pytest tests/ascend`, or a script's name."""

import os
import sys

from mllama_graph.ascend.stubs import environment
from mllama_graph.native import BuildError
from mllama_graph.graphs.store import default_store


def main() -> None:
    """Build the stubs if they are not there, and become the Python process that was asked for."""
    try:
        there = environment(default_store())
    except BuildError as error:
        sys.exit(str(error))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], there)


main()

