"""Pages of an NPU in 16 bits and in int8: how rows are written, and in which form attention takes keys and values.

Codes and fp32 scales of int8 pages, one per token and head, are those of pages.py. Never run on an NPU. "docs" is
`_op_plugin_docs.py` of torch_npu 2.13.0.

    one query row     attention reads codes and scales from their pages: key_antiquant_mode 5, scales (N, K, P) in fp32
                      (docs npu_fused_infer_attention_score, Q_S = 1)
    several rows      its kernel takes no quantised pages (same docs, Q_S > 1: "page attention"). The pages of a block
                      table are gathered and widened, and attention takes them as contiguous keys and values.
    head width        a multiple of 32 (tiling code of CANN 8.5 to 9.1); pages are padded as 16-bit ones are to 16
    writes            two operations: npu_scatter_pa_kv_cache for codes; npu_scatter_nd_update_ for scales, whose order
                      in memory is not that of the codes. Its indices come from the host.

T token rows   J pages in a table   N pages   P tokens per page   K kv heads   H head width   L keys
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from mllama_graph.model.inputs import LayerPages, Prepared
from mllama_graph.model.ops import Ops
from mllama_graph.ops.pages import gather

# key_antiquant_mode: a scale for each token and head, in pages.
BY_TOKEN_AND_HEAD = 5


def widen(x: Tensor, width: int) -> Tensor:
    """Pad the last axis of x with zeros to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def write_pages_(
    k_TKH: Tensor, v_TKH: Tensor, pages: LayerPages, slot_T: Tensor, scale_at_TK3: Tensor | None = None
) -> None:
    """scale_at_TK3: of int8 pages, where the scale of each row and head is in (N, K, P)."""
    # docs: all four tensors have one dtype; "Norm" is for pages in their natural order. The argument is the pages
    # themselves and not a view of them, for which the compiler would copy the whole pool.
    k, v = k_TKH.to(pages[0].dtype), v_TKH.to(pages[0].dtype)
    if len(pages) > 2:
        assert scale_at_TK3 is not None, "an NPU's step takes the places of scales from the host (npu_inputs.py)"
        (k, k_scale_TK), (v, v_scale_TK) = (torch_npu.npu_dynamic_quant(x_TKH) for x_TKH in (k_TKH, v_TKH))
        torch_npu.npu_scatter_nd_update_(pages[2], scale_at_TK3, k_scale_TK)
        torch_npu.npu_scatter_nd_update_(pages[3], scale_at_TK3, v_scale_TK)
    k, v = (widen(x, pages[0].shape[-1]) for x in (k, v))
    torch_npu.npu_scatter_pa_kv_cache(k, v, *pages[:2], slot_T, cache_mode="Norm")


def writing(ops: Ops, made: Prepared | None) -> Ops:
    """The operations of a step that writes int8 pages, with the places of their scales."""
    if made is None or made.scale_at_TK3 is None:
        return ops
    return replace(ops, write_pages_=partial(ops.write_pages_, scale_at_TK3=made.scale_at_TK3))


def as_stored(x_TKH: Tensor, pages: LayerPages) -> Tensor:
    """New rows of K or V, padded and rounded as they are when they are written to pages and read from them."""
    width = pages[0].shape[-1]
    if len(pages) == 2:
        return widen(x_TKH, width)
    codes, scale_TK = torch_npu.npu_dynamic_quant(x_TKH)
    return (widen(codes, width).float() * scale_TK[..., None]).to(x_TKH.dtype)


def read(pages: LayerPages, table_BJ: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys, values and arguments with which attention of `rows` query rows per sequence reads pages.

    K and V are pages (N, P, K, H), or contiguous (B, L, K, H) where its kernel can't read int8 pages.
    """
    paged: dict[str, Any] = {"block_table": table_BJ, "block_size": pages[0].shape[1]}
    if len(pages) == 2:
        return pages[0], pages[1], paged
    if rows > 1:
        return *gather(pages, table_BJ, dtype), {}
    mode = {"key_antiquant_mode": BY_TOKEN_AND_HEAD, "value_antiquant_mode": BY_TOKEN_AND_HEAD}
    return pages[0], pages[1], paged | mode | {"key_antiquant_scale": pages[2], "value_antiquant_scale": pages[3]}
