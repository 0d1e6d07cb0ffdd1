"""Resolves a `Run` (the configuration) into a `ResolvedRun` (all decisions), once, before any rank exists. No torch.

Errors in the configuration, the model, the files or the devices are reported here. Nothing below launch/ sees a `Run`.
"""

import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mllama_graph import native
from mllama_graph.core import cann, devices
from mllama_graph.core.config import PlanChoice, Run, TaskOptions, unused
from mllama_graph.core.devices import CPU, DEVICES, Device
from mllama_graph.core.dtypes import BYTES, PAGE_BYTES, Precision
from mllama_graph.core.errors import UserError
from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.core.paths import in_package, store_folder
from mllama_graph.core.place import Place
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.formats import Storage, page_bytes
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.buckets import Plan
from mllama_graph.plan.checkpoint import META, ModelOf, formats_of, model_of, weights_of
from mllama_graph.plan.draft import draft_of
from mllama_graph.plan.forms import BucketForms, forms_of
from mllama_graph.plan.make import Limits, make_plan
from mllama_graph.plan.memory import Memory, memory, require_on_host
from mllama_graph.plan.quantised import compiler_choice, on_device

# Kinds of CPU kernels: native C++, or plain torch as the backend compiles it.
NATIVE, PLAIN = "native", "plain"
# Random weights count as a checkpoint stored in this dtype.
RANDOM_DTYPE = "bf16"
# The least number of images per request that a plan holds if max_images is not given.
DEFAULT_MAX_IMAGES = 4


@dataclass(frozen=True)
class ResolvedTask:
    """The resolved configuration of any task. `asked`: the configuration as given, for result.json and manifests."""

    asked: dict[str, Any]
    options: TaskOptions
    needs: str
    output_dir: Path
    store_folder: Path
    seed: int

    @property
    def task(self) -> str:
        """The task's name."""
        return self.options.name


@dataclass(frozen=True)
class Defaults:
    """Defaults and limits of a request's options."""

    max_new: int
    max_input: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """The prompt and images given on the command line, or the file of requests that is served instead."""

    prompt: str | None
    image: Any
    system: str | None
    requests: Path | None
    resume: bool
    # Used by a run that gives neither prompt nor image; from the model's configuration.
    default_prompt: str | None
    default_image: str | None


@dataclass(frozen=True)
class ResolvedRun(ResolvedTask):
    """The resolved configuration of a task that needs a model. Ranks, graphs and tasks read only this."""

    model: str
    # The shapes from conf/model/, in the form of config.json; None where only the checkpoint gives them.
    model_config: dict[str, Any] | None
    # The checkpoint's files; None for random weights and for shapes alone.
    checkpoint: CheckpointFiles | None
    only_shapes: bool
    shape: ModelShape
    device: Device
    backend: str
    kernels: str
    collectives: str
    # The compiler's options, sorted by name, and environment variables to set before torch is imported.
    compiler_options: tuple[tuple[str, Any], ...]
    environment: tuple[tuple[str, str], ...]
    precision: Precision
    # kv= as given; precision.kv is what it is resolved to.
    kv: str
    # Bytes of what is stored in it, and the formats of quantised layers.
    storage: Storage
    # What to say about formats and unused keys, and about the device's software, before weights are loaded.
    format_notes: tuple[str, ...]
    device_notes: tuple[str, ...]
    limits: Limits
    plan_choice: PlanChoice
    plan: Plan
    # How an NPU's decode steps attend to pages.
    forms: BucketForms
    # What each rank will allocate.
    memory: Memory
    memory_gib: float | None
    compile_mode: str
    reuse: float
    candidates: int
    tp: int
    # The name of the ranks' shared memory segment.
    segment: str
    threads: int | None
    deterministic: bool
    prefix_cache: bool
    overlap: bool
    speculate: str
    # The run of speculate=draft's own model, on rank 0.
    draft: "ResolvedRun | None"
    timeout: float
    defaults: Defaults
    question: Question
    hardware: HardwareChoice

    def planned(self, batch: int, images: int) -> Plan:
        """The plan for another batch size, where every request has `images` images."""
        choice = replace(self.plan_choice, decode_batch=None, num_pages=None, num_images=max(batch * images, 1))
        limits = replace(self.limits, batch=batch, max_images=max(images, 1))
        return make_plan(choice, limits, self.shape, self.device.paging, self.plan.lengths_are_free)


def resolve(run: Run, place: Place | None, model_of: ModelOf = model_of) -> ResolvedTask:
    """Resolve a run that `check` has accepted. `place` is this process's place if torchrun started it. model_of: opens
    the model.

    Raises UserError with the value, the rule and the remedy.
    """
    run = run.task.prepared(run)
    device = _device(run)
    needs = run.task.needs(device)
    if needs == TaskOptions.NOTHING:
        return ResolvedTask(**_common(run, needs))
    backend = _backend(run, device)
    shape, checkpoint = model_of(run)
    only_shapes = weights_of(run) == META
    if needs == TaskOptions.RANKS:
        _check_ranks(run, device, place, only_shapes)
    precision = device.precision(run.dtype, run.kv, checkpoint.stored if checkpoint else RANDOM_DTYPE)
    _check_pages(device, precision)
    kernels = _kernels(run, device, precision)
    limits = Limits(
        run.batch,
        run.max_input_length,
        run.max_output_length,
        run.max_images or max(DEFAULT_MAX_IMAGES, run.task.images_asked(run)),
        run.max_step_tokens,
        run.speculate_tokens if run.speculate != "none" else 0,
        run.extend_context,
    )
    plan = make_plan(run.plan, limits, shape, device.paging, kernels == NATIVE)
    formats, notes = formats_of(run, shape, checkpoint)
    formats = on_device(formats, run.quant, shape, run.tp, device, precision.compute)
    torchair = compiler_choice(formats, run.backend.torchair, device)
    page = page_bytes(PAGE_BYTES[precision.kv], shape.text.head_width)
    storage = Storage(BYTES[precision.store], BYTES[precision.compute], page, formats)
    needed = memory(shape, plan, storage, run.tp)
    if needs == TaskOptions.RANKS and not only_shapes:
        if device.on_host:
            require_on_host(needed, run.memory_gib, place.local_world if place else run.tp)
        if checkpoint:
            checkpoint.verify()
    named = replace(
        run, device=device.name, kv=precision.kv, backend=replace(run.backend, name=backend, kernels=kernels)
    )
    on_torchair = device.compiles_on_rank
    options = asdict(torchair) if on_torchair else run.backend.inductor
    return ResolvedRun(
        **_common(named, needs),
        model=run.model.name,
        model_config=run.model.config,
        checkpoint=checkpoint,
        only_shapes=only_shapes,
        shape=shape,
        device=device,
        backend=backend,
        kernels=kernels,
        collectives=_collectives(run, device, place),
        compiler_options=tuple(sorted(options.items())),
        environment=tuple(run.backend.environment.items()) if on_torchair else (),
        precision=precision,
        kv=run.kv,
        storage=storage,
        format_notes=notes + unused(run),
        device_notes=cann.notes(cann.installed()) if needs == TaskOptions.RANKS and device.uses_cann else (),
        limits=limits,
        plan_choice=run.plan,
        plan=plan,
        forms=forms_of(run.backend.torchair, device, shape, storage, run.tp, run.hardware, plan),
        memory=needed,
        memory_gib=run.memory_gib,
        # A deterministic run waits for graphs that are missing, so that no step ever runs uncompiled.
        compile_mode="wait" if run.deterministic and run.plan.compile == "background" else run.plan.compile,
        reuse=1.0 if run.deterministic else run.plan.reuse,
        candidates=(candidates := device.candidates if run.plan.candidates is None else run.plan.candidates),
        tp=run.tp,
        segment=f"mllama_graph-{os.getpid()}-{secrets.token_hex(4)}",
        threads=run.threads,
        deterministic=run.deterministic,
        # Where lengths are not free, the split of a prompt changes the order of sums.
        prefix_cache=run.prefix_cache and not (run.deterministic and not plan.lengths_are_free),
        overlap=device.overlap(run.overlap, candidates, run.speculate),
        speculate=run.speculate,
        draft=draft_of(run, shape, resolve) if run.draft and needs == TaskOptions.RANKS else None,
        timeout=run.timeout,
        hardware=run.hardware,
        defaults=Defaults(run.max_output_length, run.max_input_length, run.temperature, run.top_p, run.top_k, run.seed),
        question=Question(
            run.prompt,
            run.image,
            run.system,
            Path(run.requests).expanduser() if run.requests else None,
            run.resume,
            run.model.prompt,
            in_package(run.model.image),
        ),
    )


def on_other_weights(run: ResolvedRun, checkpoint: CheckpointFiles | None) -> ResolvedRun:
    """The run on unquantised weights of the same shape, its pages in the dtype of activations.

    Raises UserError where this host's memory can't hold them.
    """
    precision = replace(run.precision, kv=run.precision.compute)
    page = page_bytes(PAGE_BYTES[precision.kv], run.shape.text.head_width)
    storage = replace(run.storage, page=page, formats=())
    needed = memory(run.shape, run.plan, storage, run.tp)
    if run.device.on_host:
        require_on_host(needed, run.memory_gib, run.tp)
    return replace(run, checkpoint=checkpoint, precision=precision, storage=storage, format_notes=(), memory=needed)


def _common(run: Run, needs: str) -> dict[str, Any]:
    assert run.output_dir is not None, "set by the command line"
    return {
        "asked": asdict(run),
        "options": run.task,
        "needs": needs,
        "output_dir": Path(run.output_dir),
        "store_folder": store_folder(run.graph_cache),
        "seed": run.seed,
    }


def _device(run: Run) -> Device:
    """The device of device=. auto: a device that the backend compiles for, simulated where this machine has none."""
    if run.device != "auto":
        return DEVICES[run.device]
    found = devices.detect()
    if run.backend.name in ("auto", *found.backends):
        return found
    fitting = [device for device in DEVICES.values() if run.backend.name in device.backends]
    return next((device for device in fitting if device.simulated), CPU)


def _backend(run: Run, device: Device) -> str:
    """The compiler backend. Raises UserError for options that don't fit together or a package that is not installed."""
    name, choice = run.backend.name, run.backend.torchair
    if name not in ("auto", *device.backends):
        if device.compiles_on_rank:
            raise UserError(f"backend={name} does not run on device={device.name}. Use backend={device.backends[0]}.")
        raise UserError(
            f"backend={name} compiles for an NPU, not for device={device.name}. Leave device= out, or use "
            "device=npu or npu-sim."
        )
    device.check_package()
    if run.dtype in device.refused_dtypes:
        raise UserError(
            f"dtype={run.dtype}: attention on an NPU takes 16-bit types only. Use dtype=bf16 or fp16; the simulation "
            "(device=npu-sim) computes the same graphs in fp32."
        )
    if device.simulated and choice.mode != "max-autotune":
        raise UserError(
            f"backend.torchair.mode={choice.mode} captures kernels while they run, and the simulation has none. "
            "Use backend.torchair.mode=max-autotune, or an NPU."
        )
    return device.backends[0] if name == "auto" else name


def _check_pages(device: Device, precision: Precision) -> None:
    """Raises UserError where a device can't read pages of the precision."""
    if device.compiles_on_rank and precision.kv not in (precision.compute, "int8"):
        raise UserError(
            f"kv={precision.kv} on an NPU (device={device.name}): its pages have the dtype of activations, here "
            f"{precision.compute}, or int8. Use kv=auto or kv=int8."
        )


def _check_ranks(run: Run, device: Device, place: Place | None, only_shapes: bool) -> None:
    """Raises UserError where processes or devices don't suffice for the ranks."""
    if place and place.world != run.tp:
        raise UserError(
            f"{place.world} processes were started for tp={run.tp}. Start tp processes, or set tp={place.world}."
        )
    if only_shapes and device.compiles_on_rank:
        raise UserError(f"weights=meta on {device.name}: graphs are lowered without weights by task=verify.")
    device.check_count(place.local_world if place else run.tp)
    if device.uses_cann:
        cann.require(cann.installed())


def _kernels(run: Run, device: Device, precision: Precision) -> str:
    """native where the device runs our C++ kernels in fp32, and they are built or can be built; plain elsewhere.

    Raises UserError where native kernels are requested and can't run.
    """
    fits, choice = device.native and precision.compute == "fp32", run.backend.kernels
    if choice == NATIVE and not fits:
        raise UserError(
            f"backend.kernels=native with device={device.name} and arithmetic in {precision.compute}: the kernels are "
            "a CPU's, and compute in fp32. Use backend.kernels=auto, or dtype=fp32 on a CPU."
        )
    if choice != "auto":
        return choice
    there = fits and (not native.missing_compiler() or native.built("kernels", store_folder(run.graph_cache)))
    return NATIVE if there else PLAIN


def _collectives(run: Run, device: Device, place: Place | None) -> str:
    """shared_memory between CPU ranks of one host, else distributed. Raises UserError for a choice that can't work."""
    shared = device.native and (place is None or place.one_host)
    if run.collectives == "shared_memory" and not shared:
        raise UserError("collectives=shared_memory serves CPU ranks of one host only. Use collectives=auto.")
    if run.collectives != "auto":
        return run.collectives
    return "shared_memory" if shared else "distributed"
