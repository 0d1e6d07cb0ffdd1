"""The kinds of device that a run can be on, and what is known of each before torch is imported.

A new kind of device is an entry of DEVICES here and a Backend in engine/device.py; no other file decides anything by a
device's name.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from mllama_graph.core.dtypes import Precision
from mllama_graph.core.errors import UserError


@dataclass(frozen=True)
class Paging:
    """Limits of a device's attention kernels on K/V pages. The defaults limit nothing."""

    # A page holds a multiple of this many tokens, and at most `largest_page`.
    page_multiple: int = 1
    largest_page: int | None = None
    # Whether the kernel counts the pages of all sequences together, shared ones once for each sequence that reads them.
    counts_every_reader: bool = False


@dataclass(frozen=True)
class Device:
    """One kind of device, as device= names it."""

    name: str
    # Compiler backends that run on it, the default first.
    backends: tuple[str, ...] = ("inductor", "eager")
    # The environment variable that selects devices, and the prefix of their files in /dev, whose names end in a number.
    variable: str | None = None
    files: str = ""
    # Whether the variable takes numbers alone; CUDA's also takes UUIDs.
    numbered: bool = False
    # A Python package without which the device can't be used, and the extra that installs it.
    package: str | None = None
    extra: str = ""
    # Ranks share the host's memory, instead of having a device's own.
    on_host: bool = False
    # Executed by an interpreter on the CPU: nothing can be timed, and processes are started with stub libraries.
    simulated: bool = False
    # Each rank compiles its own graphs, over its own weights, when it loads them.
    compiles_on_rank: bool = False
    # Our C++ kernels and our shared-memory collectives run on it.
    native: bool = False
    # dtype=auto: dtypes stored otherwise than the checkpoint stores them, and the dtype that is computed in, if fixed.
    stores: Mapping[str, str] = field(default_factory=dict)
    computes: str | None = None
    refused_dtypes: tuple[str, ...] = ()
    paging: Paging = Paging()

    def precision(self, dtype: str, stored: str) -> Precision:
        """What dtype= means on this device for a checkpoint stored in `stored`."""
        if dtype != "auto":
            return Precision(dtype, dtype)
        kept = self.stores.get(stored, stored)
        return Precision(kept, self.computes or kept)

    def visible(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        """The devices that a run may use, in order. Raises UserError for a variable that makes no sense."""
        assert self.variable is not None, f"{self.name} has no devices to choose from"
        present = sorted(
            (path.name.removeprefix(self.files) for path in Path("/dev").glob(f"{self.files}[0-9]*")), key=int
        )
        given = environment.get(self.variable)
        if given is None:
            return present
        chosen = [part.strip() for part in given.split(",") if part.strip()]
        if self.numbered and not all(part.isdigit() for part in chosen):
            raise UserError(f"{self.variable}={given} must be a comma list of device numbers, such as 0,1,2,3.")
        if len(set(chosen)) < len(chosen):
            raise UserError(f"{self.variable}={given} names a device twice.")
        return chosen

    def check_count(self, ranks: int, environment: Mapping[str, str] = os.environ) -> None:
        """Raises UserError where `ranks` ranks of this host see fewer devices."""
        if self.variable is None:
            return
        devices = self.visible(environment)
        if len(devices) < ranks:
            seen = f"{self.variable}={environment[self.variable]}" if self.variable in environment else "this machine"
            raise UserError(
                f"tp={ranks} needs {ranks} {self.name} devices; {seen} shows {len(devices)}. "
                f"Lower tp, set {self.variable}, or use device=cpu."
            )

    def check_package(self) -> None:
        """Raises UserError where the package that the device needs is not installed."""
        if self.package and not importlib.util.find_spec(self.package):
            raise UserError(
                f"device={self.name} needs {self.package}, which is not installed. Install it with: "
                f"pip install -e '.[{self.extra}]'"
            )


# On a CPU weights stay as they are stored and are computed in fp32: few CPUs multiply 16-bit types faster than fp32,
# all of them read the narrower type faster.
CPU = Device("cpu", on_host=True, native=True, computes="fp32")
CUDA = Device("cuda", variable="CUDA_VISIBLE_DEVICES", files="nvidia")
# Attention on an NPU takes 16-bit types only. Pages: docs npu_fused_infer_attention_score, for several query rows.
_NPU_PAGING = Paging(page_multiple=128, largest_page=512, counts_every_reader=True)
NPU = Device(
    "npu",
    backends=("torchair",),
    variable="ASCEND_RT_VISIBLE_DEVICES",
    files="davinci",
    numbered=True,
    package="torch_npu",
    extra="npu",
    compiles_on_rank=True,
    stores={"fp32": "bf16"},
    refused_dtypes=("fp32",),
    paging=_NPU_PAGING,
)
NPU_SIM = Device(
    "npu-sim",
    backends=("torchair",),
    package="torch_npu",
    extra="npu",
    on_host=True,
    simulated=True,
    compiles_on_rank=True,
    stores={"fp32": "bf16"},
    paging=_NPU_PAGING,
)

DEVICES = {device.name: device for device in (CPU, CUDA, NPU, NPU_SIM)}


def detect() -> Device:
    """What device=auto means on this machine: an NPU, else a CUDA device, else the CPU."""
    if NPU.visible({}) and importlib.util.find_spec("torch_npu"):
        return NPU
    return CUDA if CUDA.visible({}) and not metadata.version("torch").endswith("+cpu") else CPU
