"""task=quantize: write a quantised checkpoint that this engine and others read, in the layout of compressed-tensors."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, write_json, write_result
from mllama_graph.engine.calibration import Calibration, quantising_with_feedback
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.inputs.request_file import read_lines
from mllama_graph.model.codes import quantise
from mllama_graph.model.compressed import DTYPES, layout, planned, quantization_config, write_weights
from mllama_graph.model.tree import Fill, FillQuantised
from mllama_graph.model.weights import from_checkpoint, quantising, random_fill, whole_config
from mllama_graph.plan.resolve import ResolvedRun, on_other_weights
from mllama_graph.tasks.quantize_options import CALIBRATION, QuantizeOptions

# Files beside the weights that belong to a checkpoint: tokenizer, templates, processor, generation, licence.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*")
TEMPLATES = "additional_chat_templates"
# Files that describe the unquantised weights.
LEFT = ("config.json", "*.index.json", "adapter_config.json", "params.json", "checklist.chk")


def main(run: ResolvedRun) -> None:
    """Quantise the checkpoint, its adapters merged, into task.folder. Memory holds a block of one weight at a time.

    Raises UserError where memory or the disk lacks room, no request of task.calibration can be served, or the folder
    can't be written.
    """
    options, progress, checkpoint = run.options, Progress(), run.checkpoint
    assert isinstance(options, QuantizeOptions) and options.folder
    folder, dtype = Path(options.folder).expanduser(), run.precision.store
    if checkpoint:
        checkpoint.verify()
        fill, config = from_checkpoint(checkpoint), checkpoint.config
    else:
        assert run.model_config is not None, "weights=random takes its shapes from conf/model/"
        config = whole_config(run.shape, {"model_type": "mllama", **run.model_config})
        fill = random_fill(run.shape, run.seed, getattr(torch, DTYPES[dtype][1]))
    formats = run.storage.formats
    files = planned(run.shape, formats, dtype)
    total = sum(weight.bytes for weights in files for weight in weights)
    # Refused here, before the folder is made, where memory can't hold the unquantised weights that gptq serves with.
    served = on_other_weights(run, checkpoint) if options.calibration else None
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_room(folder, total)
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.weights(done, total)

        with torch.inference_mode(), quantiser(run, served, options, fill, progress) as fill_quantised:
            write_weights(folder, files, fill, fill_quantised, report)
        if checkpoint:
            copy_others(checkpoint.folder, folder)
        # Last, so that a folder with config.json is whole.
        key = "dtype" if "dtype" in config else "torch_dtype"
        own = {key: DTYPES[dtype][1], "quantization_config": quantization_config(formats)}
        write_json(folder / "config.json", config | own)
    except BaseException as error:
        remove(folder, made)
        if isinstance(error, OSError):
            raise UserError(f"task.folder={folder} can't be written: {error.strerror}.") from error
        raise
    form = formats[0][1]
    print(f"{folder}: {total / 1e9:.3f} GB in {len(files)} files, {layout(form)}, {form.bits} bits", flush=True)
    write_result(
        run.output_dir,
        run.asked,
        metrics={"bytes": total, "files": len(files), "layers": len(formats), "format": layout(form)},
    )


@contextlib.contextmanager
def quantiser(
    run: ResolvedRun, served: ResolvedRun | None, options: QuantizeOptions, fill: Fill, progress: Progress
) -> Iterator[FillQuantised]:
    """What chooses the codes of a weight, as task.rounding= says; with gptq, an engine of `served` answers requests."""
    scale_dtype = getattr(torch, DTYPES[run.precision.store][1])
    if options.calibration is None or served is None:
        yield quantising(fill, partial(quantise, scale_dtype=scale_dtype))
        return
    path = Path(options.calibration).expanduser()
    # Graphs are not compiled: the operations record their inputs.
    plain = replace(served, backend="eager")
    engine = start_engine(plain, processor_of(plain), Progress())
    try:
        lines = list(read_lines(path, CALIBRATION))
        calibration = Calibration(engine, run.storage.formats, lines, path.parent, progress)
        yield quantising_with_feedback(fill, calibration.factor, scale_dtype)
    finally:
        engine.close()


def require_room(folder: Path, total: int) -> None:
    """Raises UserError where the disk of a folder lacks room."""
    free = shutil.disk_usage(folder).free
    if free < total:
        raise UserError(
            f"task.folder={folder} needs {total / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. "
            "Choose a folder on another disk."
        )


def copy_others(source: Path, folder: Path) -> None:
    """Copy what belongs to a checkpoint besides its weights."""
    left = {path for pattern in LEFT for path in source.glob(pattern)}
    for path in {path for pattern in COPIED for path in source.glob(pattern)} - left:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)


def remove(folder: Path, whole: bool) -> None:
    """Remove what was written to a folder that was empty; `whole`: the folder too."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if whole and folder.is_dir():
        folder.rmdir()
