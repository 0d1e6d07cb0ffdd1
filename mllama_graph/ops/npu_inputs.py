"""A step's inputs as an NPU's graphs take them: lengths, tables and masks are made on the host.

Attention's tiling on the device waits for its lengths, so that arithmetic in front of them delays the first layer, and
some of that arithmetic on integers would run on the host's side of the device (AICPU). Here it costs microseconds.

B sequences   T token rows   R rows per sequence   J entries of a block table   P tokens per page   L keys (J * P)
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mllama_graph.model.inputs import ImageInput, MixedInput, Prepared, PromptInput, TileInput, TokenInput
from mllama_graph.ops.npu_parts import image_parts, text_parts
from mllama_graph.ops.pages import by_sequence

# docs of npu_fused_infer_attention_score: "(2048, 2048)" for sparse_mode 2, 3 and 4.
MASK_SIDE = 2048
# Fields that prefill and decode graphs do not read. They stay on the host.
UNREAD = ("real_1", "outputs_1", "decoding_1", "rows_B", "past_B", "fill_BJ", "see_T2")
# Fields of a mixed step's parts that it has for all rows.
OF_ALL_ROWS = ("ids_T", "position_T", "slot_T", "last_B", "sees_T1")


@cache
def causal_mask(device: torch.device) -> Tensor:
    """The fixed mask of the causal modes: true above the diagonal, for the keys that a row must not see."""
    return torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.bool).triu(1).to(device)


def with_places(given: Any, page_size: int, kv_heads: int) -> Any:
    """A step's inputs with the places of the scales of int8 pages, on the CPU. kv_heads: of this rank."""
    slot_T = given.slot_S if isinstance(given, TileInput) else given.slot_T
    head_K = torch.arange(kv_heads, dtype=torch.int32)
    places = torch.broadcast_tensors((slot_T // page_size)[:, None], head_K, (slot_T % page_size)[:, None])
    return given._replace(prepared=Prepared(scale_at_TK3=torch.stack(places, -1)))


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
    T = len(given.ids_T)
    rows = T // len(given.len_B) if isinstance(given, TokenInput) else T
    made = _held(given, held)._replace(causal_MM=causal_MM if rows > 1 else None)
    if isinstance(given, TokenInput):
        if given.image is not None:
            made = made._replace(**_decode_image(given.image, page_size))
        return _split(given._replace(len_B=given.len_B.long(), prepared=made), page_size, packed, parts)
    row_BT = torch.arange(T, dtype=torch.int32)[None]
    if given.table_BJ is not None:
        # A sequence that is padding has one row, and one key in a scratch page.
        keys_B = (given.past_B + given.rows_B).clamp(min=1).long()
        made = made._replace(new_B=given.rows_B.clamp(min=1).long(), keys_B=keys_B)
        if len(keys_B) > 1:
            row_BT, at_T = (index.int() for index in by_sequence(given.rows_B, T))
            made = made._replace(row_BT=row_BT, at_T=at_T)
    if given.image is not None:
        made = made._replace(**_prompt_image(given.image, page_size, row_BT, given.rows_B))
    return given._replace(prepared=made)


def prepare_rows(given: MixedInput, held: range | None) -> MixedInput:
    """A mixed step's inputs with what its graph takes for all rows; its parts are prepared by themselves."""
    sees_T1 = None if given.see_T2 is None else given.see_T2[:, 1:] > given.see_T2[:, :1]
    return given._replace(prepared=_held(given, held)._replace(sees_T1=sees_T1))


def held_rows(ids_T: Tensor, held: range) -> tuple[Tensor, Tensor]:
    """The row of each id in a rank's part of the embedding table, row_T, and whether it is there, held_T1."""
    held_T = (ids_T >= held.start) & (ids_T < held.stop)
    return torch.where(held_T, ids_T - held.start, 0), held_T[:, None]


def _held(given: PromptInput | TokenInput | MixedInput, held: range | None) -> Prepared:
    """Which rows of its part of the embedding table a rank looks up."""
    made = given.prepared or Prepared()
    if held is None:
        return made
    row_T, held_T1 = held_rows(given.ids_T, held)
    return made._replace(row_T=row_T, held_T1=held_T1)


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


def _image(image: ImageInput, P: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What all steps take of images; and entry_J, empty_BJP: the entries of a table, and which slots hold no token."""
    # The caller discards rows that see no image; they see every key, so that no row is fully masked.
    sees_T1 = image.see_T2[:, 1:] > image.see_T2[:, :1]
    # Pages after the last used entry are not read. A sequence without images reads one page, whatever it holds.
    used_B = (image.fill_BJ > 0).sum(-1).clamp(min=1)
    found = {"image_len_B": used_B * P, "sees_T1": sees_T1}
    return found, torch.arange(image.fill_BJ.shape[1], dtype=torch.int32), torch.arange(P) >= image.fill_BJ[:, :, None]


def _decode_image(image: ImageInput, P: int) -> dict[str, Tensor]:
    found, entry_J, empty_BJP = _image(image, P)
    B, J = image.fill_BJ.shape
    from_BR1, to_BR1 = image.see_T2.view(B, -1, 2).split(1, dim=-1)
    hidden_BRJ = (entry_J < from_BR1) | (entry_J >= to_BR1)
    unseen_BRL = (hidden_BRJ[..., None] | empty_BJP[:, None]).view(B, -1, J * P) & found["sees_T1"].view(B, -1, 1)
    return found | {"unseen_B1RL": unseen_BRL[:, None]}


def _prompt_image(image: ImageInput, P: int, row_BT: Tensor, rows_B: Tensor) -> dict[str, Tensor]:
    """The mask of a long prompt is made in its graph: it would take longer to copy than to compute."""
    found, entry_J, empty_BJP = _image(image, P)
    B, J = image.fill_BJ.shape
    entry_BJP = torch.where(empty_BJP, J, entry_J[:, None])
    # Rows behind a sequence's own are not computed, but their mask must not hide every key either.
    own_BT1 = (torch.arange(row_BT.shape[1]) < rows_B[:, None])[..., None]
    sees_BT1 = found["sees_T1"][row_BT] & own_BT1
    from_BT1, to_BT1 = image.see_T2[row_BT].split(1, dim=-1)
    return found | {
        "entry_B1L": entry_BJP.view(B, 1, -1),
        "from_BT1": torch.where(sees_BT1, from_BT1, 0),
        "to_BT1": torch.where(sees_BT1, to_BT1, J + 1),
    }
