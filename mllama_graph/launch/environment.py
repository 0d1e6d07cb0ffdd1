"""Sets up a rank's process before torch is imported: environment variables and logging."""

import faulthandler
import logging
import os
import sys
from pathlib import Path

from mllama_graph.ascend import stubs
from mllama_graph.core.errors import UserError
from mllama_graph.core.network import interface_towards
from mllama_graph.core.place import Place
from mllama_graph.graphs.store import GraphStore
from mllama_graph.native import BuildError
from mllama_graph.plan.resolve import NATIVE, ResolvedRun, ResolvedTask

LOG_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
# The variables for Ascend are those of MindIE's example; the last one is for cuBLAS.
DETERMINISTIC = {
    "LCCL_DETERMINISTIC": "1",
    "HCCL_DETERMINISTIC": "true",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def prepare_environment(run: ResolvedTask | None, place: Place) -> None:
    """Set the environment variables of a rank. `run` is None for a rank of torchrun that has not received its run."""
    model = run if isinstance(run, ResolvedRun) else None
    if model and model.threads:
        os.environ["OMP_NUM_THREADS"] = str(model.threads)
    elif place.local_world > 1 and ("OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        os.environ["OMP_NUM_THREADS"] = str(place.threads())
    if model and model.kernels == NATIVE:
        # Kernels have threads of their own. torch's would wait without sleeping for some milliseconds after each of its
        # operations, on cores that kernels need.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Otherwise torch imports torch_npu by itself, which fails without CANN. Ranks on an NPU import it explicitly.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if not place.one_host and (name := interface_towards(os.environ["MASTER_ADDR"])):
        # Otherwise gloo takes the address that the host's name resolves to, which may be 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if model:
        for name, value in model.environment:
            os.environ.setdefault(name, value)
        if model.deterministic:
            os.environ |= DETERMINISTIC


def simulate_npu(run: ResolvedRun, place: Place | None) -> None:
    """Set the environment so that child processes load stub libraries of CANN; the loader reads it as a process starts.

    Raises UserError under torchrun, whose processes have already started, or where the stubs can't be built.
    """
    if place:
        raise UserError("device=npu-sim can't run under torchrun: start it with python run.py, which starts the ranks.")
    print("no NPU here: every graph is executed on the CPU by an interpreter, slowly", file=sys.stderr)
    try:
        os.environ |= stubs.environment(GraphStore(run.store_folder).written)
    except BuildError as error:
        raise UserError(str(error)) from error


def log_to(path: Path) -> None:
    """Write log records, and tracebacks of crashes, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf8")
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    faulthandler.enable(file)
