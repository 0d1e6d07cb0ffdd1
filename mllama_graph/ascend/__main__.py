"""Run Python with a simulated NPU: `python -m mllama_graph.ascend -m pytest tests/ascend`, or with a script's path."""

import os
import sys

from mllama_graph.ascend.stubs import environment
from mllama_graph.core.paths import default_store
from mllama_graph.native import BuildError


def main() -> None:
    """Build the stubs unless they exist, then replace this process with Python, run with the given arguments."""
    try:
        variables = environment(default_store())
    except BuildError as error:
        sys.exit(str(error))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], variables)


if __name__ == "__main__":
    main()
