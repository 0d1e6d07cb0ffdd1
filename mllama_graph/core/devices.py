"""The supported kinds of device, and their properties that are known before torch is imported.

To add a kind of device, add an entry to DEVICES here and a Backend in engine/device.py. Outside of ops/, graphs/,
ascend/ and plan/resolve.py, no other code depends on a device's name.
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
    """What a device's attention kernels ask of pages and buckets. The defaults ask for nothing."""

    # A page holds a multiple of this many tokens, and at most `largest_page`.
    page_multiple: int = 1
    largest_page: int | None = None
    # Whether the pool must have as many pages as all sequences read, shared pages counted once per sequence.
    counts_every_reader: bool = False
    # Whether each number of an image's real tiles has a vision graph: then its attention needs no mask.
    fixed_tiles: bool = False
    # plan.mixed_tokens: prompt rows that a device multiplies in up to twice the time in which it reads the weights. 0:
    # no mixed graphs.
    mixed_tokens: int = 0


@dataclass(frozen=True)
class Quantised:
    """Limits that a device's kernels put on quantised linear layers."""

    # Kinds of code that have a kernel (model/formats.py).
    codes: tuple[str, ...]
    # A group's inputs, and a 4-bit layer's outputs, are multiples of these.
    group: int
    outputs: int
    # Most inputs, and most outputs, of a layer.
    largest: int
    # Dtypes that layers whose activations have a stored scale can't return.
    refused_with_static: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """One kind of device, named by device=."""

    name: str
    # Compiler backends that support it, the default first.
    backends: tuple[str, ...] = ("inductor", "eager")
    # The environment variable that selects devices, and the prefix of their numbered files in /dev.
    variable: str | None = None
    files: str = ""
    # Whether the variable takes only numbers; CUDA's also takes UUIDs.
    numbered: bool = False
    # The Python package that the device requires, and the extra that installs it.
    package: str | None = None
    extra: str = ""
    # Ray's name of the resource that a device of this kind is.
    ray_resource: str = ""
    # Ranks share the host's memory instead of having device memory.
    on_host: bool = False
    # Simulated by an interpreter on the CPU: times mean nothing, and processes are started with stub libraries.
    simulated: bool = False
    # Each rank compiles its own graphs, bound to its own weights, when it loads them.
    compiles_on_rank: bool = False
    # Runs on CANN, whose version matters (core/cann.py).
    uses_cann: bool = False
    # The C++ kernels and the shared-memory collectives of native/ run on it.
    native: bool = False
    # dtype=auto: checkpoint dtype -> storage dtype, where they differ; and the compute dtype, if it is fixed.
    stores: Mapping[str, str] = field(default_factory=dict)
    computes: str | None = None
    refused_dtypes: tuple[str, ...] = ()
    # plan.candidates: on a CPU nothing is gained, since logits are on the host already.
    candidates: int = 0
    # overlap: whether the device computes a step while the host prepares the next.
    overlaps: bool = False
    paging: Paging = Paging()
    # What one more token row adds to a decode step, as a share of a step with one row: how many proposals pay. Assumed,
    # except for a CPU (docs/speculation.md).
    row_cost: float = 0.02
    # None: every format can be used.
    quantised: Quantised | None = None
    # Whether it multiplies 4-bit weights with int8 activations.
    int4_by_int8: bool = False

    def precision(self, dtype: str, kv: str, stored: str) -> Precision:
        """Dtypes on this device for dtype=, kv= and a checkpoint stored in `stored`."""
        kept = self.stores.get(stored, stored) if dtype == "auto" else dtype
        compute = self.computes or kept if dtype == "auto" else dtype
        return Precision(kept, compute, compute if kv == "auto" else kv)

    def overlap(self, given: bool | None, candidates: int, speculate: str) -> bool:
        """Whether steps are launched before the ids of the step before are read, for overlap=.

        Raises UserError where that is asked for and can't be.
        """
        if given and not candidates:
            raise UserError(
                f"overlap=true needs graphs that find the largest logits themselves. Here plan.candidates={candidates} "
                f"({self.name}). Use plan.candidates=64, too, or leave overlap= out."
            )
        if given and speculate != "none":
            raise UserError(
                f"overlap=true speculate={speculate}: proposals follow the last id, which the host does not know yet. "
                "Leave overlap= or speculate= out."
            )
        return bool(candidates) and speculate == "none" and (self.overlaps if given is None else given)

    def visible(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        """The devices that a run may use, in order. Raises UserError if the environment variable is invalid."""
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
        """Raises UserError if fewer than `ranks` devices are visible on this host."""
        if self.variable is None:
            return
        devices = self.visible(environment)
        if not devices:
            where = f"{self.variable}={environment[self.variable]}" if self.variable in environment else "this machine"
            raise UserError(
                f"device={self.name}: no {self.name.upper()} device is visible; {where} shows none. "
                f"Use device=cpu, or a machine with such a device and its driver."
            )
        if len(devices) < ranks:
            seen = f"{self.variable}={environment[self.variable]}" if self.variable in environment else "this machine"
            raise UserError(
                f"tp={ranks} needs {ranks} {self.name} devices; {seen} shows {len(devices)}. "
                f"Lower tp, set {self.variable}, or use device=cpu."
            )

    def check_package(self) -> None:
        """Raises UserError if the Python package that the device requires is not installed."""
        if self.package and not importlib.util.find_spec(self.package):
            raise UserError(
                f"device={self.name} needs {self.package}, which is not installed. Install it with: "
                f"pip install -e '.[{self.extra}]'"
            )


# On a CPU, weights keep the checkpoint's dtype and are computed in fp32: few CPUs multiply 16-bit types faster than
# fp32, but all of them read the narrower type faster.
CPU = Device("cpu", on_host=True, native=True, computes="fp32", row_cost=0.1, int4_by_int8=True)
# Requests with top_k of 50 or 40, as is usual, take their candidates from the graph.
CANDIDATES = 64
# By peak rates, a 910B multiplies 184 rows of 16 bits in the time in which it reads a weight, and an H100 295.
MIXED_TOKENS = 192
CUDA = Device(
    "cuda",
    variable="CUDA_VISIBLE_DEVICES",
    files="nvidia",
    ray_resource="GPU",
    candidates=CANDIDATES,
    overlaps=True,
    paging=Paging(mixed_tokens=MIXED_TOKENS),
)
# NPU attention takes only 16-bit types. Page limits: docs of npu_fused_infer_attention_score, for several query rows.
_NPU_PAGING = Paging(
    page_multiple=128, largest_page=512, counts_every_reader=True, fixed_tiles=True, mixed_tokens=MIXED_TOKENS
)
# Docs of npu_weight_quant_batchmatmul, npu_quant_matmul (65535; fp16 only with a scale per row) and
# npu_convert_weight_to_int4pack (8). A 910B has no FP8, and no operation looks codes up.
_NPU_QUANTISED = Quantised(("int8", "int4"), group=32, outputs=8, largest=65535, refused_with_static=("fp16",))
NPU = Device(
    "npu",
    backends=("torchair",),
    variable="ASCEND_RT_VISIBLE_DEVICES",
    files="davinci",
    numbered=True,
    ray_resource="NPU",
    package="torch_npu",
    extra="npu",
    compiles_on_rank=True,
    uses_cann=True,
    stores={"fp32": "bf16"},
    refused_dtypes=("fp32",),
    candidates=CANDIDATES,
    overlaps=True,
    paging=_NPU_PAGING,
    quantised=_NPU_QUANTISED,
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
    candidates=CANDIDATES,
    overlaps=True,
    paging=_NPU_PAGING,
    quantised=_NPU_QUANTISED,
)

DEVICES = {device.name: device for device in (CPU, CUDA, NPU, NPU_SIM)}


def detect() -> Device:
    """The device that device=auto selects on this machine: an NPU, else a CUDA device, else the CPU."""
    if NPU.visible({}) and importlib.util.find_spec("torch_npu"):
        return NPU
    return CUDA if CUDA.visible({}) and not metadata.version("torch").endswith("+cpu") else CPU
