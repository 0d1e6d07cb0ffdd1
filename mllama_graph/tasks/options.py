"""The keys of each task (`task.KEY`), their checks, and what each task needs to run. No torch.

To add a task, add a module with `main(run)` to this package, an entry to TASKS, and conf/task/NAME.yaml.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllama_graph.core.config import Run, TaskOptions, at_least, one_of
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_sources import list_images
from mllama_graph.inputs.request_file import is_stream, most_images, read_lines, spool
from mllama_graph.measure.peers import ENVIRONMENTS, Setting, settings_of
from mllama_graph.plan.make import LARGEST_PREFILL
from mllama_graph.tasks.batch_options import BatchOptions
from mllama_graph.tasks.chat_options import ChatOptions
from mllama_graph.tasks.quantize_options import SHAPES_ONLY, QuantizeOptions
from mllama_graph.tasks.serve_options import ServeOptions

# Values that torch_npu.profiler accepts.
PROFILER_LEVELS = (0, 1, 2)
AIC_METRICS = (
    "AiCoreNone",
    "PipeUtilization",
    "ArithmeticUtilization",
    "Memory",
    "MemoryL0",
    "MemoryUB",
    "MemoryAccess",
    "L2Cache",
    "ResourceConflictRatio",
)
# Values of task.against: the run's weights without quantisation, or no comparison.
UNQUANTISED, NOTHING = "unquantised", "none"


@dataclass
class GenerateOptions(TaskOptions):
    """task=generate: a prompt on the command line, or a file of requests."""

    def prepared(self, run: Run) -> Run:
        """Copy requests from stdin or a pipe to a file: they are read twice, and by the process of rank 0.

        Raises UserError for a file that can't be read or holds no requests.
        """
        if run.requests is None:
            return run
        if is_stream(run.requests):
            assert run.output_dir is not None, "set by the command line"
            run = replace(run, requests=str(spool(run.requests, Path(run.output_dir))))
        next(read_lines(Path(str(run.requests))))
        return run

    def images_asked(self, run: Run) -> int:
        """The number of images of the prompt, or the most on a line of the requests file."""
        if run.requests is None:
            return len(list_images(run.image))
        return most_images(read_lines(Path(run.requests)), Path(run.requests).parent)


@dataclass
class EvaluateOptions(GenerateOptions):
    """task=evaluate: exact match against reference answers, and agreement with another model.

    `each`: held-out scenes per kind of question. `against`: the other model, as UNQUANTISED, NOTHING or a folder.
    """

    name: str = "evaluate"
    each: int = 40
    controls: bool = True
    against: str = UNQUANTISED

    def check(self) -> None:
        at_least("task.each", self.each, 1)

    def images_asked(self, run: Run) -> int:
        return 0 if run.requests is None else super().images_asked(run)


@dataclass
class WorkloadOptions(TaskOptions):
    """Keys of tasks on synthetic requests of every batch size and length. `images`: per request, with all tiles."""

    batch_sizes: list[int] = field(default_factory=lambda: [1])
    lengths: list[int] = field(default_factory=lambda: [64])
    images: int = 1
    new_tokens: int = 17

    def check(self) -> None:
        for key in ("batch_sizes", "lengths"):
            values = getattr(self, key)
            if not values:
                raise UserError(f"{key}=[] must hold at least one number: {key}=[1].")
            for value in values:
                at_least(key, value, 1)
        at_least("task.new_tokens", self.new_tokens, 2)
        at_least("task.images", self.images, 0)

    def images_asked(self, run: Run) -> int:
        return self.images


@dataclass
class TimedOptions(WorkloadOptions):
    """Keys of workload tasks that measure time.

    `cached`: the share of each prompt whose K/V are random numbers instead of being computed.
    """

    cached: float = 0.0

    def check(self) -> None:
        super().check()
        if not 0 <= self.cached < 1:
            raise UserError(f"task.cached={self.cached:g} must be at least 0 and below 1, as a share of each prompt.")

    def prepared(self, run: Run) -> Run:
        """Raise the limits to hold every case, and have graphs compiled before they are timed.

        A request decodes a token in each step of the requests that get their first token after it: one for each image
        and for each chunk, which are as large as without sequences that decode. Where shapes are compiled, prompts and
        tokens are timed in steps of their own.
        """
        if run.speculate != "none":
            raise UserError(
                f"speculate={run.speculate}: task={self.name} times steps that give each request one token. Leave "
                "speculate= out; tests/speculation_speed.py times steps with proposals."
            )
        longest, most = max(self.lengths), max(self.batch_sizes)
        chunks = -(-longest // min(max(run.plan.prefill_tokens or [LARGEST_PREFILL]), LARGEST_PREFILL))
        compile_mode = "never" if run.plan.compile == "never" else "wait"
        return replace(
            run,
            batch=max(run.batch, *self.batch_sizes),
            max_input_length=max(run.max_input_length, *self.lengths),
            max_output_length=max(run.max_output_length, self.new_tokens + most * (chunks + self.images)),
            max_step_tokens=run.max_step_tokens or LARGEST_PREFILL + most,
            plan=replace(run.plan, compile=compile_mode, mixed_tokens=[]),
        )

    def needs(self, device: Device) -> str:
        if device.simulated:
            raise UserError(
                f"task={self.name} on a simulated NPU would time the interpreter. Use backend=inductor, or an NPU; "
                "task=verify and task=roofline model an NPU's times."
            )
        return self.RANKS


@dataclass
class BenchOptions(TimedOptions):
    """task=bench: first token and decode of each case.

    `neighbours`: each engine takes a second turn beside as many processes that each keep a core busy.
    `mistralrs`, `llamacpp`, `openvino`: the Pythons of the environments of these peers.
    """

    name: str = "bench"
    repetitions: int = 3
    neighbours: int = 0
    # A name of another engine or of one of its settings, or a list of names.
    peers: Any = field(default_factory=list)
    mistralrs: str = ".venv/mistralrs/bin/python"
    llamacpp: str = ".venv/llamacpp/bin/python"
    openvino: str = ".venv/openvino/bin/python"

    def settings(self) -> list[Setting]:
        """The settings that peers= selects. Raises UserError for an engine that is unknown or not installed."""
        return settings_of(self.peers if isinstance(self.peers, list) else [self.peers], self.pythons())

    def pythons(self) -> dict[str, Path]:
        """The Python of each peer that runs in an environment of its own."""
        return {peer: Path(getattr(self, peer)).expanduser() for peer in ENVIRONMENTS}

    def check(self) -> None:
        super().check()
        at_least("task.repetitions", self.repetitions, 1)
        at_least("task.neighbours", self.neighbours, 0)
        if self.settings() and self.cached:
            raise UserError("task.cached= and peers=: other engines compute their whole prompts. Drop one of them.")


@dataclass
class ProfileOptions(TimedOptions):
    """task=profile: where the time of one batch goes. `level` and `aic_metrics` are options of torch_npu.profiler."""

    name: str = "profile"
    new_tokens: int = 9
    level: int = 1
    aic_metrics: str = "PipeUtilization"

    def check(self) -> None:
        super().check()
        one_of("task.level", self.level, PROFILER_LEVELS)
        one_of("task.aic_metrics", self.aic_metrics, AIC_METRICS)
        if len(self.batch_sizes) > 1 or len(self.lengths) > 1:
            raise UserError(
                "task=profile records one batch: give one of batch_sizes= and one of lengths=, or sweep with -m."
            )


@dataclass
class RooflineOptions(WorkloadOptions):
    """task=roofline: floors computed from shapes. `measured`: a session of task=bench to compare with."""

    name: str = "roofline"
    new_tokens: int = 128
    measured: str | None = None

    def needs(self, device: Device) -> str:
        return self.MODEL

    def prepared(self, run: Run) -> Run:
        return _without_weights(run)


@dataclass
class VerifyOptions(TaskOptions):
    """task=verify: lower the graphs for an NPU and check them, without a device. weights= is optional."""

    name: str = "verify"

    def needs(self, device: Device) -> str:
        return self.MODEL

    def prepared(self, run: Run) -> Run:
        backend = replace(run.backend, name="torchair") if run.backend.name == "auto" else run.backend
        return _without_weights(replace(run, backend=backend, device="npu-sim" if run.device == "auto" else run.device))


@dataclass
class WarmupOptions(TaskOptions):
    """task=warmup: compile every bucket of the plan into the graph store."""

    name: str = "warmup"

    def needs(self, device: Device) -> str:
        """RANKS where ranks compile their own graphs; otherwise MODEL, since shapes are enough."""
        return self.RANKS if device.compiles_on_rank else self.MODEL


@dataclass
class CacheOptions(TaskOptions):
    """task=cache: list, verify or prune the graph store."""

    name: str = "cache"
    action: str = "list"
    max_age_days: float | None = None
    max_gb: float | None = None

    def check(self) -> None:
        one_of("task.action", self.action, ("list", "verify", "prune"))

    def needs(self, device: Device) -> str:
        return self.NOTHING


@dataclass
class CollectOptions(TaskOptions):
    """task=collect: pack an earlier run's logs, graphs and profiles. `folder`: its folder; None: the newest run's."""

    name: str = "collect"
    folder: str | None = None

    def needs(self, device: Device) -> str:
        return self.NOTHING


@dataclass
class CompareOptions(TaskOptions):
    """task=compare: two sessions of task=bench, `a` before and `b` after."""

    name: str = "compare"
    a: str | None = None
    b: str | None = None
    across_hardware: bool = False

    def needs(self, device: Device) -> str:
        return self.NOTHING


@dataclass
class TrainTinyOptions(TaskOptions):
    """task=train_tiny: train the tiny model for `steps` steps in `folder`."""

    name: str = "train_tiny"
    folder: str | None = None
    steps: int = 8000

    def needs(self, device: Device) -> str:
        return self.NOTHING


TASKS: dict[str, type[TaskOptions]] = {
    options().name: options
    for options in (
        GenerateOptions,
        EvaluateOptions,
        BenchOptions,
        ProfileOptions,
        RooflineOptions,
        VerifyOptions,
        WarmupOptions,
        CacheOptions,
        CollectOptions,
        CompareOptions,
        QuantizeOptions,
        ServeOptions,
        BatchOptions,
        ChatOptions,
        TrainTinyOptions,
    )
}


def _without_weights(run: Run) -> Run:
    """The run with weights=meta if no weights are given."""
    return replace(run, weights=SHAPES_ONLY) if run.weights is None and run.model.weights is None else run
