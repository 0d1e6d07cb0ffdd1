"""Compilation of a step by Inductor, with less C++ for a CPU graph that consists only of our kernels.

The nodes of such a graph only call operators or view tensors. Inductor generates the calls, and `GraphOfCalls` puts
native/graph.h before them instead of torch's headers and runtime: g++ takes 1.7 s per graph, compared with 10 s for
Inductor's own source. Importing this module imports the compiler.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch._inductor.codegen.common import device_codegens, init_backend_registration, register_backend_for_device
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.exc import InductorError
from torch._inductor.virtualized import V

from mllama_graph import native

log = logging.getLogger(__name__)

HEADER = native.SOURCE / "graph.h"

# For every graph.
SETTINGS = {
    # Weights stay outside the graph, are shared by all buckets, and are never constant-folded.
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    # This pass would fold one-element weights (the gates) into the graph.
    "joint_graph_constant_folding": False,
}
# For CPU graphs. vec_isa_ok skips Inductor's test of whether g++ supports the machine's vectors (3 s). Precompiled
# headers take 12 s and 280 MB, which is more than they save in a run of three graphs.
CPU_SETTINGS = {"cpp.vec_isa_ok": True, "aot_inductor.precompile_headers": False}
# For a graph of calls, which has nothing to fuse. Without O1, a decode step of the tiny model takes 6 % longer, and g++
# 0.5 s less.
CALLS_SETTINGS = {
    "pattern_matcher": False,
    "use_pre_grad_passes": False,
    "use_joint_graph_passes": False,
    "size_asserts": False,
    "aot_inductor.compile_wrapper_opt_level": "O1",
    "aot_inductor.enable_line_tables": False,
}


class GraphOfCalls(CppWrapperCpu):
    """Generates a graph's C++ code on top of native/graph.h."""

    def __init__(self) -> None:
        super().__init__()
        self.aoti_model_class_name = "Graph"

    @staticmethod
    def create(*given: Any) -> "GraphOfCalls":
        return GraphOfCalls()

    def write_header(self) -> None:
        self.header.splice(HEADER.read_text())

    def _write_aoti_entry_point_signature(self) -> None:
        self.prefix.splice_aot("""
            void Graph::run_impl(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles,
                                 AOTIProxyExecutorHandle proxy_executor) {
            """)

    def _write_entry_point_postamble(self) -> None:
        """Inductor would declare its generated kernels here; a graph of calls has none."""

    def _codegen_aoti_model_class(self) -> None:
        graph = V.graph
        originals = graph.allocated_constant_name | graph.dynamo_flat_name_to_original_fqn
        constants = ", ".join(f'{{"{name}", "{originals[name]}"}}' for name in graph.constants)
        self.prefix.splice(f"""
            namespace torch::aot_inductor {{
            const size_t Graph::outputs = {len(graph.graph_outputs)};
            const std::vector<Constant> Graph::constants{{{constants}}};
            }}
            """)


@contextlib.contextmanager
def _written_by(wrapper: type[CppWrapperCpu]) -> Iterator[None]:
    """Have Inductor generate CPU code with `wrapper` instead of its own class."""
    init_backend_registration()
    before = device_codegens["cpu"]
    register_backend_for_device("cpu", before.scheduling, before.wrapper_codegen, wrapper)
    try:
        yield
    finally:
        device_codegens["cpu"] = before


def build_package(
    program: torch.export.ExportedProgram, path: Path, settings: dict[str, Any], cpu: bool, calls: bool
) -> None:
    """Compile a traced step into a package at `path`. `calls`: all nodes call our operators or view tensors."""
    settings = SETTINGS | (CPU_SETTINGS if cpu else {}) | settings
    with warnings.catch_warnings():
        # torch's own deprecations inside export, which a user can't act on.
        warnings.simplefilter("ignore", FutureWarning)
        if calls:
            try:
                with _written_by(GraphOfCalls):
                    return _package(program, path, CALLS_SETTINGS | settings)
            except (InductorError, AttributeError) as error:
                # Another torch version may generate different code from 2.13.
                log.warning("a graph needs more than native/graph.h has; compiling it with torch's headers: %s", error)
        _package(program, path, settings)


def _package(program: torch.export.ExportedProgram, path: Path, settings: dict[str, Any]) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
