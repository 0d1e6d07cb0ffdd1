"""Resolves weights=, model=, adapter= and quant= into a model's shape, checkpoint and formats. No torch."""

from collections.abc import Callable
from pathlib import Path

from mllama_graph.core.config import Run
from mllama_graph.core.errors import UserError
from mllama_graph.core.paths import in_package
from mllama_graph.model.adapter import read_adapters
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.formats import Formats, chosen
from mllama_graph.model.meta_files import open_checkpoint
from mllama_graph.model.shape import ModelShape, differences, shape_of

# Opens a run's model: its shape, and its checkpoint unless weights= is random or meta.
ModelOf = Callable[[Run], tuple[ModelShape, CheckpointFiles | None]]
# Values of weights= that need no checkpoint: random values, or shapes without values.
RANDOM, META = "random", "meta"


def weights_of(run: Run) -> str:
    """The source of a run's weights: random, meta, or a folder. Raises UserError where none is given."""
    weights = in_package(run.model.weights) if run.weights is None else run.weights
    if weights is None:
        raise UserError("weights= is not given. Use weights=/path/to/checkpoint, or model=11b weights=random.")
    return weights


def checkpoint_folder(weights: str, key: str = "weights") -> Path:
    """The folder of a checkpoint. Raises UserError where there is none. `key`: the key that names it."""
    folder = Path(weights).expanduser()
    if folder.is_file():
        raise UserError(f"{key}={folder} is a file. Give the folder that holds it and its config.json.")
    if not folder.is_dir():
        # owner/name is how the Hugging Face hub names a repository.
        hub = weights.count("/") == 1 and not weights.startswith((".", "/", "~"))
        fetch = f" To download it: hf download {weights} --local-dir {folder.name}." if hub else ""
        random = f", or {key}=random to run on random weights" if key == "weights" else ""
        raise UserError(f"{key}={folder} is not a folder. Give a Hugging Face checkpoint folder{random}.{fetch}")
    return folder


def model_of(run: Run) -> tuple[ModelShape, CheckpointFiles | None]:
    """The model's shape, and its checkpoint unless weights= is random or meta.

    Raises UserError where weights=, adapter= and model= don't fit each other, or tp= doesn't fit the model.
    """
    expected = shape_of({"model_type": "mllama", **run.model.config}) if run.model.config else None
    weights, checkpoint = weights_of(run), None
    if weights in (RANDOM, META):
        if expected is None:
            raise UserError(
                f"model={run.model.name} takes its shapes from a checkpoint, which weights={weights} lacks. "
                "Use model=11b, model=90b or model=mid."
            )
        if run.adapter is not None:
            raise UserError(f"adapter={run.adapter} needs the weights it was trained on. Use weights=/path/to/base.")
        shape = expected
    else:
        checkpoint = open_checkpoint(checkpoint_folder(weights), read_adapters(run.adapter))
        shape = checkpoint.shape
        if expected and (differing := differences(expected, shape)):
            raise UserError(
                f"{weights} is not model={run.model.name}: {'; '.join(differing[:4])}"
                f"{' ...' if len(differing) > 4 else ''}. Use model=custom."
            )
    shape.check_ranks(run.tp)
    return shape, checkpoint


def formats_of(run: Run, shape: ModelShape, checkpoint: CheckpointFiles | None) -> tuple[Formats, tuple[str, ...]]:
    """The formats of quantised layers: those of the checkpoint, or those that quant= chooses; and notes on them.

    Raises UserError where both are given, or a format can't hold a layer.
    """
    if checkpoint is None or not checkpoint.quantised:
        return chosen(run.quant, run.quant_group, run.quant_parts, shape, run.tp), ()
    if run.quant != "none":
        raise UserError(
            f"quant={run.quant}: {checkpoint.folder} is quantised already ({checkpoint.quantised}). Leave quant= out "
            "to use it as it is, or give the unquantised checkpoint."
        )
    formats, notes = checkpoint.formats(run.tp)
    return formats, (f"quantised checkpoint: {checkpoint.quantised}", *notes)
