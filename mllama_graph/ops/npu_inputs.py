"""A step's inputs as an NPU's graphs take them: lengths, tables and masks are made on the host.

Attention's tiling on the device waits for its lengths, so that arithmetic in front of them delays the first layer, and
some of that arithmetic on integers would run on the host's side of the device (AICPU). Here it costs microseconds.

B sequences   T token rows   R rows per sequence   J entries of a block table   P tokens per page   L keys (J * P)
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mllama_graph.model.inputs import ImageInput, Prepared, PromptInput, TokenInput
from mllama_graph.ops.npu_parts import image_parts, text_parts

# docs of npu_fused_infer_attention_score: "(2048, 2048)" for sparse_mode 2, 3 and 4.
MASK_SIDE = 2048
# Fields that prefill and decode graphs do not read. They stay on the host.
UNREAD = ("real_1", "past_1", "table_J", "fill_BJ", "see_T2")


@cache
def causal_mask(device: torch.device) -> Tensor:
    """The fixed mask of the causal modes: true above the diagonal, for the keys that a row must not see."""
    return torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.bool).triu(1).to(device)


def prepare(
    given: PromptInput | TokenInput,
    page_size: int,
    causal_MM: Tensor,
    held: range | None,
    packed: bool = False,
    parts: tuple[int, int] = (1, 1),
) -> Any:
    """A step's inputs with what its graph takes; all tensors are on the CPU, except causal_MM.

    held: the ids whose rows of the embedding table this rank holds; None if it holds them all. packed: whether a decode
    step attends to text in the layout TND. parts: of each sequence's text and image keys in a decode step.
    """
    T, decode = len(given.ids_T), isinstance(given, TokenInput)
    rows = T // len(given.len_B) if isinstance(given, TokenInput) else T
    made = Prepared(causal_MM=causal_MM if rows > 1 else None)
    if held is not None:
        held_T = (given.ids_T >= held.start) & (given.ids_T < held.stop)
        made = made._replace(row_T=torch.where(held_T, given.ids_T - held.start, 0), held_T1=held_T[:, None])
    if given.image is not None:
        made = made._replace(**_image(given.image, page_size, decode))
    if isinstance(given, TokenInput):
        return _split(given._replace(len_B=given.len_B.long(), prepared=made), page_size, packed, parts)
    return given._replace(prepared=made if given.table_J is None else made._replace(**_chunk(given, page_size)))


def prepare_captured(given: TokenInput, page_size: int, held: range | None, parts: tuple[int, int]) -> TokenInput:
    """A decode step's inputs for captured kernels, as `prepare` makes them; with masks instead of lengths."""
    R = len(given.ids_T) // len(given.len_B)
    found: TokenInput = prepare(given, page_size, torch.empty(0), held, False, parts)
    (made, (_, J), len_B) = found.prepared, found.table_BJ.shape, found.len_B
    assert made is not None
    last_BR1 = (len_B[:, None] - R + torch.arange(R))[..., None]
    unseen_B1RL = (torch.arange(J * page_size) > last_BR1)[:, None]
    made = made._replace(unseen_keys_B1RL=unseen_B1RL, causal_MM=None)
    if made.unseen_B1RL is not None and made.image_len_B is not None:
        behind_BL = torch.arange(made.unseen_B1RL.shape[-1]) >= made.image_len_B[:, None]
        made = made._replace(unseen_B1RL=made.unseen_B1RL | behind_BL[:, None, None])
    return found._replace(prepared=made)


def _split(given: TokenInput, P: int, packed: bool, parts: tuple[int, int]) -> TokenInput:
    """The inputs of a decode step with the keys of each sequence in parts; packed: with the ends of its rows."""
    made, image, B = given.prepared, given.image, len(given.len_B)
    assert made is not None and (max(parts) == 1 or len(given.ids_T) == B), "parts serve one row per sequence"
    if packed:
        made = made._replace(ends_B=torch.arange(1, B + 1) * (len(given.ids_T) // B))
    if parts[0] > 1:
        table_BJ, len_B, empty_BS11 = text_parts(given.table_BJ, given.len_B, parts[0], P)
        made, given = made._replace(empty_BS11=empty_BS11), given._replace(table_BJ=table_BJ, len_B=len_B)
    if image is not None and parts[1] > 1:
        table_BJ, len_B, empty_BS11, unseen_B1RL = image_parts(image, parts[1], P)
        made = made._replace(image_len_B=len_B, image_empty_BS11=empty_BS11, unseen_B1RL=unseen_B1RL)
        given = given._replace(image=image._replace(table_BJ=table_BJ))
    return given._replace(prepared=made)


def _image(image: ImageInput, P: int, decode: bool) -> dict[str, Tensor]:
    (B, J), see_T2 = image.fill_BJ.shape, image.see_T2
    entry_J = torch.arange(J, dtype=torch.int32)
    empty_BJP = torch.arange(P) >= image.fill_BJ[:, :, None]
    # The caller discards rows that see no image; they see every key, so that no row is fully masked.
    sees_T1 = see_T2[:, 1:] > see_T2[:, :1]
    # Pages after the last used entry are not read. A sequence without images reads one page, whatever it holds.
    used_B = (image.fill_BJ > 0).sum(-1).clamp(min=1)
    found = {"image_len_B": used_B * P, "sees_T1": sees_T1}
    if decode:
        from_BR1, to_BR1 = see_T2.view(B, -1, 2).split(1, dim=-1)
        hidden_BRJ = (entry_J < from_BR1) | (entry_J >= to_BR1)
        unseen_BRL = (hidden_BRJ[..., None] | empty_BJP[:, None]).view(B, -1, J * P) & sees_T1.view(B, -1, 1)
        return found | {"unseen_B1RL": unseen_BRL[:, None]}
    # The mask of a long prompt is made in its graph: it would take longer to copy than to compute.
    entry_L = torch.where(empty_BJP[0], J, entry_J[:, None]).view(-1)
    from_T1, to_T1 = torch.where(sees_T1, see_T2[:, :1], 0), torch.where(sees_T1, see_T2[:, 1:], J + 1)
    return found | {"entry_L": entry_L, "from_T1": from_T1, "to_T1": to_T1}


def _chunk(given: PromptInput, P: int) -> dict[str, Tensor]:
    """Lengths, and the block table that names the pages of the new tokens too, which have been written."""
    assert given.table_J is not None
    past, new, T = int(given.past_1), int(given.real_1), len(given.ids_T)
    earlier = -(-past // P)
    table_J = torch.zeros(len(given.table_J) + -(-T // P), dtype=torch.int32)
    table_J[:earlier] = given.table_J[:earlier]
    table_J[torch.arange(past, past + new) // P] = given.slot_T[:new] // P
    # Masked entries name a page of the same sequence: 0 * NaN is NaN.
    table_J[-(-(past + new) // P) :] = table_J[0].clone()
    return {"table_1J": table_J[None], "rows_1": torch.tensor([new]), "keys_1": torch.tensor([past + new])}


def on_device(given: Any, device: torch.device, unread: tuple[str, ...] = UNREAD) -> Any:
    """The inputs of a step on the device, except the fields named in `unread`."""
    if isinstance(given, Tensor):
        return given.to(device)
    if given is None:
        return None
    moved = {name: on_device(value, device, unread) for name, value in given._asdict().items() if name not in unread}
    return given._replace(**moved)
