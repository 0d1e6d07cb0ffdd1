"""Starts the engine in this process on a checkpoint folder, serves requests and inspects its state."""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mllama_graph.core.config import BackendChoice, PlanChoice, Run, with_task_keys
from mllama_graph.core.report import Progress
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Result
from mllama_graph.engine.start import pixels_of, processor_of, start_engine
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.inputs import Pages
from mllama_graph.model.placement import Placement
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.tree import Weights, build
from mllama_graph.model.weights import from_checkpoint
from mllama_graph.plan.resolve import ResolvedRun, resolve

GRAPH_SPEC = "no_template"
# One bucket of each kind: vision, and prefill and decode, both with and without images.
GRAPH_PLAN = {
    "batch": 4,
    "page_size": 16,
    "prefill_tokens": [32],
    "decode_batch": [4],
    "pages": [6],
    "images": [2],
    "max_images": 2,
    "max_input_length": 60,
    "max_output_length": 30,
    # Steps that follow no measured times, so that each run has the same ones.
    "max_step_tokens": 128,
    "dtype": "fp32",
    "threads": 1,
    "kernels": "native",
}
GRAPHS = 5
CPU = Placement.at(torch.device("cpu"))


def arguments(changes: dict[str, Any]) -> list[str]:
    """`changes` of `run_of` as command-line arguments."""
    inside = {f.name for f in fields(PlanChoice)}

    def group(name: str) -> str:
        return "plan." if name in inside else "backend." if name == "kernels" else ""

    return [f"{group(name)}{name}={value}".replace(" ", "") for name, value in changes.items()]


def run_of(folder: Path, **changes: Any) -> Run:
    """A Run on a checkpoint, by default eager, in fp32 and without kernels. Fields of PlanChoice go to its plan."""
    plan = PlanChoice(**{f.name: changes.pop(f.name) for f in fields(PlanChoice) if f.name in changes})
    backend = BackendChoice(changes.pop("backend", "eager"), changes.pop("kernels", "plain"))
    limits = {"max_input_length": 300, "max_output_length": 100, "max_images": 4, "dtype": "fp32", "output_dir": "."}
    return Run(weights=str(folder), backend=backend, plan=plan, **(limits | changes))


def resolved(run: Run) -> ResolvedRun:
    """The ResolvedRun of a task that needs a model."""
    found = resolve(with_task_keys(run), None)
    assert isinstance(found, ResolvedRun)
    return found


def start(folder: Path, **changes: Any) -> Engine:
    """An engine on a checkpoint; `changes` as in `run_of`."""
    return start_run(resolved(run_of(folder, **changes)))


def start_run(run: ResolvedRun) -> Engine:
    """The engine of a resolved run; `said` returns its progress messages."""
    return start_engine(run, processor_of(run), Progress(io.StringIO()))


def said(engine: Engine) -> str:
    """The progress messages of an engine."""
    return engine.executor.graphs.say.__self__._stream.getvalue()


def serve(engine: Engine, lines: list[dict]) -> dict[Any, Result]:
    """Submit all lines of a requests file at once and serve them; id -> result."""
    results = {}
    for line in lines:
        engine.submit(engine.processor.request(line))
    engine.run(lambda delta: results.setdefault(delta.id, delta.result) if delta.result else None)
    return results


def tokens_of(engine: Engine, lines: list[dict]) -> dict[Any, list[int]]:
    """id -> generated ids."""
    return {id: result.token_ids for id, result in serve(engine, lines).items()}


def holds_nothing(engine: Engine) -> bool:
    """Whether every page is free or belongs to an idle image, and the engine keeps no request."""
    scheduler = engine.scheduler
    idle = sum(len(image.pages) for image in scheduler.images._idle.values())
    return (
        scheduler.pool.free == scheduler.pool.capacity
        and not scheduler.images._used
        and not engine._running
        and not engine._unread
        and scheduler.images.pool.free + idle == scheduler.images.pool.capacity
    )


@dataclass(frozen=True)
class Model:
    """A checkpoint's weights in fp32, without engine or pages."""

    weights: Weights
    shape: ModelShape

    def pages(self, count: int, page_size: int, layers: int) -> Pages:
        """Pages of zeros for `layers` layers."""
        text = self.shape.text
        size = (count, page_size, text.kv_heads, text.head_width)
        return tuple((torch.zeros(size), torch.zeros(size)) for _ in range(layers))


def load_model(folder: Path) -> Model:
    """The weight tree of a checkpoint in fp32."""
    run = resolved(run_of(folder))
    return Model(build_weights(CheckpointFiles(folder), pixels_of(processor_of(run))), run.shape)


def build_weights(files: CheckpointFiles, pixels: Any, dtype: torch.dtype = torch.float32) -> Weights:
    """The weight tree of a checkpoint on the CPU."""
    return build(files.shape, pixels, dtype, CPU, from_checkpoint(files), lambda count: None)
