"""Samples tokens from logits. Each rank has the logits of its shard of the vocabulary, and all draw the same token."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mllama_graph.engine.steps import NOT_FINITE, Token
from mllama_graph.inputs.request import Sampling
from mllama_graph.model import sample
from mllama_graph.model.sample import Gather
from mllama_graph.model.table import Shard


def noise(seed: int, position: int) -> float:
    """The uniform draw in [0, 1) for one position. It depends only on seed and position, not on the batch."""
    return random.Random(f"{seed}/{position}").random()


class Sampler:
    """Samples one token per row. `gather` stacks a tensor over ranks."""

    def __init__(self, vocab: int, shard: Shard, gather: Gather):
        self._vocab, self._first, self._gather = vocab, shard.rank * shard.size(vocab), gather

    def tokens(self, logits_BV: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> list[Token]:
        """Sample a token for each row, with log-probabilities where its options request them.

        A row with logits that are not finite gets the token NOT_FINITE; the other rows are not affected.

        `positions`: the positions of the sampled tokens.
        """
        logits_BV = sample.own_ids(logits_BV, self._first, self._vocab)
        value_Bk, id_Bk = sample.candidates(logits_BV, self._offered(sampling), self._first, self._gather)
        at_B = torch.zeros(len(sampling), dtype=torch.long, device=logits_BV.device)
        if any(s.temperature > 0 for s in sampling):
            at_B = self._draw(value_Bk, sampling, positions)
        failed_B = value_Bk[:, 0].isnan()
        # A draw from NaN may give any index.
        at_B = at_B.masked_fill(failed_B, 0)
        ids = id_Bk.gather(-1, at_B[:, None])[:, 0].masked_fill(failed_B, NOT_FINITE).tolist()
        if all(s.logprobs is None for s in sampling):
            return [Token(id) for id in ids]
        logp_Bk = value_Bk - sample.total(logits_BV, self._gather)[:, None]
        own, top_ids, top = logp_Bk.gather(-1, at_B[:, None])[:, 0].tolist(), id_Bk.tolist(), logp_Bk.tolist()
        return [
            Token(ids[i])
            if s.logprobs is None or ids[i] == NOT_FINITE
            else Token(ids[i], own[i], tuple(top_ids[i][: s.logprobs]), tuple(top[i][: s.logprobs]))
            for i, s in enumerate(sampling)
        ]

    def _offered(self, sampling: Sequence[Sampling]) -> int:
        """The number of candidates from each rank: enough for every row's draw and log-probabilities."""
        drawn = (1 if s.temperature == 0 else s.top_k or self._vocab for s in sampling)
        reported = (s.logprobs or 0 for s in sampling)
        return min(max(1, *drawn, *reported), self._vocab)

    def _draw(self, value_Bk: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=value_Bk.device)

        return sample.draw(
            value_Bk,
            column([float(s.temperature) for s in sampling]),
            column([s.top_k for s in sampling]),
            column([float(s.top_p) for s in sampling]),
            column([noise(s.seed, position) for s, position in zip(sampling, positions)]),
        )
