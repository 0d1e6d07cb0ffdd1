"""What a run's model is, and what can be refused at once: no torch here, and no rank has started yet."""

from pathlib import Path
from typing import Optional

from mllama_graph.config import Run, UserError
from mllama_graph.images import list_images
from mllama_graph.place import Place, check_devices
from mllama_graph.shape import ModelShape, differences, read_json, shape_of

PACKAGE = "package:"
# Weights that no checkpoint holds.
MADE_UP = ("random", "meta")


def packaged(value: Optional[str]) -> Optional[str]:
    """A path as it is, or one in this package's folder where it says package:."""
    if value is None or not value.startswith(PACKAGE):
        return value
    return str(Path(__file__).parent / value.removeprefix(PACKAGE))


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


def preflight(run: Run, place: Optional[Place]) -> None:
    """Refuse what is wrong with the model, the files, the devices or the ranks of a run. `place`: see place_from.

    Raises UserError with the value, the rule and the remedy.
    """
    if place and place.world != run.tp:
        raise UserError(f"{place.world} processes were started for tp={run.tp}. Start tp processes, or set tp={place.world}.")
    shape_of_run(run)
    if run.requests is not None and not Path(run.requests).expanduser().is_file():
        raise UserError(f"requests={run.requests} can't be read: there is no such file.")
    if run.requests is None:
        list_images(run.image)
    check_devices(run.device, place.local_world if place else run.tp)
