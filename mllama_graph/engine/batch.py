"""Builds a bucket's static-shaped inputs from a step, on the host: padding, slots, tables.

Image tiles are uint8, the rest int32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from mllama_graph.engine.edits import Edit
from mllama_graph.engine.steps import (
    PENDING,
    DecodeStep,
    History,
    ImageTable,
    PrefillStep,
    Row,
    Step,
    VisionStep,
    decoded,
)
from mllama_graph.inputs.request import Sampling
from mllama_graph.model.inputs import ImageInput, MixedInput, PromptInput, TileInput, TokenInput, mixed_input
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.blocks import pages_for, slots
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import Plan

Ints = NDArray[np.int32]


def needs(plan: Plan, step: Step) -> Bucket:
    """The smallest bucket that holds a step."""
    if isinstance(step, VisionStep):
        return plan.vision(step.image.count)
    if isinstance(step, PrefillStep) and step.decoding and not plan.lengths_are_free:
        new, images = step.rows[step.decoding :], max(row.image_pages for row in step.rows)
        used = max(row.used_pages for row in new)
        return plan.mixed(sum(len(row.ids) for row in new), used, images, len(new))
    rows = len(step.rows)
    used, images = max(row.used_pages for row in step.rows), max(row.image_pages for row in step.rows)
    if isinstance(step, DecodeStep):
        most = max(len(row.ids) for row in step.rows)
        if most == 1:
            return plan.decode(rows, used, images)
        if plan.lengths_are_free:
            return plan.decode(decoded(step), used, images)
        used = max(pages_for(row.start + plan.row_tokens, plan.page_size) for row in step.rows)
        return plan.decode(rows, used, images, plan.row_tokens)
    alone = rows == 1 and step.rows[0].start == 0
    return plan.prefill(sum(len(row.ids) for row in step.rows), 0 if alone else used, images, rows)


@dataclass
class Known:
    """A rank's state of a sequence: its sampling options, its block table and its image table.

    finite: the number of its first tokens whose K/V are known to be finite, since logits after them were. history: of
    a request that has one; its ids are in `ids`, which grows. skipped: see Sequence. place: where the last step's
    output has its token.
    """

    sampling: Sampling
    finite: int
    pages: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    image_pages: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    image_fill: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    history: History | None = None
    ids: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    skipped: int = 0
    place: int = 0

    def learn(self, row: Row) -> None:
        """Note the ids of a row, in the place of those that were there before."""
        end = row.start + len(row.ids)
        if end > len(self.ids):
            self.ids = np.resize(self.ids, 2 * end)
        self.ids[row.start : end] = row.ids

    def options(self, position: int) -> Sampling:
        """The sampling options of the token at a position; those of a prompt's token say what to report of it."""
        if self.history is None or position >= self.history.prompt:
            return self.sampling
        return Sampling(logprobs=self.sampling.prompt_logprobs)

    def edit(self, position: int, given: int | None) -> Edit | None:
        """What happens to the logits of the token at a position, or to the token; None for nothing."""
        if self.history is None:
            return None if given is None else Edit(self.sampling, self.ids, 0, (), given)
        edit = Edit(self.options(position), self.ids[:position], self.history.prompt, self.history.ends, given)
        return edit if edit.changes else None


class Sequences:
    """The state of all unfinished sequences on a rank, updated by each step."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def __getitem__(self, row: Row) -> Known:
        return self._known[row.sequence]

    def __len__(self) -> int:
        return len(self._known)

    def update(self, step: Step) -> None:
        """Apply the changes that a step carries."""
        if isinstance(step, VisionStep):
            return
        for sequence in step.ended:
            self._known.pop(sequence, None)
        for row in step.rows:
            if row.sampling is not None:
                self._known[row.sequence] = Known(row.sampling, row.start, history=row.history, skipped=row.skipped)
            known = self._known[row.sequence]
            if row.history is not None:
                known.ids = np.array(row.history.ids, np.int32)
            if known.history is not None:
                known.learn(row)
            if row.pages:
                known.pages = np.concatenate((known.pages, np.asarray(row.pages, np.int32)))
            if row.image is not None:
                known.image_pages, known.image_fill = _entries(row.image)


def _entries(table: ImageTable) -> tuple[Ints, Ints]:
    return np.asarray(table.pages, np.int32), np.asarray(table.fill, np.int32)


def _int32(values: Sequence[int] | Ints) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


def _table(lists: Sequence[Ints], rows: int, width: int) -> Ints:
    """Arrays as rows of a table, padded with 0."""
    table = np.zeros((rows, width), dtype=np.int32)
    for index, values in enumerate(lists):
        table[index, : len(values)] = values
    return table


def _block_table(lists: Sequence[Ints], rows: int, width: int) -> Ints:
    """Page numbers as rows of a table, padded with the row's own first page, or page 0 where it has none.

    Padding is masked, but 0 * NaN is NaN: a page of another sequence that holds NaN would spoil the row.
    """
    table = _table(lists, rows, width)
    for index, values in enumerate(lists):
        table[index, len(values) :] = values[0] if len(values) else 0
    return table


def _image(
    known: Sequence[Known], see: Sequence[tuple[int, int]], sequences: int, tokens: int, bucket: Bucket
) -> ImageInput | None:
    if bucket.image_pages == 0:
        return None
    return ImageInput(
        table_BJ=_int32(_block_table([one.image_pages for one in known], sequences, bucket.image_pages)),
        fill_BJ=_int32(_table([one.image_fill for one in known], sequences, bucket.image_pages)),
        see_T2=_int32(_table([np.asarray(span, np.int32) for span in see], tokens, 2)),
    )


def _ids(row: Row, known: Known) -> Sequence[int]:
    """A row's ids. A pending one is ~n, where place n of the last step's output has it (model/inputs.py, with_ids)."""
    return row.ids if row.ids[0] != PENDING else (~known.place,)


def _see(row: Row) -> Sequence[tuple[int, int]]:
    """The range of image-table entries that each new token of a row attends to."""
    return row.see or [(0, row.image_pages)] * len(row.ids)


def text_input(
    step: PrefillStep | DecodeStep, sequences: Sequences, bucket: Bucket, plan: Plan
) -> PromptInput | TokenInput | MixedInput:
    """The inputs of a step without pixels, padded to the bucket."""
    if isinstance(step, DecodeStep):
        return token_input(step.rows, sequences, bucket, plan)
    if bucket.prompts is None:
        return prompt_input(step, sequences, bucket, plan)
    tokens = token_input(step.rows[: step.decoding], sequences, bucket.decoding, plan)
    prompts = PrefillStep(step.rows[step.decoding :], step.sampled - step.decoding)
    return mixed_input(tokens, prompt_input(prompts, sequences, bucket.prompts, plan, bucket.rows))


def prompt_input(step: PrefillStep, sequences: Sequences, bucket: Bucket, plan: Plan, scratch: int = 0) -> PromptInput:
    """The inputs of a prefill step, padded to the bucket. Padded rows write to scratch slots, from `scratch` on.

    Each id of a decoding row counts as a sequence with the same block table.
    """
    rows = step.rows
    # (row, its first token, their number) for each sequence of the graph.
    entries = [(row, n, 1) for row in rows[: step.decoding] for n in range(len(row.ids))]
    entries += [(row, 0, len(row.ids)) for row in rows[step.decoding :]]
    counts = [count for _, _, count in entries]
    padding, absent = bucket.tokens - sum(counts), bucket.rows - len(entries)
    known = [sequences[row] for row, _, _ in entries]
    row_slots = [
        slot for row in rows for slot in slots(sequences[row].pages.tolist(), row.start, len(row.ids), plan.page_size)
    ]
    tables = [one.pages[: row.used_pages] for (row, _, _), one in zip(entries, known)]
    wanted = _outputs(step, bucket)
    outputs = bucket.outputs or bucket.rows
    return PromptInput(
        ids_T=_int32([id for row in rows for id in _ids(row, sequences[row])] + [0] * padding),
        position_T=_int32([row.start + n for row in rows for n in range(len(row.ids))] + [0] * padding),
        slot_T=_int32(row_slots + list(range(scratch, scratch + padding))),
        last_B=_int32(wanted + [0] * (outputs - len(wanted))),
        real_1=_int32([sum(counts)]),
        outputs_1=_int32([len(wanted)]),
        decoding_1=_int32([decoded(step)]),
        rows_B=_int32(counts + [0] * absent),
        past_B=_int32([row.start + first for row, first, _ in entries] + [0] * absent),
        table_BJ=_int32(_block_table(tables, bucket.rows, bucket.pages)) if bucket.pages else None,
        image=_image(known, [span for row in rows for span in _see(row)], bucket.rows, bucket.tokens, bucket),
    )


def _outputs(step: PrefillStep, bucket: Bucket) -> list[int]:
    """The token rows of a prefill step whose logits a graph gives: the last of each sequence, or those asked for."""
    ends = list(accumulate(len(row.ids) for row in step.rows))
    if not bucket.outputs:
        return [end - 1 for end in ends]
    # At least one, so that no kernel gets a tensor without rows.
    return [n for end, count in zip(ends, step.outputs) for n in range(end - count, end)] or [ends[-1] - 1]


def places(step: PrefillStep | DecodeStep, bucket: Bucket) -> list[int]:
    """Which of a graph's logits are those of each sampled token.

    In a decode graph of several tokens of each sequence, padding follows those of each; in a mixed graph, those of the
    decoding sequences.
    """
    if isinstance(step, PrefillStep):
        absent = bucket.rows - step.decoding if bucket.prompts else 0
        return [n + absent * (n >= step.decoding) for n in range(sum(step.outputs))]
    if bucket.each == 1:
        return list(range(decoded(step)))
    return [n * bucket.each + i for n, row in enumerate(step.rows) for i in range(len(row.ids))]


def token_input(rows: Sequence[Row], sequences: Sequences, bucket: Bucket, plan: Plan) -> TokenInput:
    """The inputs of a decode step, padded to the bucket. A padded row is a one-token sequence with a scratch slot.

    In a graph of one token of each sequence, each proposal counts as a sequence with the same block table. In another
    one, each sequence is padded to as many tokens, which write to scratch slots: causal attention hides them from the
    tokens before, and their results are not used.
    """
    size, each = plan.page_size, bucket.each
    # (row, its first and last token) for each sequence of the graph.
    entries = [(row, n, n + 1) for row in rows for n in range(len(row.ids))] if each == 1 else None
    entries = entries or [(row, 0, len(row.ids)) for row in rows]
    known = [sequences[row] for row, _, _ in entries]
    absent, scratch = bucket.rows - len(entries), iter(range(bucket.tokens))
    ids: list[int] = []
    positions: list[int] = []
    row_slots: list[int] = []
    see: list[tuple[int, int]] = []
    for (row, first, last), one in zip(entries, known):
        ids += [*_ids(row, one)[first:last]] + [0] * (each - last + first)
        positions += range(row.start + first, row.start + first + each)
        for position in range(row.start + first, row.start + last):
            row_slots.append(int(one.pages[position // size]) * size + position % size)
        row_slots += [next(scratch) for _ in range(each - last + first)]
        seen = _see(row)[first:last]
        see += [*seen, *[seen[-1]] * (each - last + first)]
    padding = absent * each
    tables = [one.pages[: row.used_pages] for (row, _, _), one in zip(entries, known)]
    return TokenInput(
        ids_T=_int32(ids + [0] * padding),
        position_T=_int32(positions + [0] * padding),
        slot_T=_int32(row_slots + [next(scratch) for _ in range(padding)]),
        real_1=_int32([len(ids)]),
        table_BJ=_int32(_block_table(tables, bucket.rows, bucket.pages)),
        len_B=_int32([row.start + first + each for row, first, _ in entries] + [each] * absent),
        image=_image(known, see, bucket.rows, bucket.tokens, bucket),
    )


def tile_input(step: VisionStep, shape: ModelShape, plan: Plan) -> TileInput:
    """The inputs of a vision step: an image's real tiles, padded to the model's where a graph takes any number."""
    vision, image = shape.vision, step.image
    count = image.count if plan.tiles else vision.max_tiles
    tiles = np.zeros((count, vision.channels, vision.tile, vision.tile), dtype=np.uint8)
    tiles[: image.count] = image.data
    tokens = vision.max_tiles * vision.tokens
    return TileInput(
        tiles_C3hw=torch.from_numpy(tiles),
        aspect_1=_int32([image.aspect]),
        real_1=None if plan.tiles else _int32([image.count]),
        slot_S=_int32(slots(step.pages, 0, tokens, plan.page_size)),
    )
