"""From a Run to its parts: the model, its plan, its processor, the engine. What every task begins with."""

import logging
from pathlib import Path
from typing import Optional

from mllama_graph.buckets import Plan, make_plan
from mllama_graph.checkpoint import Checkpoint, Pixels
from mllama_graph.config import Run, UserError
from mllama_graph.engine import Engine
from mllama_graph.processor import CLIP_MEAN, CLIP_STD, Defaults, Processor
from mllama_graph.rank import Rank
from mllama_graph.report import Progress
from mllama_graph.scheduler import Sampling, Scheduler
from mllama_graph.shape import ModelShape, differences, shape_of

log = logging.getLogger(__name__)

# Images of one request that a plan holds unless max_images says otherwise.
DEFAULT_MAX_IMAGES = 4


PACKAGE = "package:"


def packaged(value: Optional[str]) -> Optional[str]:
    """A path as it is, or one in this package's folder where it says package:."""
    if value is None or not value.startswith(PACKAGE):
        return value
    return str(Path(__file__).parent / value.removeprefix(PACKAGE))


def model_of(run: Run) -> tuple[ModelShape, Optional[Checkpoint]]:
    """The model's shape, and its checkpoint unless the weights are random.

    Raises UserError where weights= and model= don't fit each other.
    """
    expected = shape_of({"model_type": "mllama", **run.model.config}) if run.model.config else None
    weights = packaged(run.model.weights) if run.weights is None else run.weights
    if weights is None:
        raise UserError("weights= is not given. Use weights=/path/to/checkpoint, or model=11b weights=random.")
    if weights in ("random", "meta"):
        if expected is None:
            raise UserError(f"model={run.model.name} takes its shapes from a checkpoint, which weights={weights} lacks. "
                            "Use model=11b or model=90b.")
        return expected, None
    checkpoint = Checkpoint(Path(weights).expanduser())
    if expected and (differing := differences(expected, checkpoint.shape)):
        raise UserError(f"{weights} is not model={run.model.name}: {'; '.join(differing[:4])}"
                        f"{' ...' if len(differing) > 4 else ''}. Use model=custom.")
    return checkpoint.shape, checkpoint


def processor_of(run: Run, shape: ModelShape, checkpoint: Optional[Checkpoint]) -> Processor:
    """The processor with the run's defaults."""
    sampling = Sampling(run.temperature, run.top_p, run.top_k, run.seed)
    return Processor(checkpoint.folder if checkpoint else None, shape,
                     Defaults(run.max_output_length, run.max_input_length, sampling))


def pixels_of(processor: Processor) -> Pixels:
    """The normalisation that the checkpoint's image processor states."""
    config = processor.image_config
    if config.get("do_normalize") is False:
        return Pixels(float(config.get("rescale_factor", 1 / 255)), (0.0,) * 3, (1.0,) * 3)
    return Pixels(float(config.get("rescale_factor", 1 / 255)), tuple(config.get("image_mean", CLIP_MEAN)),
                  tuple(config.get("image_std", CLIP_STD)))


def plan_of(run: Run, shape: ModelShape, images: int = 0) -> Plan:
    """The plan of a run whose requests hold up to `images` images, as far as that is known."""
    return make_plan(run, shape, run.max_images or max(DEFAULT_MAX_IMAGES, images))


def start_engine(run: Run, plan: Plan, shape: ModelShape, checkpoint: Optional[Checkpoint], processor: Processor,
                 progress: Progress) -> Engine:
    """Weights in memory, pages allocated, graphs found on first use."""
    if run.weights == "meta":
        raise UserError("weights=meta has shapes but no values, so nothing can be generated. Use weights=random.")
    progress.say(f"plan: {plan.describe()}")
    if plan.max_length > shape.text.positions:
        log.warning("sequences of up to %d tokens; the model was made for %d", plan.max_length, shape.text.positions)
    rank = Rank(run, shape, plan, pixels_of(processor), checkpoint, progress)
    log.info("memory: %s", rank.memory.describe())
    return Engine(processor, Scheduler(plan, run.batch), rank)
