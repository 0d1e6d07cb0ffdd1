"""The findings of one rule about a graph, and which rules tests have asked for."""

from dataclasses import replace

from graphs import DECODE, broken, spec_of

from mllama_graph.ascend.capture import capture, shortened
from mllama_graph.ascend.graph import Context
from mllama_graph.ascend.lint import lint
from mllama_graph.ops.npu import npu_ops

# Three layers, of which the second attends to images.
BASE = replace(spec_of("base"), shape=shortened(spec_of("base").shape, self_layers=2))
FAILED: set[str] = set()
# The rules of device_rules.py, which test_device_rules.py breaks.
DEVICE = {"kernels", "straight", "masks", "paged", "candidates"}


def found(name, captured, bucket, spec=BASE):
    """The messages of one rule about a graph."""
    FAILED.add(name)
    return [finding.message for finding in lint(captured, Context(spec, bucket)) if finding.rule == name]


def found_with(name, bucket, spec=BASE, **ops):
    """The messages of one rule about a step whose operations `ops` are replaced."""
    own = replace(npu_ops(spec.world_size), **ops) if ops else None
    return found(name, capture(spec, bucket, own), bucket, spec)


def found_after(name, captured, change):
    """The messages of one rule about the decode graph after `change`."""
    return found(name, broken(captured, change), DECODE)
