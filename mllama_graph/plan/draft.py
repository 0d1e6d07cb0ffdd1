"""The run of the model that proposes tokens for another one (speculate=draft)."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from mllama_graph.core.config import ModelChoice, PlanChoice, Run
from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.checkpoint import checkpoint_folder

if TYPE_CHECKING:
    from mllama_graph.plan.resolve import ResolvedRun, ResolvedTask


def draft_of(run: Run, shape: ModelShape, resolve: Callable[..., "ResolvedTask"]) -> "ResolvedRun":
    """The draft's run: its own weights on one rank, in the dtype they are stored in, with the limits of the other.

    Raises UserError where it can't be loaded, or has other ids or tiles than the model, whose shape is given.
    """
    checkpoint_folder(str(run.draft), "draft")
    # A draft's prompts delay nobody's tokens but those that wait for its proposals anyway.
    plan = PlanChoice(run.plan.page_size, mixed_tokens=[], compile=run.plan.compile)
    own = replace(run, model=ModelChoice(), weights=run.draft, adapter=None, quant="none", tp=1, plan=plan)
    try:
        found = cast("ResolvedRun", resolve(replace(own, draft=None, speculate="none"), None))
    except UserError as error:
        raise UserError(f"draft={run.draft}: {error}") from error
    draft = found.shape
    for what, given, needed in (
        ("ids", draft.text.vocab, shape.text.vocab),
        ("as the id of an image", draft.image_token, shape.image_token),
        ("pixels as the side of a tile", draft.vision.tile, shape.vision.tile),
        ("tiles", draft.vision.max_tiles, shape.vision.max_tiles),
    ):
        if given != needed:
            raise UserError(
                f"draft={run.draft} has {given} {what}, the model {needed}. Use a draft with the model's tokenizer and "
                "tiles."
            )
    return found
