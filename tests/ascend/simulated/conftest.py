"""What torchair compiles in these tests is executed by the interpreter."""

from mllama_graph.ascend import interpreter

interpreter.install()
