"""From a Run to its parts: the model, its plan, its processor, the engine. What every task begins with."""

import logging
from typing import Optional

from mllama_graph.plan.buckets import Plan
from mllama_graph.model.checkpoint import Checkpoint, Pixels
from mllama_graph.core.config import Run
from mllama_graph.engine.engine import Engine
from mllama_graph.inputs.processor import CLIP_MEAN, CLIP_STD, Defaults, Processor
from mllama_graph.core.report import Progress
from mllama_graph.engine.scheduler import Sampling, Scheduler
from mllama_graph.model.shape import ModelShape
from mllama_graph.engine.executor import Ranks

log = logging.getLogger(__name__)


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


def start_engine(run: Run, plan: Plan, shape: ModelShape, checkpoint: Optional[Checkpoint], processor: Processor,
                 progress: Progress) -> Engine:
    """Weights in memory, pages allocated, graphs found on first use."""
    progress.say(f"plan: {plan.describe()}")
    if plan.max_length > shape.text.positions:
        log.warning("sequences of up to %d tokens; the model was made for %d", plan.max_length, shape.text.positions)
    ranks = Ranks(run, shape, plan, pixels_of(processor), checkpoint, progress)
    log.info("memory of a rank: %s", ranks.memory.describe())
    return Engine(processor, Scheduler(plan, run.batch), ranks)
