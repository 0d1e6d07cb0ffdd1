"""In these tests the interpreter executes what torchair compiles."""

from mllama_graph.ascend import simulation

simulation.install()
