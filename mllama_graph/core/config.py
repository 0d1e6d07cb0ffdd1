"""The configuration of a run as a tree of dataclasses: what the user requested, as Hydra fills it.

Hydra takes `Run` as the schema of conf/config.yaml, so that an unknown key or a value of the wrong type is rejected
before anything else happens. Nothing here imports torch or Hydra. plan/resolve.py turns a `Run` into a `ResolvedRun`.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from mllama_graph.core.devices import DEVICES, Device
from mllama_graph.core.dtypes import DTYPES, KVS
from mllama_graph.core.errors import UserError
from mllama_graph.core.hardware import HardwareChoice

BACKENDS = ("auto", "inductor", "torchair", "eager")
COMPILE_MODES = ("background", "wait", "never")
SPECULATIONS = ("none", "ngram", "draft")
QUANTS = ("none", "w8a16", "w8a8", "w4a16", "w4a8", "fp8")
QUANT_GROUPS = (32, 64, 128)
QUANT_PARTS = ("text", "head", "vision", "projector", "embedding")
COLLECTIVES = ("auto", "shared_memory", "distributed")
KERNELS = ("auto", "native", "plain")
TORCHAIR_MODES = ("max-autotune", "npugraph_ex")
WEIGHT_FORMATS = ("auto", "nd", "nz")
ATTENTIONS = ("auto", "bsh", "tnd", "split")
TOPOLOGIES = ("BFS", "DFS", "RDFS", "StableRDFS")


@dataclass
class ModelChoice:
    """One option of conf/model/. `config` holds a released model's shapes in the form of config.json.

    `weights`, `image` and `prompt` are defaults for runs that give none. A path that begins with package: is relative
    to this package's folder.
    """

    name: str = "custom"
    config: dict[str, Any] | None = None
    weights: str | None = None
    image: str | None = None
    prompt: str | None = None


@dataclass
class TorchairChoice:
    """How torchair compiles for an NPU; conf/backend/torchair.yaml explains each key."""

    mode: str = "max-autotune"
    frozen_parameter: bool = True
    tiling_schedule_optimize: bool = True
    topology_sorting_strategy: str = "StableRDFS"
    ge_cache: bool = True
    static_kernel_compile: bool = False
    weight_format: str = "auto"
    pad_vision_heads: bool = False
    attention: str = "auto"


@dataclass
class BackendChoice:
    """One option of conf/backend/."""

    name: str = "auto"
    # CPU kernels: the native C++ ones, or plain torch compiled by the backend.
    kernels: str = "auto"
    # Options passed to Inductor unchanged (names from torch._inductor.config).
    inductor: dict[str, Any] = field(default_factory=dict)
    torchair: TorchairChoice = field(default_factory=TorchairChoice)
    # Variables set before torch_npu is imported; a value that is already in the environment takes precedence.
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class TaskOptions:
    """Keys that belong to one task, given as `task.KEY`. tasks/options.py has a subclass for each task."""

    # What a task needs: ranks that run the model; the model's shapes and files in one process; or nothing.
    RANKS: ClassVar[str] = "ranks"
    MODEL: ClassVar[str] = "model"
    NOTHING: ClassVar[str] = "nothing"
    # Whether the task reads stdin and decides itself what Ctrl-C does, also where it runs in a process of its own.
    INTERACTIVE: ClassVar[bool] = False

    # The room of the module that runs the task.
    ROOM: ClassVar[str] = "tasks"
    # Whether a second interrupt ends rank 0 at once, rather than after it has written its results.
    ENDS_AT_ONCE: ClassVar[bool] = False

    name: str = "generate"

    @property
    def end_seconds(self) -> float:
        """Seconds that rank 0 may take after an interrupt, to finish what it does."""
        return 20.0

    def needs(self, device: Device) -> str:
        """Return RANKS, MODEL or NOTHING. Raises UserError if the task can't run on the device."""
        return self.RANKS

    def check(self) -> None:
        """Raises UserError for a value that is invalid for every model."""

    def prepared(self, run: "Run") -> "Run":
        """Return a copy of `run` with the limits and defaults of this task, or `run` itself if it has none."""
        return run

    def images_asked(self, run: "Run") -> int:
        """The most images in any request of the run, as far as known."""
        return 0


@dataclass
class PlanChoice:
    """The bucket plan (plan/buckets.py). A null value is derived from the batch size and the lengths."""

    page_size: int = 128
    prefill_tokens: list[int] | None = None
    prefill_rows: list[int] | None = None
    mixed_tokens: list[int] | None = None
    decode_batch: list[int] | None = None
    pages: list[int] | None = None
    images: list[int] | None = None
    num_pages: int | None = None
    num_images: int | None = None
    # A stored graph of a larger bucket is used if its modelled cost is at most this many times the exact bucket's.
    reuse: float = 1.25
    # What happens to a step whose graph is not in the store.
    compile: str = "background"
    # The number of largest logits that a graph finds itself; 0: the host samples from all logits. Null: the device's.
    candidates: int | None = None


@dataclass
class Run:
    """All keys of a run. conf/config.yaml explains each in one line."""

    model: ModelChoice = field(default_factory=ModelChoice)
    weights: str | None = None
    adapter: Any = None
    tp: int = 1
    batch: int = 1
    dtype: str = "auto"
    kv: str = "auto"
    quant: str = "none"
    quant_group: int = 128
    quant_parts: list[str] = field(default_factory=lambda: ["text"])
    backend: BackendChoice = field(default_factory=BackendChoice)
    device: str = "auto"
    task: TaskOptions = field(default_factory=TaskOptions)
    hardware: HardwareChoice = field(default_factory=HardwareChoice)
    prompt: str | None = None
    image: Any = None
    system: str | None = None
    requests: str | None = None
    resume: bool = False
    # Short names for keys of tasks; null leaves the task's own key unchanged.
    batch_sizes: list[int] | None = None
    lengths: list[int] | None = None
    peers: Any = None
    a: str | None = None
    b: str | None = None
    port: int | None = None
    host: str | None = None
    api_key: str | None = None
    fetch_hosts: list[str] | None = None
    files_below: str | None = None
    drain_seconds: float | None = None
    log_prompts: bool | None = None
    input: str | None = None
    output: str | None = None
    replicas: int | None = None
    max_input_length: int = 2048
    max_output_length: int = 128
    max_images: int | None = None
    extend_context: bool = False
    max_step_tokens: int | None = None
    speculate: str = "none"
    speculate_tokens: int = 4
    draft: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    graph_cache: str | None = None
    threads: int | None = None
    deterministic: bool = False
    prefix_cache: bool = True
    overlap: bool | None = None
    collectives: str = "auto"
    timeout: float = 60.0
    memory_gib: float | None = None
    plan: PlanChoice = field(default_factory=PlanChoice)
    # Set by the command line: the folder that this run writes to.
    output_dir: str | None = None


# Keys of tasks that are also accepted at the top level, and the error message for a task that lacks them.
SHORT_NAMES = {
    "batch_sizes": "only task=bench, profile and roofline serve batches of given sizes. Choose one of them",
    "lengths": "only task=bench, profile and roofline serve prompts of given lengths. Choose one of them",
    "peers": "only task=bench measures other engines. Add task=bench",
    "a": "only task=compare compares sessions. Add task=compare",
    "b": "only task=compare compares sessions. Add task=compare",
    **dict.fromkeys(
        ("port", "host", "api_key", "fetch_hosts", "files_below", "drain_seconds", "log_prompts"),
        "only task=serve is a server. Add task=serve",
    ),
    **dict.fromkeys(("input", "output", "replicas"), "only task=batch has replicas that read files. Add task=batch"),
}


# The keys of a single question, and what a line of a requests file has in their place.
HELD = {"prompt": "prompt or messages", "image": "images", "system": "messages of the role system"}


def with_task_keys(run: Run) -> Run:
    """Return the run with short names such as batch_sizes= moved to the keys of its task.

    Raises UserError if the task has no such key.
    """
    given = {name: value for name in SHORT_NAMES if (value := getattr(run, name)) is not None}
    own = {entry.name for entry in fields(run.task)}
    for name, value in given.items():
        if name not in own:
            value = "..." if name == "api_key" else value
            raise UserError(f"{name}={value}: {SHORT_NAMES[name]}, or leave {name}= out.")
    cleared: dict[str, Any] = dict.fromkeys(given)
    return replace(run, task=replace(run.task, **given), **cleared)


def one_of(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises UserError if `value` is not one of `choices`."""
    if value not in choices:
        raise UserError(f"{key}={value} is not one of {', '.join(map(str, choices))}.")


def at_least(key: str, value: float, least: float) -> None:
    """Raises UserError if `value` is below `least`."""
    if value < least:
        raise UserError(f"{key}={value} must be at least {least}.")


def unused(run: Run) -> tuple[str, ...]:
    """Lines on keys that differ from their defaults, but do nothing without another key."""
    default, found = Run(), []
    if run.speculate == "none" and run.speculate_tokens != default.speculate_tokens:
        found.append(f"speculate_tokens={run.speculate_tokens} is not used: speculate=none proposes no tokens")
    if not run.quant.startswith("w4") and run.quant_group != default.quant_group:
        found.append(f"quant_group={run.quant_group} is not used: quant={run.quant} has no groups")
    if run.quant == "none" and run.quant_parts != default.quant_parts:
        found.append(f"quant_parts=[{','.join(run.quant_parts)}] is not used: quant=none quantises nothing")
    return tuple(found)


def check(run: Run) -> None:
    """Reject values that are invalid for every checkpoint.

    Raises UserError with the value, the rule and the remedy.
    """
    one_of("dtype", run.dtype, DTYPES)
    one_of("kv", run.kv, KVS)
    one_of("device", run.device, ("auto", *DEVICES))
    one_of("backend", run.backend.name, BACKENDS)
    one_of("quant", run.quant, QUANTS)
    one_of("speculate", run.speculate, SPECULATIONS)
    at_least("speculate_tokens", run.speculate_tokens, 1)
    if (run.speculate == "draft") != (run.draft is not None):
        raise UserError(
            "speculate=draft needs the checkpoint folder of a smaller model: give draft=."
            if run.draft is None
            else f"draft={run.draft} is used with speculate=draft only. Add speculate=draft, or leave draft= out."
        )
    one_of("quant_group", run.quant_group, QUANT_GROUPS)
    for part in run.quant_parts:
        one_of("quant_parts", part, QUANT_PARTS)
    if run.quant != "none" and not run.quant_parts:
        raise UserError(
            f"quant={run.quant} quant_parts=[] would quantise nothing. Name some of {', '.join(QUANT_PARTS)}, or leave "
            "quant= out."
        )
    one_of("plan.compile", run.plan.compile, COMPILE_MODES)
    one_of("backend.kernels", run.backend.kernels, KERNELS)
    one_of("collectives", run.collectives, COLLECTIVES)
    one_of("backend.torchair.mode", run.backend.torchair.mode, TORCHAIR_MODES)
    one_of("backend.torchair.weight_format", run.backend.torchair.weight_format, WEIGHT_FORMATS)
    one_of("backend.torchair.attention", run.backend.torchair.attention, ATTENTIONS)
    one_of("backend.torchair.topology_sorting_strategy", run.backend.torchair.topology_sorting_strategy, TOPOLOGIES)
    if run.resume and (run.requests is None or run.task.name != "generate"):
        raise UserError("resume=true goes on with a requests file of task=generate. Give requests=, or leave it out.")
    for key in ("image", "requests", "weights", "adapter", "draft"):
        if getattr(run, key) == "":
            without = " for a prompt without a picture" if key == "image" else ""
            raise UserError(f"{key}= is empty. Give a value, or leave {key}= out{without}.")
    for key in ("prompt", "image", "system"):
        if run.requests is not None and getattr(run, key) is not None:
            raise UserError(
                f"{key}= and requests= exclude each other: each line of a requests file has its own {HELD[key]}. "
                f"Leave {key}= or requests= out."
            )
    if run.plan.candidates is not None:
        at_least("plan.candidates", run.plan.candidates, 0)
    for key in ("tp", "batch", "max_input_length", "max_output_length"):
        at_least(key, getattr(run, key), 1)
    at_least("temperature", run.temperature, 0)
    at_least("top_k", run.top_k, 0)
    if not 0 < run.top_p <= 1:
        raise UserError(f"top_p={run.top_p} must be above 0 and at most 1.")
    if run.max_images is not None:
        at_least("max_images", run.max_images, 1)
    if run.max_step_tokens is not None and run.max_step_tokens < run.batch:
        raise UserError(
            f"max_step_tokens={run.max_step_tokens} must be at least batch={run.batch}: each decoding sequence takes "
            "one token of a step. Raise max_step_tokens, or lower batch."
        )
    if run.threads is not None:
        at_least("threads", run.threads, 1)
    if not run.timeout > 0:
        raise UserError(f"timeout={run.timeout:g} must be above 0 seconds.")
    if run.hardware.calibration.cores:
        for key in ("memory", "products", "links", "int8_products", "vector_bytes_per_second"):
            if not (value := getattr(run.hardware.calibration, key)) > 0:
                raise UserError(
                    f"hardware.calibration.{key}={value:g} must be above 0. Use hardware.calibration.cores=0 for "
                    "hardware without these figures."
                )
    at_least("hardware.calibration.cores", run.hardware.calibration.cores, 0)
    run.task.check()
