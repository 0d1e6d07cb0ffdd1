"""From a scheduler's step to the static-shaped inputs of a bucket: padding, slots, tables. int32 on the way in."""

from collections.abc import Sequence

import numpy as np
import torch

from mllama_graph.plan.blocks import pages_for, slots
from mllama_graph.plan.buckets import Bucket, Plan
from mllama_graph.model.tree import ImageInput, PromptInput, TileInput, TokenInput
from mllama_graph.engine.scheduler import DecodeStep, PrefillStep, Row, VisionStep
from mllama_graph.model.shape import ModelShape


def needs(plan: Plan, step: PrefillStep | DecodeStep) -> Bucket:
    """The smallest bucket that holds a step."""
    if isinstance(step, PrefillStep):
        return plan.prefill(len(step.row.ids), pages_for(step.row.start, plan.page_size), len(step.row.image_pages))
    return plan.decode(len(step.rows), max(len(row.pages) for row in step.rows),
                       max(len(row.image_pages) for row in step.rows))


def _int32(values, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device)


def _table(lists: Sequence[Sequence[int]], rows: int, width: int) -> np.ndarray:
    """Lists as rows of a table, padded with 0 (a page that is always readable)."""
    table = np.zeros((rows, width), dtype=np.int32)
    for index, values in enumerate(lists):
        table[index, :len(values)] = values
    return table


def _image(rows: Sequence[Row], see: Sequence[tuple[int, int]], sequences: int, tokens: int, bucket: Bucket,
           device: torch.device) -> ImageInput | None:
    if bucket.image_pages == 0:
        return None
    return ImageInput(
        table_BJ=_int32(_table([row.image_pages for row in rows], sequences, bucket.image_pages), device),
        fill_BJ=_int32(_table([row.image_fill for row in rows], sequences, bucket.image_pages), device),
        see_T2=_int32(_table(see, tokens, 2), device))


def prompt_input(row: Row, bucket: Bucket, plan: Plan, device: torch.device) -> PromptInput:
    """A chunk, padded to the bucket; padded rows write to scratch slots."""
    fresh, T = len(row.ids), bucket.tokens
    padding = T - fresh
    row_slots = slots(row.pages, row.start, fresh, plan.page_size) + list(range(padding))
    earlier = row.pages[:pages_for(row.start, plan.page_size)]
    return PromptInput(
        ids_T=_int32([*row.ids, *[0] * padding], device),
        position_T=_int32([*range(row.start, row.start + fresh), *[0] * padding], device),
        slot_T=_int32(row_slots, device),
        last_1=_int32([fresh - 1], device),
        real_1=_int32([fresh], device),
        past_1=_int32([row.start], device),
        table_J=_int32(_table([earlier], 1, bucket.pages)[0], device) if bucket.pages else None,
        image=_image([row], row.see, 1, T, bucket, device))


def token_input(rows: Sequence[Row], bucket: Bucket, plan: Plan, device: torch.device) -> TokenInput:
    """Running sequences, padded to the bucket; a padded row is a sequence of one token in a scratch slot of its own."""
    padding = bucket.rows - len(rows)
    row_slots = [slot for row in rows for slot in slots(row.pages, row.start, 1, plan.page_size)]
    return TokenInput(
        ids_T=_int32([row.ids[0] for row in rows] + [0] * padding, device),
        position_T=_int32([row.start for row in rows] + [0] * padding, device),
        slot_T=_int32(row_slots + list(range(padding)), device),
        real_1=_int32([len(rows)], device),
        table_BJ=_int32(_table([row.pages for row in rows], bucket.rows, bucket.pages), device),
        len_B=_int32([row.start + 1 for row in rows] + [1] * padding, device),
        image=_image(rows, [row.see[0] for row in rows], bucket.rows, bucket.tokens, bucket, device))


def tile_input(step: VisionStep, data: np.ndarray, shape: ModelShape, plan: Plan, device: torch.device) -> TileInput:
    """An image's real tiles, padded to the model's number of tiles."""
    vision = shape.vision
    tiles = np.zeros((vision.max_tiles, vision.channels, vision.tile, vision.tile), dtype=np.uint8)
    tiles[:len(data)] = data
    tokens = vision.max_tiles * vision.tokens
    return TileInput(
        tiles_C3hw=torch.from_numpy(tiles).to(device), aspect_1=_int32([step.image.aspect], device),
        real_1=_int32([step.image.tiles], device),
        slot_S=_int32(slots(step.pages, 0, tokens, plan.page_size), device))
