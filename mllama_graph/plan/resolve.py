"""What a run's model, plan and memory are, and what can be refused at once: no torch here, and no rank has started yet."""

import importlib.util
import os
from pathlib import Path
from typing import Optional

from safetensors import SafetensorError, safe_open

from mllama_graph import native
from mllama_graph.plan.buckets import Plan, make_plan
from mllama_graph.core.config import Run, UserError
from mllama_graph.inputs.images import list_images
from mllama_graph.measure.peers import settings_of
from mllama_graph.core.place import Place, check_devices, device_of
from mllama_graph.plan.cost import Memory, memory, require
from mllama_graph.model.shape import ModelShape, differences, read_json, shape_of
from mllama_graph.graphs.store import store_folder

PACKAGE = "package:"
# Weights that no checkpoint holds.
MADE_UP = ("random", "meta")
# Images of one request that a plan holds unless max_images says otherwise.
DEFAULT_MAX_IMAGES = 4
# What a process takes beside weights, pages and workspace: torch and the compiled graphs.
PROCESS_BYTES = 400_000_000
NPUS = ("npu", "npu-sim")
# Names of safetensors, ours, and bytes.
STORED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}


def packaged(value: Optional[str]) -> Optional[str]:
    """A path as it is, or one in this package's folder where it says package:."""
    if value is None or not value.startswith(PACKAGE):
        return value
    return str(Path(__file__).parents[1] / value.removeprefix(PACKAGE))


def weights_of(run: Run) -> str:
    """Where a run's weights come from: random, meta, or a folder. Raises UserError where nothing says so."""
    weights = packaged(run.model.weights) if run.weights is None else run.weights
    if weights is None:
        raise UserError("weights= is not given. Use weights=/path/to/checkpoint, or model=11b weights=random.")
    return weights


def checkpoint_folder(weights: str) -> Path:
    """The folder of a checkpoint. Raises UserError where there is none."""
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        raise UserError(f"weights={folder} is not a folder. Give a Hugging Face checkpoint folder, or "
                        "weights=random to run on random weights.")
    return folder


def shape_of_run(run: Run) -> ModelShape:
    """The model's shape. Raises UserError where weights= and model= don't fit each other, or tp= the model."""
    expected = shape_of({"model_type": "mllama", **run.model.config}) if run.model.config else None
    weights = weights_of(run)
    if weights in MADE_UP:
        if expected is None:
            raise UserError(f"model={run.model.name} takes its shapes from a checkpoint, which weights={weights} lacks. "
                            "Use model=11b or model=90b.")
        shape = expected
    else:
        shape = shape_of(read_json(checkpoint_folder(weights) / "config.json"))
        if expected and (differing := differences(expected, shape)):
            raise UserError(f"{weights} is not model={run.model.name}: {'; '.join(differing[:4])}"
                            f"{' ...' if len(differing) > 4 else ''}. Use model=custom.")
    shape.check_ranks(run.tp)
    return shape


def plan_of(run: Run, shape: ModelShape, images: int = 0) -> Plan:
    """The plan of a run whose requests hold up to `images` images, as far as that is known."""
    return make_plan(run, shape, run.max_images or max(DEFAULT_MAX_IMAGES, images))


def precision(dtype: str, device: str, stored: str) -> tuple[str, str]:
    """What dtype= means on a device: what weights are kept in, and what is computed and paged in.

    auto is the checkpoint's dtype on an accelerator. On a CPU the weights stay as they are stored and are computed in
    fp32: few CPUs multiply bf16 or fp16 faster than fp32, all read it faster. An NPU's attention takes no fp32.
    """
    if dtype != "auto":
        return dtype, dtype
    if device in NPUS and stored == "fp32":
        stored = "bf16"
    return stored, "fp32" if device == "cpu" else stored


def memory_of(run: Run, shape: ModelShape, plan: Plan, device: str, stored: str) -> Memory:
    """What each rank of a run will allocate."""
    return memory(shape, plan, *(WIDTH[name] for name in precision(run.dtype, device, stored)), run.tp)


def require_on_host(needed: Memory, run: Run, ranks: int) -> None:
    """Raises UserError where this host's memory does not hold `ranks` ranks."""
    if run.memory_gib is not None:
        available, where = int(run.memory_gib * 2**30), f"memory_gib={run.memory_gib:g}"
    else:
        available, where = host_memory()
    require(needed, available - ranks * PROCESS_BYTES, where, ranks)


def host_memory() -> tuple[int, str]:
    """Bytes that this host has to give, and where the figure comes from."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024, "MemAvailable"
    except (OSError, KeyError):
        return physical_memory(), "physical memory"


def physical_memory() -> int:
    """Bytes that this host has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def stored_in(weights: str) -> str:
    """What a run's weights are stored in; random ones are a bf16 checkpoint's. What can't be read is told later."""
    if weights in MADE_UP:
        return "bf16"
    try:
        with safe_open(min(checkpoint_folder(weights).glob("*.safetensors")), framework="np") as file:
            return STORED.get(file.get_slice(min(file.keys())).get_dtype(), "bf16")
    except (SafetensorError, OSError, ValueError):
        return "bf16"


def refuse_what_is_not_built(run: Run) -> None:
    """Raises UserError for what has its place in the configuration and nothing behind it."""
    if run.quant != "none":
        raise UserError(f"quant={run.quant}: quantisation is not built yet. Use quant=none.")


def settle_npu(run: Run) -> None:
    """Fill in device= and backend= where they mean an NPU: a real one, or a simulated one where there is none.

    Raises UserError for what does not go together.
    """
    if run.task.name == "verify":
        _settle_verify(run)
    if run.device == "auto" and run.backend.name in ("auto", "torchair"):
        found = device_of("auto")
        if run.backend.name == "torchair":
            found = "npu" if found == "npu" else "npu-sim"
        run.device = found if found in NPUS else "auto"
    on_npu = run.device in NPUS
    if run.backend.name == "torchair" and not on_npu:
        raise UserError(f"backend=torchair compiles for an NPU, not for device={run.device}. Leave device= out, or use "
                        "device=npu or npu-sim.")
    if not on_npu:
        return
    if run.backend.name not in ("auto", "torchair"):
        raise UserError(f"backend={run.backend.name} does not run on device={run.device}. Use backend=torchair.")
    run.backend.name = "torchair"
    if not importlib.util.find_spec("torch_npu"):
        raise UserError(f"device={run.device} needs torch_npu, which is not installed. Install it with: "
                        "pip install -e '.[npu]'")
    if run.collectives == "shared_memory":
        raise UserError(f"collectives=shared_memory serves CPU ranks; device={run.device} has its own. Use collectives=auto.")
    if run.dtype == "fp32" and run.device == "npu":
        raise UserError("dtype=fp32: attention on an NPU takes 16-bit types only. Use dtype=bf16 or fp16; the simulation "
                        "(device=npu-sim) computes the same graphs in fp32.")
    if run.device == "npu-sim":
        _refuse_what_needs_a_device(run)
    if run.task.ranks and run.weights == "meta":
        raise UserError(f"weights=meta on {run.device}: graphs are lowered without weights by task=verify.")
    # A graph is compiled by the rank that runs it, so warming up takes the ranks.
    run.task.ranks = run.task.ranks or run.task.name == "warmup"


def settle_kernels(run: Run) -> None:
    """Fill in backend.kernels=: native on a CPU that computes in fp32 and has them built, or a C++ compiler.

    Raises UserError where native ones are asked for and can't serve.
    """
    fits = device_of(run.device) == "cpu" and run.dtype in ("auto", "fp32")
    if run.backend.kernels == "native" and not fits:
        raise UserError("backend.kernels=native: the kernels are a CPU's, and compute in fp32. Use backend.kernels=auto.")
    if run.backend.kernels == "auto":
        there = fits and (not native.lack() or native.built("kernels", store_folder(run)))
        run.backend.kernels = "native" if there else "plain"


def _settle_verify(run: Run) -> None:
    """Graphs are verified without a device, and without weights where none are given."""
    if run.backend.name == "auto":
        run.backend.name = "torchair"
    if run.device == "auto":
        run.device = "npu-sim"
    if run.weights is None and run.model.weights is None:
        run.weights = "meta"


def _refuse_what_needs_a_device(run: Run) -> None:
    choice = run.backend.torchair
    if choice.mode != "max-autotune":
        raise UserError(f"backend.torchair.mode={choice.mode} captures kernels while they run, and the simulation has none. "
                        "Use backend.torchair.mode=max-autotune, or an NPU.")
    if choice.weight_format != "nd":
        raise UserError(f"backend.torchair.weight_format={choice.weight_format}: only an NPU casts weights to its own "
                        "tiles. Use backend.torchair.weight_format=nd.")


def preflight(run: Run, place: Optional[Place]) -> None:
    """Refuse what is wrong with the model, the files, the devices or the ranks of a run. `place`: see place_from.

    Raises UserError with the value, the rule and the remedy.
    """
    if place and place.world != run.tp:
        raise UserError(f"{place.world} processes were started for tp={run.tp}. Start tp processes, or set tp={place.world}.")
    shape, weights, ranks = shape_of_run(run), weights_of(run), place.local_world if place else run.tp
    if run.requests is not None and not Path(run.requests).expanduser().is_file():
        raise UserError(f"requests={run.requests} can't be read: there is no such file.")
    images = list_images(run.image) if run.requests is None else ()
    if settings_of(run) and run.task.name != "bench":
        raise UserError(f"peers={','.join(run.peers)}: only task=bench measures other engines. Add task=bench, or leave peers= out.")
    check_devices(run.device, ranks)
    plan, device = plan_of(run, shape, len(images)), device_of(run.device)
    if weights != "meta" and device in ("cpu", "npu-sim"):
        require_on_host(memory_of(run, shape, plan, device, stored_in(weights)), run, ranks)
