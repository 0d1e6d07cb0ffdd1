"""Backends: all that a rank does differently on each kind of device.

A Backend provides a rank's operations, loads or compiles its graphs, allocates memory, joins the process group, and
reports free memory and the device's name. To add a kind of device, add a Backend here and an entry in core/devices.py.
"""

import contextlib
import io
import logging
import os
import resource
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity

from mllama_graph.core import cann
from mllama_graph.core.devices import CPU, CUDA, NPU, NPU_SIM
from mllama_graph.core.dtypes import PAGE_BYTES
from mllama_graph.core.errors import UserError
from mllama_graph.core.place import Place
from mllama_graph.engine.collectives import Alone, Collectives, Distributed, SharedMemory, load_native
from mllama_graph.graphs.aot import ops_of
from mllama_graph.graphs.loaded import LoadedGraphs, LoadedNpuGraphs, LoadedPackages
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.model.codes import Codes, quantise
from mllama_graph.model.formats import FLOAT, Format
from mllama_graph.model.inputs import Pages
from mllama_graph.model.layout import Layout
from mllama_graph.model.ops import Ops
from mllama_graph.model.placement import Placement
from mllama_graph.model.sample import Gather
from mllama_graph.model.tree import Weights
from mllama_graph.ops import cpu
from mllama_graph.ops.ranks import HOST_GROUP, gather_in
from mllama_graph.plan.resolve import NATIVE, ResolvedRun

log = logging.getLogger(__name__)

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
assert TORCH_DTYPES.keys() == PAGE_BYTES.keys()


class Backend(ABC):
    """A rank's device. Call `start` before anything else touches the device."""

    # torch.distributed's backend for the device's tensors, and whether sampling needs a second group on the host.
    group = "gloo"
    samples_on_host = False
    loaded: type[LoadedGraphs] = LoadedPackages

    def __init__(self, run: ResolvedRun, place: Place):
        self.run, self.place = run, place

    @abstractmethod
    def start(self) -> None:
        """Make the device known to torch and select this rank's device. Raises UserError where there is none."""

    @abstractmethod
    def free_memory(self) -> tuple[int, str] | None:
        """Free bytes of the device, and the source of the figure; None for ranks that share the host's memory."""

    def spec(self) -> GraphSpec:
        """The specification that this rank's graphs are compiled for."""
        run = self.run
        threads = run.threads or min(torch.get_num_threads(), self.place.threads())
        return GraphSpec(
            run.shape,
            run.plan.page_size,
            run.plan.num_pages,
            run.plan.num_image_pages,
            TORCH_DTYPES[run.precision.store],
            TORCH_DTYPES[run.precision.compute],
            TORCH_DTYPES[run.precision.kv],
            run.backend,
            run.device.name,
            threads,
            run.tp,
            run.collectives,
            run.kernels,
            run.deterministic,
            run.compiler_options,
            self.place.rank,
            run.storage.formats,
            run.candidates,
            run.forms,
        )

    def prepare(self, spec: GraphSpec, libraries: Path, say: Callable[[str], None]) -> None:
        """Bind the process to its cores and threads, and load native operations from the folder `libraries`."""
        torch.set_num_threads(spec.threads)

    def ops(self, spec: GraphSpec) -> Ops:
        """The operations that the rank runs uncompiled and that its graphs are traced with."""
        return ops_of(spec)

    def placement(self, spec: GraphSpec) -> Placement:
        """Where weights and pages are allocated."""
        return spec.placement

    def lay_out(self, weights: Weights, spec: GraphSpec) -> None:
        """Convert weights in place to the layout that the device's kernels read."""

    def rounded(self, rows_OI: Tensor, form: Format) -> Codes:
        """Quantise whole rows of a weight, fp32 on the host, while it is loaded, if there is no `layout`."""
        return quantise(rows_OI, form)

    @property
    def layout(self) -> Layout | None:
        """Writes weights of linear layers, while they are loaded, as kernels read them; None: `lay_out` does later."""
        return None

    def join(self, store: dist.Store | None, libraries: Path, say: Callable[[str], None]) -> Collectives:
        """Join the other ranks, waiting up to the run's timeout. Raises UserError where a library can't be built."""
        if self.place.world == 1:
            return Alone()
        if self.run.collectives == "shared_memory":
            return SharedMemory(self.place, self.run.segment, self.run.timeout, libraries, say)
        return Distributed(self.place, store, self.run.timeout, self.group, self.samples_on_host)

    def gather(self, ops: Ops) -> Gather:
        """The all-gather with which samplers exchange candidates."""
        return ops.all_gather

    def clear(self, pages: Pages, numbers: Sequence[int]) -> None:
        """Fill the pages with these numbers with zeros."""
        for data in (data for layer in pages for data in layer):
            data[list(numbers)] = 0

    def logits(self, logits_BV: Tensor) -> Tensor:
        """The logits on the device that samples them."""
        return logits_BV

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""

    def name(self) -> str | None:
        """The accelerator's name; None for a CPU."""
        return None

    def most_bytes(self) -> int:
        """The process's peak memory in bytes: allocated on its device, or resident on the host."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def profile(self, folder: Path, options: Any) -> Any:
        """A torch profiler as a context manager; `export_trace` writes its trace."""
        return torch.profiler.profile(activities=self.activities())

    def activities(self) -> list[ProfilerActivity]:
        """The activities that the profiler records."""
        return [ProfilerActivity.CPU]

    def export_trace(self, profile: Any, folder: Path, path: Path) -> None:
        """Write a finished profile as a gzipped Chrome trace at `path`; `folder` holds the profiler's own output."""
        profile.export_chrome_trace(str(path))


class CpuBackend(Backend):
    """Ranks on the CPU cores of their host."""

    def start(self) -> None:
        """Do nothing: torch needs no setup for a CPU."""

    def free_memory(self) -> tuple[int, str] | None:
        return None

    def prepare(self, spec: GraphSpec, libraries: Path, say: Callable[[str], None]) -> None:
        if self.place.local_world > 1 and spec.threads <= len(self.place.cores()):
            os.sched_setaffinity(0, self.place.cores())
        super().prepare(spec, libraries, say)
        for library in spec.libraries:
            load_native(library, libraries, "backend.kernels=plain", say)

    def clear(self, pages: Pages, numbers: Sequence[int]) -> None:
        # On this thread: torch's other threads would then wait without sleeping, on cores that kernels need.
        for data in (data for layer in pages for data in layer):
            for number in numbers:
                data[number].view(torch.uint8).numpy().fill(0)

    @property
    def layout(self) -> Layout | None:
        return cpu.PANELS if self.run.kernels == NATIVE else None


class CudaBackend(Backend):
    """One CUDA device per rank. Never run on a GPU."""

    group = "nccl"

    def start(self) -> None:
        if not torch.cuda.is_available():
            raise UserError("device=cuda: torch finds no CUDA device. Use device=cpu.")
        torch.cuda.set_device(self.place.local_rank)

    def free_memory(self) -> tuple[int, str] | None:
        return torch.cuda.mem_get_info()[0], "free on the CUDA device"

    def lay_out(self, weights: Weights, spec: GraphSpec) -> None:
        # Imports Triton.
        from mllama_graph.ops.cuda_linear import lay_out

        lay_out(weights)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def name(self) -> str | None:
        return torch.cuda.get_device_name()

    def most_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]


class NpuBackend(Backend):
    """One NPU per rank. Never run on an NPU."""

    group = "hccl"
    # The host samples, since kernels outside of a graph would be launched one by one.
    samples_on_host = True
    loaded = LoadedNpuGraphs

    def start(self) -> None:
        # Ranks on other hosts have a CANN of their own.
        cann.require(cann.installed())
        import_torch_npu()
        self._npu().set_device(self.place.local_rank)

    def _npu(self) -> Any:
        import torch_npu

        return torch_npu.npu

    def free_memory(self) -> tuple[int, str] | None:
        return self._npu().mem_get_info()[0], "free on the NPU"

    def lay_out(self, weights: Weights, spec: GraphSpec) -> None:
        from mllama_graph.graphs.torchair import cast_to_nz
        from mllama_graph.ops.npu_layout import lay_out

        lay_out(weights, spec.compute, spec.tiled, spec.vision_heads)
        if spec.tiled and not self.run.device.simulated:
            cast_to_nz(weights)

    def rounded(self, rows_OI: Tensor, form: Format) -> Codes:
        # Operators on float activations take scales in the dtype of these: codes are chosen for such a scale.
        dtype = TORCH_DTYPES[self.run.precision.compute] if form.activations == FLOAT else torch.float32
        return quantise(rows_OI, form, dtype)

    def gather(self, ops: Ops) -> Gather:
        return gather_in(HOST_GROUP, self.place.world) if self.place.world > 1 else ops.all_gather

    def clear(self, pages: Pages, numbers: Sequence[int]) -> None:
        # Copies from the host, since kernels outside of a graph would be launched one by one.
        for data in (data for layer in pages for data in layer):
            zeros = torch.zeros_like(data[0], device="cpu").pin_memory()
            for number in numbers:
                data[number].copy_(zeros, non_blocking=True)

    def logits(self, logits_BV: Tensor) -> Tensor:
        return logits_BV.cpu()

    def name(self) -> str | None:
        return self._npu().get_device_name()

    def most_bytes(self) -> int:
        return self._npu().max_memory_allocated()

    def profile(self, folder: Path, options: Any) -> Any:
        from mllama_graph.engine.npu_profile import npu_profile

        return npu_profile(folder, options.level, options.aic_metrics)

    def export_trace(self, profile: Any, folder: Path, path: Path) -> None:
        from mllama_graph.engine.npu_profile import take_trace

        take_trace(folder, path)


class NpuSimBackend(NpuBackend):
    """A simulated NPU: an interpreter on the host executes torchair's graphs."""

    group = "gloo"

    def start(self) -> None:
        import_torch_npu()
        from mllama_graph.ascend import simulation

        simulation.install(wide=self.run.precision.compute == "fp32")

    def free_memory(self) -> tuple[int, str] | None:
        return None

    def name(self) -> str | None:
        return None

    def most_bytes(self) -> int:
        return Backend.most_bytes(self)


BACKENDS: dict[str, type[Backend]] = {
    CPU.name: CpuBackend,
    CUDA.name: CudaBackend,
    NPU.name: NpuBackend,
    NPU_SIM.name: NpuSimBackend,
}


def backend_of(run: ResolvedRun, place: Place | None = None) -> Backend:
    """The backend of a run's device. `place` defaults to rank 0, with all ranks on this host."""
    return BACKENDS[run.device.name](run, place or Place(0, run.tp, 0, run.tp))


def import_torch_npu() -> None:
    """Import torch_npu, which registers the device. Its output goes to the log: stdout is reserved for answers.

    Raises UserError where it or a library of CANN is missing.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            import torch_npu  # noqa: F401  # registers the device
            import torchair  # noqa: F401  # registers its operations
        except ImportError as error:
            # The loader's message names the library of CANN or of the driver that it does not find.
            raise UserError(
                f"torch_npu can't be imported: {error}. Source CANN's set_env.sh (/usr/local/Ascend/cann/set_env.sh) "
                "in this shell; docs/ascend.md lists the versions that go together."
            ) from error
    log.info("torch_npu: %s", said.getvalue().strip() or "imported")
    # torchair installs handlers that close its engine and continue, but an interrupt must end the run.
    for number, handler in handlers.items():
        signal.signal(number, handler)
