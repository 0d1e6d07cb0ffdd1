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

# The candidates that a search of logits gives, where graphs give none.
SEARCHED = 64


def noise(seed: int, position: int) -> float:
    """The uniform draw in [0, 1) for one position. It depends only on seed and position, not on the batch."""
    return random.Random(f"{seed}/{position}").random()


class Sampler:
    """Samples one token per row. `gather` stacks a tensor over ranks; `say` is told of what is slow, once."""

    # Logits of a smaller vocabulary are sorted, without a search for the largest.
    small = 4096

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
        tokens: list[Token] = [Token(NOT_FINITE)] * len(sampling)
        alone = [self._offered(s, self._vocab) == 1 for s in sampling]
        # Apart, since the largest logit is found in a small part of the time that several take.
        for choose, wanted in ((self._largest, True), (self._several, False)):
            rows = [row for row, one in enumerate(alone) if one == wanted]
            if rows:
                part_BV = logits_BV if len(rows) == len(sampling) else logits_BV[rows]
                columns = ([column[row] for row in rows] for column in (sampling, positions, masks))
                found = choose(part_BV, None if total_B is None else total_B[rows], *columns)
                for row, token in zip(rows, found, strict=True):
                    tokens[row] = token
        for row, edit in enumerate(edits):
            if edit and edit.given is not None and tokens[row].id != NOT_FINITE:
                tokens[row] = replace(tokens[row], id=edit.given)
        if raw_BV is not None and total_B is not None:
            columns = ([column[row] for row in apart] for column in (tokens, sampling, masks))
            for row, token in zip(apart, self._reported(raw_BV, total_B[apart], *columns), strict=True):
                tokens[row] = token
        return tokens

    def _largest(
        self,
        logits_BV: Tensor,
        total_B: Tensor | None,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        masks: Sequence[bytes],
    ) -> list[Token]:
        """The tokens of rows that take the largest logit that they may. `total_B`: of the raw logits."""
        value_B1, id_B1 = sample.candidates(logits_BV, 1, self._first, self._gather)
        # The largest of all is the largest of those allowed, if it is one of them. NaN marks a row that has failed.
        tops = zip(value_B1[:, 0].tolist(), id_B1[:, 0].tolist(), masks, strict=True)
        masked = [row for row, (top, id, mask) in enumerate(tops) if mask and top == top and not _allows(mask, id)]
        for row in masked:
            sample.mask_(logits_BV, row, masks[row], self._first)
        if masked:
            value_B1[masked], id_B1[masked] = sample.candidates(logits_BV[masked], 1, self._first, self._gather)
        total_B = value_B1[:, 0] if total_B is None else total_B
        at_B = torch.zeros(len(sampling), dtype=torch.long, device=logits_BV.device)
        return self._told_of(Best(value_B1, id_B1, total_B, value_B1[:, 0].isnan()), at_B, sampling)

    def _several(
        self,
        logits_BV: Tensor,
        total_B: Tensor | None,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        masks: Sequence[bytes],
    ) -> list[Token]:
        """The tokens of rows that need several of the largest logits, or all. `total_B`: of the raw logits."""
        for row, mask in enumerate(masks):
            if mask:
                sample.mask_(logits_BV, row, mask, self._first)
        tokens: list[Token | None] = [None] * len(sampling)
        if self._vocab > self.small:
            tokens = self._searched(logits_BV, total_B, sampling, positions)
        if left := [row for row, token in enumerate(tokens) if token is None]:
            options, at = [sampling[row] for row in left], [positions[row] for row in left]
            k = max(self._offered(s, self._vocab) for s in options)
            value_Bk, id_Bk = sample.candidates(logits_BV[left], k, self._first, self._gather)
            at_B = torch.zeros(len(left), dtype=torch.long, device=logits_BV.device)
            if any(s.temperature > 0 for s in options):
                at_B, _ = self._draw(value_Bk, options, at)
            all_B = value_Bk[:, 0] if total_B is None else total_B[left]
            found = self._told_of(Best(value_Bk, id_Bk, all_B, value_Bk[:, 0].isnan()), at_B, options)
            for row, token in zip(left, found, strict=True):
                tokens[row] = token
        return [token for token in tokens if token is not None]

    def _searched(
        self, logits_BV: Tensor, total_B: Tensor | None, sampling: Sequence[Sampling], positions: Sequence[int]
    ) -> list[Token | None]:
        """The tokens that the largest logits decide; None for other rows: a sort of all takes 80 times longer."""
        held = min(SEARCHED, self._size)
        found_WBF = self._gather(_offer(logits_BV, held)).cpu()
        of, last_B = sample.merged(found_WBF, held, self._size, self._vocab), found_WBF[..., held - 1].amax(0)
        # Whether all ids that a mask allows are among the candidates.
        whole_Bk, complete_B = of.value_Bk, of.value_Bk[:, -1].isneginf()
        at_B, (temperature_B, top_k_B, top_p_B, noise_B, min_p_B) = self._draw(of.value_Bk, sampling, positions)
        beyond_B = (temperature_B > 0) & (top_k_B == 0) & ~complete_B & ~of.failed_B
        open_ = of._replace(value_Bk=torch.where(beyond_B[:, None], whole_Bk, 0.0))
        within_B, sure_B = sample.draw_within(
            open_, self._vocab, torch.where(beyond_B, temperature_B, 1.0), top_p_B, noise_B, min_p_B
        )
        at_B = torch.where(beyond_B, within_B, at_B)
        # A logit that equals the last candidate of a rank may have an equal with a lower id that is none.
        wanted_B = torch.tensor([self._offered(s, 1) for s in sampling])
        needed_B = torch.maximum(wanted_B, at_B + 1).clamp(max=of.value_Bk.shape[-1])
        clear_B = (of.value_Bk.gather(-1, needed_B[:, None] - 1)[:, 0] > last_B) | complete_B
        known_B = (wanted_B <= held) & clear_B & (sure_B | ~beyond_B) | of.failed_B
        all_B = of.total_B if total_B is None else total_B.cpu()
        tokens = self._told_of(of._replace(total_B=all_B), at_B, sampling)
        return [token if known else None for token, known in zip(tokens, known_B.tolist(), strict=True)]

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


def _offer(logits_BV: Tensor, k: int) -> Tensor:
    """What a graph's search gives of a rank's logits (sample.best, without the exchange), (B, F).

    The logits are those of sample.own_ids, of which a mask may have left few or none.
    """
    value_Bk, column_Bk = logits_BV.topk(k)
    top_B1 = value_Bk[:, :1]
    mass_B1 = (logits_BV - top_B1).exp().sum(-1, keepdim=True).where(~top_B1.isneginf(), 1.0)
    mark_B1 = torch.where(logits_BV[:, :1].isnan(), torch.nan, 0.0)
    return torch.cat((value_Bk, column_Bk.float(), mass_B1, mark_B1), -1)
