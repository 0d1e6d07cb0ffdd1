"""The run of the model that proposes tokens for another one (speculate=draft)."""

from dataclasses import replace

from mllama_graph.core.config import ModelChoice, PlanChoice, Run
from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import ModelShape


def draft_run(run: Run) -> Run:
    """The draft's run: its own weights on one rank, in the dtype they are stored in, with the limits of the other."""
    plan = PlanChoice(run.plan.page_size, compile=run.plan.compile)
    own = replace(run, model=ModelChoice(), weights=run.draft, adapter=None, quant="none", tp=1, plan=plan)
    return replace(own, draft=None, speculate="none")


def check_draft(run: Run, shape: ModelShape, draft: ModelShape) -> None:
    """Raises UserError where a draft has other ids or other tiles than the model."""
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
