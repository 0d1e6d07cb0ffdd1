"""python run.py key=value ...: the command line of mllama_graph from a checkout."""

import sys

from mllama_graph.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
