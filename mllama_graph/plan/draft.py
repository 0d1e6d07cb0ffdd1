"""The run of the model that proposes tokens for another one (speculate=draft)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mllama_graph.core.config import ModelChoice, PlanChoice, Run
from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import Fields
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.shape import LLAMA, ModelShape, llama_shape_of
from mllama_graph.plan.checkpoint import checkpoint_folder, model_of

MLLAMA = "mllama"

if TYPE_CHECKING:
    from mllama_graph.plan.resolve import ResolvedRun, ResolvedTask


def draft_of(run: Run, shape: ModelShape, resolve: Callable[..., "ResolvedTask"]) -> "ResolvedRun":
    """The draft's run: its own weights on one rank, in the dtype they are stored in, with the limits of the other.

    Raises UserError where it can't be loaded, or has other ids or tiles than the model, whose shape is given.
    """
    folder = checkpoint_folder(str(run.draft), "draft")
    # A draft's prompts delay nobody's tokens but those that wait for its proposals anyway.
    plan = PlanChoice(run.plan.page_size, mixed_tokens=[], compile=run.plan.compile)
    own = replace(run, model=ModelChoice(), weights=run.draft, adapter=None, quant="none", tp=1, plan=plan)
    own = replace(own, draft=None, speculate="none")
    try:
        return cast("ResolvedRun", resolve(own, None, lambda own: _model_of(own, folder, shape)))
    except UserError as error:
        raise UserError(f"draft={run.draft}: {error}") from error


def _model_of(run: Run, folder: Path, shape: ModelShape) -> tuple[ModelShape, CheckpointFiles | None]:
    """A draft's shape and checkpoint: a text-only Llama or an mllama. `shape`: of the model that it proposes for.

    Raises UserError where it is neither, or has other ids or tiles.
    """
    kind = Fields.of(folder / "config.json").values.get("model_type", MLLAMA)
    if kind not in (LLAMA, MLLAMA):
        raise UserError(f"config.json has model_type={kind!r}. Use a draft of type {LLAMA!r} or {MLLAMA!r}.")
    files: CheckpointFiles | None = None
    if kind == LLAMA:
        files = CheckpointFiles(folder, shape_of=llama_shape_of)
        found = files.shape
        # One that was resized may have the rows of the model's embedding, of which some are of no text.
        equal: dict[str, tuple[int, tuple[int, ...]]] = {
            "ids": (found.text.vocab, (shape.text.vocab, shape.embeddings))
        }
    else:
        found, files = model_of(run)
        equal = {
            "ids": (found.text.vocab, (shape.text.vocab,)),
            "as the id of an image": (found.image_token, (shape.image_token,)),
            "pixels as the side of a tile": (found.vision.tile, (shape.vision.tile,)),
            "tiles": (found.vision.max_tiles, (shape.vision.max_tiles,)),
        }
    for what, (given, needed) in equal.items():
        if given not in needed:
            right = " or ".join(map(str, dict.fromkeys(needed)))
            shared = "tokenizer" if kind == LLAMA else "tokenizer and tiles"
            raise UserError(f"it has {given} {what}, where the model needs {right}. Use one with its {shared}.")
    return found, files
