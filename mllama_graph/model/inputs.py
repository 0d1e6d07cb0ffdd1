"""The static-shaped inputs of each step, and the pages that steps read and write.

B sequences   T token rows   J pages per sequence   C tiles   S patch rows   h w pixels   L keys   R rows per sequence
O rows of logits
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A layer's pages: K and V (N, P, K, H); int8 pages are followed by the scales of each, fp32 (N, K, P).
LayerPages = tuple[Tensor, ...]
# The pages of all layers that have some, allocated once.
Pages = tuple[LayerPages, ...]


class ImageInput(NamedTuple):
    """The images that each row sees, i.e. attends to.

    table_BJ: block table of each sequence's image pages, image after image. fill_BJ: tokens in each page (the last page
    of an image is rarely full). see_T2: the range [from, to) of table entries that a row sees; from == to if it sees
    no image.
    """

    table_BJ: Tensor
    fill_BJ: Tensor
    see_T2: Tensor


class Prepared(NamedTuple):
    """What an NPU's graphs take in place of masks and lengths computed from other inputs (ops/npu_inputs.py).

    causal_MM: the fixed mask of causal attention, kept on the device. row_T, held_T1: rows of a rank's part of the
    embedding table, and which ids it holds; None for a single rank. new_B, keys_B: of prompts in pages, the number of
    new tokens and that of all (int64), 1 for padding. row_BT, at_T: of several sequences, where the rows of each are
    among all rows, and where each row is among those (T for each sequence). image_len_B: length of each sequence's
    image pages in tokens (int64). sees_T1: which rows see an image. unseen_B1RL: the image keys that a decode step's
    rows must not see. Of a prompt, entry_B1L is the entry of the image table that a key belongs to, J if it is in no
    used slot, and from_BT1, to_BT1 the range of entries that a row sees: all if it sees no image.

    In a decode step, ends_B (int64) counts the rows up to the end of each sequence, for attention to packed rows. Where
    attention's keys are split into S parts, block table, lengths and mask have B * S rows, one for each part of each
    sequence, and empty_BS11 or image_empty_BS11 (fp32) is added to the log-sum-exp of each part. unseen_keys_B1RL: for
    captured kernels, whose lengths are integers, the text keys of the whole block table that rows must not see.
    scale_at_TK3: of int8 pages, where the scale of each row and head is in (N, K, P).
    """

    causal_MM: Tensor | None = None
    row_T: Tensor | None = None
    held_T1: Tensor | None = None
    new_B: Tensor | None = None
    keys_B: Tensor | None = None
    row_BT: Tensor | None = None
    at_T: Tensor | None = None
    image_len_B: Tensor | None = None
    sees_T1: Tensor | None = None
    unseen_B1RL: Tensor | None = None
    entry_B1L: Tensor | None = None
    from_BT1: Tensor | None = None
    to_BT1: Tensor | None = None
    ends_B: Tensor | None = None
    empty_BS11: Tensor | None = None
    image_empty_BS11: Tensor | None = None
    unseen_keys_B1RL: Tensor | None = None
    scale_at_TK3: Tensor | None = None


class PromptInput(NamedTuple):
    """New tokens of B prompts, sequence after sequence, padded to T rows. All tensors are int32.

    slot_T: the slot to which each row's K/V are written. last_B: indices of the rows whose logits are returned.
    They may be more than sequences. real_1, outputs_1: number of rows and of indices that are not padding; they come
    first. decoding_1: number of the first sequences that are running ones, whose only new token is decoded beside the
    prompts. rows_B, past_B: number of new
    and of earlier tokens; 0 for padding. table_BJ: the pages of both; None for one sequence without earlier tokens.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    last_B: Tensor
    real_1: Tensor
    outputs_1: Tensor
    decoding_1: Tensor
    rows_B: Tensor
    past_B: Tensor
    table_BJ: Tensor | None
    image: ImageInput | None
    prepared: Prepared | None = None


class TokenInput(NamedTuple):
    """The new tokens of B running sequences, T = B * q rows.

    len_B: length of each sequence in tokens, including the new ones; 1 for padding; int64 on an NPU. real_1: number of
    the T rows that are not padding; they come first.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    real_1: Tensor
    table_BJ: Tensor
    len_B: Tensor
    image: ImageInput | None
    prepared: Prepared | None = None


class MixedInput(NamedTuple):
    """A token of each of B running sequences, and new tokens of prompts beside them: T rows, those of the prompts last.

    tokens, prompts: what attention of either takes. Their ids, positions, slots and `last_B` are not read: ids_T,
    position_T, slot_T and last_O are those of all rows. last_O: the rows whose logits are returned, those of all B
    sequences first. see_T2: see ImageInput; None in a graph without images.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    last_O: Tensor
    see_T2: Tensor | None
    tokens: TokenInput
    prompts: PromptInput
    prepared: Prepared | None = None


def mixed_input(tokens: TokenInput, prompts: PromptInput) -> MixedInput:
    """The input of a mixed step. The slots of the prompts' padding are others than those of the sequences' padding."""
    B = len(tokens.ids_T)
    ids_T, position_T, slot_T = (torch.cat(pair) for pair in zip(tokens[:3], prompts[:3]))
    row_B = torch.arange(B, dtype=prompts.last_B.dtype, device=prompts.last_B.device)
    last_O = torch.cat((row_B, prompts.last_B + B))
    see_T2 = None
    if tokens.image is not None and prompts.image is not None:
        see_T2 = torch.cat((tokens.image.see_T2, prompts.image.see_T2))
    return MixedInput(ids_T, position_T, slot_T, last_O, see_T2, tokens, prompts)


def with_ids(ids_T: Tensor, last_O: Tensor) -> Tensor:
    """Ids below 0 replaced by those that the last step sampled: ~n by id n of last_O, all int32.

    Runs on the inputs' device, where the host does not know the ids yet.
    """
    return torch.where(ids_T < 0, last_O.index_select(0, (~ids_T).clamp(min=0)), ids_T)


class TileInput(NamedTuple):
    """One image: all tiles of the canvas as uint8, padding tiles included.

    aspect_1: aspect-ratio id, counted from 1. real_1: number of tiles that are not padding; None in a graph for a fixed
    number of them, which takes these tiles alone. slot_S: the slot to which each token's K/V are written. prepared: for
    int8 pages on an NPU.
    """

    tiles_C3hw: Tensor
    aspect_1: Tensor
    real_1: Tensor | None
    slot_S: Tensor
    prepared: Prepared | None = None
