"""The static-shaped inputs of each step, and the pages that steps read and write.

B sequences   T token rows   J pages per sequence   C tiles   S patch rows   h w pixels
"""

from typing import NamedTuple

from torch import Tensor

# One pair (K, V) of (N, P, K, H) tensors per layer, allocated once.
Pages = tuple[tuple[Tensor, Tensor], ...]


class ImageInput(NamedTuple):
    """Which images each row sees.

    table_BJ: image pages of a sequence, image after image. fill_BJ: tokens in each page (an image rarely fills its last).
    see_T2: the range [from, to) of table entries that a row sees; from == to for a row that sees no image.
    """

    table_BJ: Tensor
    fill_BJ: Tensor
    see_T2: Tensor


class PromptInput(NamedTuple):
    """A chunk of one sequence's prompt, padded to T rows. int32 throughout.

    slot_T: the slot that each row's K/V are written to. last_1: the row whose logits are returned. real_1: the number of
    rows that are not padding; they come first. past_1: the number of earlier tokens, whose pages are in table_J.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    last_1: Tensor
    real_1: Tensor
    past_1: Tensor
    table_J: Tensor | None
    image: ImageInput | None


class TokenInput(NamedTuple):
    """The new tokens of B running sequences, T = B * q rows. len_B: tokens of each sequence, new ones included.

    A padded sequence has one token. real_1: the number of the T rows that are not padding; they come first.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    real_1: Tensor
    table_BJ: Tensor
    len_B: Tensor
    image: ImageInput | None


class TileInput(NamedTuple):
    """One image: all tiles of the canvas as uint8, padding tiles included.

    aspect_1: aspect-ratio id, counted from 1. real_1: the number of tiles that are not padding. slot_S: the slot that each
    token's K/V are written to.
    """

    tiles_C3hw: Tensor
    aspect_1: Tensor
    real_1: Tensor
    slot_S: Tensor
