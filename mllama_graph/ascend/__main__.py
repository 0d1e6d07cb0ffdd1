"""Python with a simulated NPU: `python -m mllama_graph.ascend -m pytest tests/ascend`, or the path of a script."""

import os
import sys

from mllama_graph.ascend.stubs import environment
from mllama_graph.core.paths import default_store
from mllama_graph.native import BuildError


def main() -> None:
    """Build the stubs unless they exist, and replace this process by Python with the arguments that were given."""
    try:
        variables = environment(default_store())
    except BuildError as error:
        sys.exit(str(error))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], variables)


if __name__ == "__main__":
    main()
