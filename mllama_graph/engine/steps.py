"""The steps that ranks execute, as plain integers. A step carries only what changed since the step before.

A sequence's pages, image table and sampling options are sent once, when they become known; each rank keeps them
(engine/batch.py, Sequences). So a decode step costs the same to send after 10 tokens and after 10,000.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Sampling

# The id of a token that could not be sampled, since a logit of its row is NaN or infinite.
NOT_FINITE = -1
# Stands for an id that the step before samples and that the host has not read. Ranks take it from that step's output.
PENDING = -2


@dataclass(frozen=True)
class Token:
    """A sampled id or NOT_FINITE, and log-probabilities of the raw logits where they were requested.

    Under a mask, top_ids are the most likely of the allowed ids.
    """

    id: int
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class ImageTable:
    """The image pages that a sequence's rows may attend to, image after image, and the tokens in each page."""

    pages: tuple[int, ...] = ()
    fill: tuple[int, ...] = ()


@dataclass(frozen=True)
class History:
    """What sampling depends on besides logits, for a request with penalties and the like, or with given ids.

    ids: all ids so far, of which the first `prompt` are the prompt's. ends: the ids that end the text. Sent with a
    row's `sampling`; afterwards ranks learn the ids from rows.
    """

    ids: tuple[int, ...]
    prompt: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """New tokens of one sequence.

    start: position of the first token; pages hold the K/V of all earlier ones. pages: pages added to the block table
    since the sequence's last row. used_pages: the number of pages that hold positions 0 .. start + len(ids) - 1. image:
    the image table, if it changed since the last row; image_pages: its length. see: the range [from, to) of its entries
    that each new token attends to; empty if all attend to the whole table. sampling: sent with the first row, and again
    with the first after the sequence was preempted; such a row's `pages` are the whole block table. mask: the ids that
    may be sampled after this row, one bit each in int32 words, the lowest bit first; empty if all may. Sent to every
    rank, which cuts it to its shard of the vocabulary. given: the id that takes the place of the sampled one. skipped:
    see engine/sequence.py.

    In a decode step, ids after the first are proposals: a token is sampled after each id, and those after a proposal
    count only if it is what was sampled before it (`agreeing`). `mask` is then for the token after the first id, and
    `later_masks` for those after proposals, where the request has masks. A row with a given id has no proposals.

    A row that decodes has the single id PENDING if its step was decided before that id was read.

    scored: for a row of a prompt, the number of its ids after which the log-probability of the prompt's next id is
    wanted: all of them, or all but the last one, after which a token is sampled. If it is all of them, `given` is the
    prompt's id after the row.
    """

    sequence: int
    ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    used_pages: int
    image_pages: int
    image: ImageTable | None = None
    see: tuple[tuple[int, int], ...] = ()
    sampling: Sampling | None = None
    mask: bytes = b""
    later_masks: tuple[bytes, ...] = ()
    history: History | None = None
    given: int | None = None
    skipped: int = 0
    scored: int = 0

    def given_after(self, n: int) -> int | None:
        """The id that takes the place of the one sampled after id number n."""
        return self.given if n == len(self.ids) - 1 or not self.scored else self.ids[n + 1]


@dataclass(frozen=True)
class VisionStep:
    """Encode an image into `pages`, padding tiles included. The only step that carries pixels."""

    image: TiledImage
    pages: tuple[int, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return ()

    @property
    def outputs(self) -> list[int]:
        """No token is sampled."""
        return []

    @property
    def decoding(self) -> int:
        """No row decodes."""
        return 0


@dataclass(frozen=True)
class PrefillStep:
    """New tokens of one or several prompts, and beside them new tokens of running sequences.

    The first `decoding` rows are those of running sequences, as in a decode step; after them come prompts that are
    computed to their ends, and then the other prompts. The rows of the first two kinds get a token: these are the first
    `sampled` rows. `ended`: sequences that ended since the step before.
    """

    rows: tuple[Row, ...]
    sampled: int
    decoding: int = 0
    ended: tuple[int, ...] = ()

    @property
    def outputs(self) -> list[int]:
        """For each row, the number of its last ids after which a token is sampled."""
        prompts = enumerate(self.rows[self.decoding :], self.decoding)
        return [len(row.ids) for row in self.rows[: self.decoding]] + [
            row.scored + (n < self.sampled) for n, row in prompts
        ]


@dataclass(frozen=True)
class DecodeStep:
    """A new token for each row, and one more after each proposal that it has. `ended`: sequences that ended since the
    step before.
    """

    rows: tuple[Row, ...]
    ended: tuple[int, ...] = ()

    @property
    def outputs(self) -> list[int]:
        """For each row, the number of its ids after which a token is sampled: all."""
        return [len(row.ids) for row in self.rows]

    @property
    def decoding(self) -> int:
        """The number of rows that decode: all."""
        return len(self.rows)


Step = VisionStep | PrefillStep | DecodeStep


def sampled(step: Step) -> int:
    """The number of a step's first rows that get a token."""
    return step.sampled if isinstance(step, PrefillStep) else len(step.rows)


def decoded(step: PrefillStep | DecodeStep) -> int:
    """The token rows of the sequences that decode in a step."""
    return sum(len(row.ids) for row in step.rows[: step.decoding])


def agreeing(row: Row, sampled: Sequence[int]) -> int:
    """How many of the tokens sampled after a decode row's ids are those that steps of one token would have sampled.

    The token after the first id is one of them. Each token after a proposal is one, too, up to the first proposal that
    differs from the token sampled before it. 0 if a token of a row with proposals could not be sampled: what a proposal
    wrote may spoil the others, and the row must be computed without proposals.
    """
    if len(row.ids) > 1 and NOT_FINITE in sampled:
        return 0
    return 1 + next((n for n, pair in enumerate(zip(row.ids[1:], sampled)) if pair[0] != pair[1]), len(row.ids) - 1)


@dataclass(frozen=True)
class Agreed:
    """The tokens of a step by their use.

    new: those of decoding rows that `agreeing` counts, and those sampled after prompts. counts: the number of new
    tokens of each decoding row; empty if each has one. scored: those of prompts (`Row.scored`), by sequence.
    """

    new: list[Token]
    counts: tuple[int, ...] = ()
    scored: tuple[tuple[int, list[Token]], ...] = ()


def agreed(step: Step, tokens: list[Token]) -> Agreed:
    """Sort the tokens of a step by their use. Each row has as many tokens as the step's `outputs` say."""
    if len(tokens) == sampled(step):
        return Agreed(tokens)
    new: list[Token] = []
    counts, end, scored = [], 0, []
    for n, (row, count) in enumerate(zip(step.rows, step.outputs)):
        own = tokens[end : end + count]
        end += count
        if n < step.decoding:
            counts.append(agreeing(row, [token.id for token in own]))
            new += own[: counts[-1]]
        else:
            new += own[row.scored :]
            if row.scored:
                scored.append((row.sequence, own[: row.scored]))
    return Agreed(new, tuple(counts), tuple(scored))
