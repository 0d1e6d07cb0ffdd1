"""What a run is: the configuration tree that Hydra fills, and the error a user can cause.

Nothing here imports torch or Hydra: run.py registers `Run` as the schema of conf/config.yaml, so that an unknown key
or a value of the wrong type is refused before anything else happens.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

DTYPES = ("auto", "fp32", "fp16", "bf16")
DEVICES = ("auto", "cpu", "cuda", "npu", "npu-sim")
BACKENDS = ("auto", "inductor", "torchair", "eager")
COMPILE = ("background", "wait", "never")
QUANTS = ("none", "w8a16", "w8a8", "kv8")
COLLECTIVES = ("auto", "shared_memory", "distributed")
KERNELS = ("auto", "native", "plain")
# Of torch_npu.profiler.
LEVELS = (0, 1, 2)
AIC_METRICS = ("AiCoreNone", "PipeUtilization", "ArithmeticUtilization", "Memory", "MemoryL0", "MemoryUB", "MemoryAccess",
               "L2Cache", "ResourceConflictRatio")
TORCHAIR_MODES = ("max-autotune", "npugraph_ex")
WEIGHT_FORMATS = ("nd", "nz")
TOPOLOGIES = ("BFS", "DFS", "RDFS", "StableRDFS")


class UserError(Exception):
    """A mistake that a user can mend: the message gives the value, the rule and the remedy."""


class RankFailed(Exception):
    """A rank's process has failed; the message says which, how, and where its stack is."""


class PeerGone(Exception):
    """Another rank has not answered in time: it died, hangs, or has failed itself and said so elsewhere."""


class Interrupted(Exception):
    """The run was stopped from outside; what had finished is kept."""


@dataclass
class ModelChoice:
    """One option of conf/model/. `config` holds released shapes in the form of a checkpoint's config.json.

    weights, image and prompt are what the run takes where it says nothing of its own; package: is mllama_graph's folder.
    """

    name: str = "custom"
    config: Optional[dict[str, Any]] = None
    weights: Optional[str] = None
    image: Optional[str] = None
    prompt: Optional[str] = None


@dataclass
class TorchairChoice:
    """How torchair compiles for an NPU; conf/backend/torchair.yaml says what each does and why."""

    mode: str = "max-autotune"
    frozen_parameter: bool = True
    tiling_schedule_optimize: bool = True
    topology_sorting_strategy: str = "StableRDFS"
    ge_cache: bool = True
    static_kernel_compile: bool = False
    weight_format: str = "nd"


@dataclass
class BackendChoice:
    """One option of conf/backend/."""

    name: str = "auto"
    # What computes products of few rows and attention on a CPU: C++ built here, or what the backend has.
    kernels: str = "auto"
    # Options handed to Inductor as they are (torch._inductor.config names).
    inductor: dict[str, Any] = field(default_factory=dict)
    torchair: TorchairChoice = field(default_factory=TorchairChoice)
    # Variables that stand before torch_npu is imported; what the environment already says wins.
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class HardwareChoice:
    """One option of conf/hardware/: the peaks of a device, per second and in bytes, that latencies are modelled from.

    device is what device= calls it: what is stored and computed there follows from that.
    """

    name: str = ""
    device: str = "npu"
    flops: float = 0.0
    memory_bytes_per_second: float = 0.0
    memory_bytes: float = 0.0
    link_bytes_per_second: float = 0.0


@dataclass
class TaskChoice:
    """One option of conf/task/: names the module in mllama_graph/tasks/, and holds what only it needs."""

    name: str = "generate"
    # Whether the task runs the model, and so needs the ranks.
    ranks: bool = True
    action: str = "list"
    max_age_days: Optional[float] = None
    max_gb: Optional[float] = None
    each: int = 40
    controls: bool = True
    folder: Optional[str] = None
    steps: int = 8000
    images: int = 1
    new_tokens: int = 17
    repetitions: int = 3
    # The Python that runs peers=mistralrs.
    mistralrs: str = ".venv/mistralrs/bin/python"
    measured: Optional[str] = None
    # Of task=compare.
    across_hardware: bool = False
    # Of task=profile on an NPU.
    level: int = 1
    aic_metrics: str = "PipeUtilization"


@dataclass
class PlanChoice:
    """The bucket plan (see buckets.py). A null takes what buckets.py derives from batch and lengths."""

    page_size: int = 128
    prefill_tokens: Optional[list[int]] = None
    decode_batch: Optional[list[int]] = None
    pages: Optional[list[int]] = None
    images: Optional[list[int]] = None
    num_pages: Optional[int] = None
    num_images: Optional[int] = None
    # A graph that exists already serves a smaller step at up to this many times the smaller bucket's modelled cost.
    reuse: float = 1.25
    # What a step does whose graph is not in the store.
    compile: str = "background"


@dataclass
class Run:
    """The whole configuration of one run. conf/config.yaml says in a line what each key does."""

    model: ModelChoice = field(default_factory=ModelChoice)
    weights: Optional[str] = None
    tp: int = 1
    batch: int = 1
    dtype: str = "auto"
    quant: str = "none"
    backend: BackendChoice = field(default_factory=BackendChoice)
    device: str = "auto"
    task: TaskChoice = field(default_factory=TaskChoice)
    hardware: HardwareChoice = field(default_factory=HardwareChoice)
    prompt: Optional[str] = None
    image: Any = None
    system: Optional[str] = None
    requests: Optional[str] = None
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    lengths: list[int] = field(default_factory=lambda: [64])
    # Names, or one.
    peers: Any = field(default_factory=list)
    a: Optional[str] = None
    b: Optional[str] = None
    max_input_length: int = 2048
    max_output_length: int = 128
    max_images: Optional[int] = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    graph_cache: Optional[str] = None
    threads: Optional[int] = None
    deterministic: bool = False
    collectives: str = "auto"
    timeout: float = 60.0
    memory_gib: Optional[float] = None
    plan: PlanChoice = field(default_factory=PlanChoice)
    # Set by run.py: where this run writes.
    output_dir: Optional[str] = None


def _one_of(key: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is not one of {', '.join(map(str, choices))}.")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{key}={value} must be at least {least}.")


def check(run: Run) -> None:
    """Refuse what no checkpoint could make right; one name of peers= becomes a list of it.

    Raises UserError with the value, the rule and the remedy.
    """
    _one_of("dtype", run.dtype, DTYPES)
    _one_of("device", run.device, DEVICES)
    _one_of("backend", run.backend.name, BACKENDS)
    _one_of("quant", run.quant, QUANTS)
    _one_of("plan.compile", run.plan.compile, COMPILE)
    _one_of("backend.kernels", run.backend.kernels, KERNELS)
    _one_of("collectives", run.collectives, COLLECTIVES)
    _one_of("backend.torchair.mode", run.backend.torchair.mode, TORCHAIR_MODES)
    _one_of("backend.torchair.weight_format", run.backend.torchair.weight_format, WEIGHT_FORMATS)
    _one_of("backend.torchair.topology_sorting_strategy", run.backend.torchair.topology_sorting_strategy, TOPOLOGIES)
    run.peers = run.peers if isinstance(run.peers, list) else [run.peers]
    for key in ("tp", "batch", "max_input_length", "max_output_length"):
        _at_least(key, getattr(run, key), 1)
    _at_least("temperature", run.temperature, 0)
    _at_least("top_k", run.top_k, 0)
    if not 0 < run.top_p <= 1:
        raise UserError(f"top_p={run.top_p} must be above 0 and at most 1.")
    for key in ("batch_sizes", "lengths"):
        if not getattr(run, key):
            raise UserError(f"{key}=[] must hold at least one number: {key}=[1].")
        for value in getattr(run, key):
            _at_least(key, value, 1)
    _one_of("task.level", run.task.level, LEVELS)
    _one_of("task.aic_metrics", run.task.aic_metrics, AIC_METRICS)
    for key, least in (("new_tokens", 2), ("repetitions", 1), ("images", 0)):
        _at_least(f"task.{key}", getattr(run.task, key), least)
    if run.max_images is not None:
        _at_least("max_images", run.max_images, 1)
    if run.threads is not None:
        _at_least("threads", run.threads, 1)
    if not run.timeout > 0:
        raise UserError(f"timeout={run.timeout:g} must be above 0 seconds.")
