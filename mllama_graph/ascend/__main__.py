"""Runs Python with an NPU simulated: `python -m mllama_graph.ascend -m pytest tests/ascend`, or a script's name."""

import os
import sys

from mllama_graph.ascend.stubs import environment
from mllama_graph.native import BuildError
from mllama_graph.store import default_store


def main() -> None:
    try:
        there = environment(default_store())
    except BuildError as error:
        sys.exit(str(error))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], there)


main()

