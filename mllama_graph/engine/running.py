"""Requests and steps in progress, as the engine sees them."""

import math
from dataclasses import dataclass, field
from typing import Any

from mllama_graph.engine.constrained import Constraint
from mllama_graph.engine.rank import Launched
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.steps import Step, Token
from mllama_graph.inputs.detokenizer import Detokenizer
from mllama_graph.inputs.request import Request


@dataclass
class Running:
    """A request in progress. Its generated ids are in `sequence`; `count` new ones were given out.

    ahead: what constrains the tokens after each proposed id of the step. alone: whether to propose no ids.

    given: ids that the sequence gets in place of the first sampled ones. These are the request's `forced` ids. Where
    decode steps compute log-probabilities of the prompt, the prompt's `scored` ids after the first come before them.
    `count` begins at -scored.
    """

    request: Request
    sequence: Sequence
    text: Detokenizer
    submitted: float
    constraint: Constraint | None = None
    ahead: list[Constraint] = field(default_factory=list)
    alone: bool = False
    count: int = 0
    proposed: int = 0
    accepted: int = 0
    first: float = 0.0
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_logprobs: list[dict[str, Any]] = field(default_factory=list)
    scored: int = 0
    given: tuple[int, ...] = ()

    @property
    def feeds(self) -> bool:
        """Whether its next id is that of the largest logit, so that the device finds it without the host."""
        s, free = self.request.sampling, len(self.sequence.generated) >= len(self.given)
        told = s.logprobs is not None or s.prompt_logprobs is not None
        return free and s.temperature == 0 and not (told or s.edits or self.constraint)

    def take_proposal(self) -> None:
        """Go on from the next proposed id, which was sampled."""
        self.accepted += 1
        if self.ahead:
            self.constraint = self.ahead.pop(0)

    def told_prompt(self) -> list[dict[str, Any]] | None:
        """The log-probabilities of the prompt's tokens, where they are wanted. Nothing precedes the first one."""
        if self.request.sampling.prompt_logprobs is None:
            return None
        return [entry(Token(self.request.ids[0])), *self.prompt_logprobs]


@dataclass(slots=True)
class Flight:
    """A step in progress: either launched, or run with its tokens at hand.

    feeds: whether the next step can take the ids of this one on the device.
    """

    step: Step
    start: float
    feeds: bool
    launched: Launched | None = None
    tokens: list[Token] = field(default_factory=list)


def entry(token: Token) -> dict[str, Any]:
    """A token's entry of a result's log-probabilities. None: it has none, such as an image's token."""
    own = token.logprob
    return {
        "id": token.id,
        "logprob": None if own is None or math.isinf(own) else own,
        "top_ids": list(token.top_ids),
        "top_logprobs": list(token.top_logprobs),
    }
