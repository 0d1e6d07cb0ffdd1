"""The trees that the model's functions take: weights, pages and the static-shaped inputs of each step.

    B sequences   T token rows   J pages a sequence   C tiles   S patch rows   h w pixels
"""

from typing import NamedTuple, Optional

from torch import Tensor, nn


class Node(nn.Module):
    """A branch of the weight tree. It has no forward: a module only because compilers want Parameters on modules."""


class Leaf(Node):
    """Of a linear layer or a layer norm: weight (out, in), an optional scale of a quantised weight, a bias or None."""

    def __init__(self):
        super().__init__()
        self.scale: Optional[Tensor] = None
        self.register_parameter("bias", None)


def matrices(root: Node) -> list[nn.Parameter]:
    """The weights of linear layers, which a backend may lay out as its kernels read them; only `Ops.linear` reads them."""
    return [weight for path, weight in root.named_parameters()
            if path.endswith(".weight") and weight.dim() == 2 and not path.endswith("embed.weight")]


# One pair of (N, P, K, H) tensors a layer: K and V apart, allocated once.
Pages = tuple[tuple[Tensor, Tensor], ...]


class ImageInput(NamedTuple):
    """What each row sees of images.

    table_BJ: image pages of a sequence, image after image. fill_BJ: tokens in each (an image seldom fills its last).
    see_T2: the table entries [from, to) that a row sees; from == to is a row that sees no image.
    """

    table_BJ: Tensor
    fill_BJ: Tensor
    see_T2: Tensor


class PromptInput(NamedTuple):
    """A chunk of one sequence's prompt, padded to T rows. int32 throughout.

    slot_T: where each row's K/V go. last_1: the row whose logits are wanted. real_1: how many rows are no padding; they
    come first. past_1: earlier tokens, held by table_J.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    last_1: Tensor
    real_1: Tensor
    past_1: Tensor
    table_J: Optional[Tensor]
    image: Optional[ImageInput]


class TokenInput(NamedTuple):
    """The fresh tokens of B running sequences, T = B * q rows. len_B counts a sequence's tokens, fresh ones included.

    A padded sequence has one token. real_1: how many of the T rows are no padding; they come first.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    real_1: Tensor
    table_BJ: Tensor
    len_B: Tensor
    image: Optional[ImageInput]


class TileInput(NamedTuple):
    """One image: all its tiles as uint8, padding tiles included.

    aspect_1: 1-based aspect-ratio id. real_1: tiles that are not padding. slot_S: where each token's K/V go.
    """

    tiles_C3hw: Tensor
    aspect_1: Tensor
    real_1: Tensor
    slot_S: Tensor
