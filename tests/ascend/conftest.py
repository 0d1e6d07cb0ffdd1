"""Tests of an NPU that is not there run in processes of their own: the loader must know the stubs when they start."""

from mllama_graph.ascend import stubs

collect_ignore = [] if stubs.active() else ["simulated"]
