"""Samples tokens from logits. Each rank has the logits of its shard of the vocabulary, and all draw the same token.

Where a step's graph has found the largest logits of all ranks, tokens are sampled from those. Rows that need more than
that are sampled from all logits, on the device that the backend gives them on.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mllama_graph.engine.edits import Edit
from mllama_graph.engine.steps import NOT_FINITE, Token
from mllama_graph.inputs.request import Sampling
from mllama_graph.model import sample
from mllama_graph.model.sample import Best, Gather
from mllama_graph.model.table import Shard


def noise(seed: int, position: int) -> float:
    """The uniform draw in [0, 1) for one position. It depends only on seed and position, not on the batch."""
    return random.Random(f"{seed}/{position}").random()


class Sampler:
    """Samples one token per row. `gather` stacks a tensor over ranks; `say` is told of what is slow, once."""

    def __init__(self, vocab: int, shard: Shard, gather: Gather, say: Callable[[str], None]):
        self._vocab, self._size, self._gather, self._say = vocab, shard.size(vocab), gather, say
        self._first, self._told = shard.rank * self._size, False

    def tokens(
        self,
        logits: Callable[[], Tensor],
        found_WBF: Tensor | None,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        masks: Sequence[bytes] = (),
        edits: Sequence[Edit | None] = (),
    ) -> list[Token]:
        """Sample a token for each row, with log-probabilities where its options request them.

        A row with logits that are not finite gets the token NOT_FINITE; the other rows are not affected.

        `logits`: gives this rank's logits of the rows. `found_WBF`: the largest of all ranks (sample.best), on the CPU;
        None if the graph gives none. `positions`: the positions of the sampled tokens. `masks`: the allowed ids of each
        row (Row.mask), which must not be empty; no masks allow all. `edits`: what else changes each row's token.
        """
        masks, edits = masks or [b""] * len(sampling), edits or [None] * len(sampling)
        if found_WBF is None:
            return self._from_logits(logits(), sampling, positions, masks, edits)
        altered = [bool(mask or edit) for mask, edit in zip(masks, edits, strict=True)]
        tokens = self._from_best(found_WBF, sampling, positions, altered)
        self._allowed(tokens, found_WBF, sampling, masks, edits)
        left = [row for row, token in enumerate(tokens) if token is None]
        if left:
            if not all(altered[i] for i in left):
                self._tell((found_WBF.shape[-1] - 2) // 2)
            columns = ([column[i] for i in left] for column in (sampling, positions, masks, edits))
            whole = self._from_logits(logits()[left], *columns)
            for row, token in zip(left, whole, strict=True):
                tokens[row] = token
        return [token for token in tokens if token is not None]

    def _tell(self, held: int) -> None:
        if not self._told:
            self._told = True
            self._say(
                f"some tokens are sampled from all logits, since they need more than the {held} largest of each rank "
                "that graphs find: this is slower. A request with top_k, or plan.candidates=, avoids it."
            )

    def _from_best(
        self, found_WBF: Tensor, sampling: Sequence[Sampling], positions: Sequence[int], altered: Sequence[bool]
    ) -> list[Token | None]:
        """The tokens that the candidates decide; None for other rows. The same on every rank.

        A mask may leave none of the candidates, and an edit may make others the largest: `altered` rows are not decided
        unless they failed.
        """
        held = (found_WBF.shape[-1] - 2) // 2
        drawn = any(s.temperature > 0 for s in sampling)
        # A draw from the whole distribution may end among the candidates, whose number it does not say.
        wanted = [self._offered(s, 1) for s in sampling]
        k = held if any(s.temperature > 0 and not s.top_k for s in sampling) else min(max(wanted), held)
        of = sample.merged(found_WBF, k, self._size, self._vocab)
        at_B, decided_B = torch.zeros(len(sampling), dtype=torch.long), torch.tensor([k <= held for k in wanted])
        if drawn:
            at_B, (temperature_B, top_k_B, top_p_B, noise_B, min_p_B) = self._draw(of.value_Bk, sampling, positions)
            whole_B = (temperature_B > 0) & (top_k_B == 0)
            within_B, sure_B = sample.draw_within(
                of, self._vocab, torch.where(whole_B, temperature_B, 1.0), top_p_B, noise_B, min_p_B
            )
            at_B, decided_B = torch.where(whole_B, within_B, at_B), decided_B & (sure_B | ~whole_B)
        known = (decided_B & ~torch.tensor(altered) | of.failed_B).tolist()
        return [token if sure else None for token, sure in zip(self._told_of(of, at_B, sampling), known, strict=True)]

    def _allowed(
        self,
        tokens: list[Token | None],
        found_WBF: Tensor,
        sampling: Sequence[Sampling],
        masks: Sequence[bytes],
        edits: Sequence[Edit | None],
    ) -> None:
        """Fill in the tokens of greedy rows with a mask, where the largest logit that it allows is a candidate.

        A logit that equals the last candidate of a rank may have an equal with a lower id that is none.
        """
        held = (found_WBF.shape[-1] - 2) // 2
        rows = [
            row
            for row, mask in enumerate(masks)
            if mask and not edits[row] and tokens[row] is None and _greedy(sampling[row])
        ]
        if not rows:
            return
        of = sample.merged(found_WBF[:, rows], held, self._size, self._vocab)
        last = found_WBF[:, rows, held - 1].amax(0) if held < self._size else torch.full((len(rows),), -torch.inf)
        for row, ids, values, least in zip(rows, of.id_Bk.tolist(), of.value_Bk.tolist(), last.tolist()):
            best = next((n for n, id in enumerate(ids) if _allows(masks[row], id)), None)
            if best is not None and values[best] > least:
                tokens[row] = Token(ids[best])

    def _from_logits(
        self,
        logits_BV: Tensor,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        masks: Sequence[bytes],
        edits: Sequence[Edit | None],
    ) -> list[Token]:
        logits_BV = sample.own_ids(logits_BV, self._first, self._vocab)
        reported = any(s.logprobs is not None for s in sampling)
        total_B = sample.total(logits_BV, self._gather) if reported else None
        # Log-probabilities are those of the raw logits.
        apart = [row for row, edit in enumerate(edits) if edit and sampling[row].logprobs is not None]
        raw_BV = logits_BV[apart] if apart else None
        for row, edit in enumerate(edits):
            if edit:
                edit.apply_(logits_BV[row], self._first, self._vocab)
        k = max(self._offered(s, self._vocab) for s in sampling)
        value_Bk, id_Bk = self._masked_candidates(logits_BV, k, masks)
        at_B = torch.zeros(len(sampling), dtype=torch.long, device=logits_BV.device)
        if any(s.temperature > 0 for s in sampling):
            at_B, _ = self._draw(value_Bk, sampling, positions)
        all_B = value_Bk[:, 0] if total_B is None else total_B
        tokens = self._told_of(Best(value_Bk, id_Bk, all_B, value_Bk[:, 0].isnan()), at_B, sampling)
        for row, edit in enumerate(edits):
            if edit and edit.given is not None and tokens[row].id != NOT_FINITE:
                tokens[row] = replace(tokens[row], id=edit.given)
        if raw_BV is not None and total_B is not None:
            columns = ([column[row] for row in apart] for column in (tokens, sampling, masks))
            for row, token in zip(apart, self._reported(raw_BV, total_B[apart], *columns), strict=True):
                tokens[row] = token
        return tokens

    def _masked_candidates(self, logits_BV: Tensor, k: int, masks: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """The k largest of the allowed logits and their ids, (B, k) each. Masks are applied to the logits, in place."""
        masked = [row for row, mask in enumerate(masks) if mask]
        found = sample.candidates(logits_BV, 1, self._first, self._gather) if k == 1 else None
        if found:
            # The largest of all is the largest of those allowed, if it is one of them: then nothing is to be done.
            tops = zip(found[0][:, 0].tolist(), found[1][:, 0].tolist())
            allowed = [value != value or _allows(mask, id) for (value, id), mask in zip(tops, masks)]
            masked = [row for row in masked if not allowed[row]]
        for row in masked:
            sample.mask_(logits_BV, row, masks[row], self._first)
        if found is None:
            return sample.candidates(logits_BV, k, self._first, self._gather)
        if masked:
            again = sample.candidates(logits_BV[masked], 1, self._first, self._gather)
            for one, other in zip(found, again):
                one[masked] = other
        return found

    def _reported(
        self,
        raw_BV: Tensor,
        total_B: Tensor,
        tokens: Sequence[Token],
        sampling: Sequence[Sampling],
        masks: Sequence[bytes],
    ) -> list[Token]:
        """The tokens, whose logits were edited, with the log-probabilities of the raw logits."""
        ids_B = torch.tensor([token.id for token in tokens], device=raw_BV.device)
        column_B = ids_B - self._first
        held_B = (column_B >= 0) & (column_B < min(self._size, self._vocab - self._first))
        own_B = raw_BV.gather(-1, column_B.where(held_B, 0)[:, None])[:, 0].where(held_B, -torch.inf)
        own_B = self._gather(own_B).amax(0) - total_B
        for row, mask in enumerate(masks):
            if mask:
                sample.mask_(raw_BV, row, mask, self._first)
        k = max(1, *(s.logprobs or 0 for s in sampling))
        value_Bk, id_Bk = sample.candidates(raw_BV, k, self._first, self._gather)
        best = Best(value_Bk, id_Bk, total_B, value_Bk[:, 0].isnan())
        found = self._told_of(best, torch.zeros_like(ids_B), sampling)
        return [
            token if token.id == NOT_FINITE else replace(told, id=token.id, logprob=own)
            for token, told, own in zip(tokens, found, own_B.tolist(), strict=True)
        ]

    def _told_of(self, of: Best, at_B: Tensor, sampling: Sequence[Sampling]) -> list[Token]:
        """The tokens of the chosen candidates."""
        # A draw from NaN may give any index.
        at_B = at_B.masked_fill(of.failed_B, 0)
        ids = of.id_Bk.gather(-1, at_B[:, None])[:, 0].masked_fill(of.failed_B, NOT_FINITE).tolist()
        if all(s.logprobs is None for s in sampling):
            return [Token(id) for id in ids]
        logp_Bk = of.value_Bk - of.total_B[:, None]
        own, top_ids, top = logp_Bk.gather(-1, at_B[:, None])[:, 0].tolist(), of.id_Bk.tolist(), logp_Bk.tolist()
        # Fewer where a mask allows fewer ids. The candidates that it does not allow come last.
        counts = (of.value_Bk > -torch.inf).sum(-1).tolist()
        tops = [0 if s.logprobs is None else min(s.logprobs, counts[i]) for i, s in enumerate(sampling)]
        return [
            Token(ids[i])
            if s.logprobs is None or ids[i] == NOT_FINITE
            else Token(ids[i], own[i], tuple(top_ids[i][: tops[i]]), tuple(top[i][: tops[i]]))
            for i, s in enumerate(sampling)
        ]

    def _offered(self, s: Sampling, whole: int) -> int:
        """The candidates that a row needs for its draw and log-probabilities; `whole` for a draw without top_k."""
        drawn = 1 if s.temperature == 0 else s.top_k or whole
        return min(max(1, drawn, s.logprobs or 0), self._vocab)

    def _draw(
        self, value_Bk: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The chosen candidate of each row, and the options as columns: temperature, top_k, top_p, noise, min_p."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=value_Bk.device)

        columns = (
            column([float(s.temperature) for s in sampling]),
            column([s.top_k for s in sampling]),
            column([float(s.top_p) for s in sampling]),
            column([noise(s.seed, position) for s, position in zip(sampling, positions)]),
            column([float(s.min_p) for s in sampling]),
        )
        return sample.draw(value_Bk, *columns), columns


def _greedy(s: Sampling) -> bool:
    """Whether a row only needs the largest logit."""
    return s.temperature == 0 and s.logprobs is None


def _allows(mask: bytes, id: int) -> bool:
    """Whether a mask allows an id."""
    return id >> 3 < len(mask) and bool(mask[id >> 3] >> (id & 7) & 1)
