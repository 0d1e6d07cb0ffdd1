"""What a request's options change before a token is sampled: biases, penalties, a minimum length, given ids.

Ranks keep the ids of the sequences concerned (steps.History), so that steps don't send them again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mllama_graph.engine.steps import DecodeStep, History, PrefillStep, Row, Step
from mllama_graph.inputs.request import Sampling

Ints = NDArray[np.int32]
Places = NDArray[np.intp]
Floats = NDArray[np.floating[Any]]
# Not -inf: an id that may not be sampled yet must remain possible where a grammar allows no other.
LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Edit:
    """The edit of one row. ids: all ids before the token, of which the first `prompt` are the prompt's.

    ends: the ids that end the text. given: the id that is taken instead of a sampled one.
    """

    sampling: Sampling
    ids: Ints
    prompt: int
    ends: tuple[int, ...]
    given: int | None = None

    @property
    def changes(self) -> bool:
        """Whether this changes anything."""
        s, generated = self.sampling, len(self.ids) - self.prompt
        counted = generated > 0 and (s.frequency_penalty or s.presence_penalty)
        needed = counted or s.logit_bias or s.repetition_penalty != 1 or generated < s.min_tokens
        return bool(self.given is not None or needed)

    def apply_(self, logits_V: Tensor, first: int, vocab: int) -> None:
        """Change a rank's logits in place. `first`: the id of column 0. A NaN, which marks a failed row, stays NaN.

        The order is that of transformers: first the bias is added, then repetition_penalty divides positive logits of
        all ids so far and multiplies negative ones. OpenAI's penalties subtract
        c * frequency_penalty + (c > 0) * presence_penalty from the logit of an id that was generated c times.
        """
        s, held = self.sampling, min(len(logits_V), vocab - first)
        generated = self.ids[self.prompt :]

        def columns(ids: Ints) -> tuple[Tensor, Places]:
            """The columns of those `ids` that this rank holds, and their places among `ids`."""
            places = np.flatnonzero((ids >= first) & (ids < first + held))
            return torch.from_numpy((ids[places] - first).astype(np.int64)).to(logits_V.device), places

        def values(numbers: Floats) -> Tensor:
            return torch.from_numpy(numbers.astype(np.float32)).to(logits_V.device)

        if s.logit_bias:
            at, places = columns(np.array([*s.logit_bias], np.int32))
            logits_V[at] += values(np.array([*s.logit_bias.values()])[places])
        if s.repetition_penalty != 1:
            at, _ = columns(np.unique(self.ids))
            logits = logits_V[at]
            logits_V[at] = torch.where(logits < 0, logits * s.repetition_penalty, logits / s.repetition_penalty)
        if len(generated) and (s.frequency_penalty or s.presence_penalty):
            ids, counts = np.unique(generated, return_counts=True)
            at, places = columns(ids)
            logits_V[at] -= values(counts[places] * s.frequency_penalty + s.presence_penalty)
        if len(generated) < s.min_tokens:
            at, _ = columns(np.array(self.ends, np.int32))
            logits_V[at] = logits_V[at].clamp(max=LEAST)


def told(step: Step, history_of: Callable[[int], History | None], given_of: Callable[[int], int | None]) -> Step:
    """The step with `Row.history` and `Row.given` set in the rows of sequences that need them."""

    def with_both(row: Row) -> Row:
        history = history_of(row.sequence) if row.sampling is not None else None
        given = given_of(row.sequence) if row.given is None else row.given
        return row if history is None and given is None else replace(row, history=history, given=given)

    if not isinstance(step, (PrefillStep, DecodeStep)):
        return step
    rows = tuple(map(with_both, step.rows))
    return step if all(map(is_, rows, step.rows)) else replace(step, rows=rows)
