"""The interface between model and backends: every operation that a backend may replace by a fused one of its own.

The model in mllama_graph/model/ uses only `Ops`. ops/plain.py is the reference implementation; any other one must agree
with it on every test of tests/ops/. Shape letters:

    B sequences   T token rows (packed)   D model width   Q query heads   K kv heads   H head width
    F mlp width   V vocabulary   N pages   P tokens per page   J pages per sequence
    C tiles   N patches per tile   L tokens per tile   W rows of an image   S tokens of an image
    E vision width   U vision output
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Bytes of which a head is a multiple on an NPU (docs of npu_fused_infer_attention_score): 16 elements in 16 bits, 32 of
# int8 pages.
NPU_HEAD_BYTES = 32


# Head widths for which an NPU's attention has its fast template (tiling code of CANN 8.5 to 9.1, ops-transformer).
FAST_HEADS = (64, 128)


def padded_head(width: int, bytes_each: int = 2) -> int:
    """The head width of an NPU's attention and pages for a model's head width. bytes_each: of an element of pages."""
    multiple = NPU_HEAD_BYTES // min(bytes_each, 2)
    return -(-width // multiple) * multiple


def fast_head(width: int) -> int:
    """The least head width, from a model's on, with an NPU's fast template of attention; its own if there is none."""
    return next((fast for fast in FAST_HEADS if fast >= width), width)


@dataclass(frozen=True)
class Ops:
    """One callable per operation. Names ending in _ write into their arguments.

    `linear` leaves have `.weight` (out, in), and `.bias` or None. `pages` are a layer's K and V (N, P, K, H), in the
    dtype of activations or a narrower one; int8 pages are followed by the scales of each, fp32 (N, K, P). Attention
    sees every key and value as pages hold it, those of new rows too.
    """

    # (ops, a step's input) -> ops for that step, which may skip padding rows, or take what the host prepared for it
    without_padding: Callable
    # (ids_T, leaf with weight) -> x_TD
    embed: Callable
    # (ids_T, leaf with weight and .first, the id of its first row) -> x_TD, zeros for ids without a row in it
    embed_held: Callable
    # (x_...I, leaf) -> y_...O, in the dtype of x whatever the dtype of the weight
    linear: Callable
    # (x_TD, weight, eps) -> y_TD: computed in fp32, cast to the dtype of x, then times weight
    rms_norm: Callable
    # (x_TD, y_TD or None, weight, eps) -> (norm(x + y), x + y)
    add_rms_norm: Callable
    # (x_..E, leaf with weight and bias, eps) -> y_..E
    layer_norm: Callable
    # (position_T, inv_freq_h) -> (cos_TH, sin_TH) in fp32
    rope_angles: Callable
    # (x_TQH, (cos_TH, sin_TH)) -> x_TQH rotated, the first half of H paired with the second
    rope: Callable
    # (h_T2F: gate, then up) -> silu(gate) * up as h_TF
    swiglu: Callable
    # exact (erf) gelu
    gelu: Callable
    # (see_T2 of an ImageInput) -> which rows see an image, in the form that this backend's `gated` takes
    sees_image: Callable
    # (y_TD, gate_1, result of sees_image) -> tanh(gate) * y, zeros for rows that see no image
    gated: Callable
    # (x_WE, y_WE, bias_E or None, gate_1 or None) -> x + tanh(gate) * (y + bias)
    add_gated: Callable
    # (x_TD, at_B) -> x_BD, the rows with these indices
    take_rows: Callable
    # (uint8 tiles_C3hw, real_1, scale, mean_311, std_311, dtype) -> x_C3hw, zeros in padding tiles
    normalise: Callable
    # (x_C3hw, weight_E3pp) -> patches_CNE
    patch_embed: Callable
    # (x_CRE, table, aspect_1, gate_1) -> x + tanh(gate) * the embedding of each tile in an image of that aspect ratio
    add_tile_embedding: Callable
    # (patches_CNE, class_E, position_LE, table, aspect_1, gate_1) -> x_CLE: class token first, positions added
    add_positions: Callable
    # (x_CLE, real_1 or the number of real tiles, multiple) -> (x_WE, pad_W): each tile's rows padded with zeros, and
    # which rows are padding, in the form that this backend's `attend_tiles` takes. A backend chooses the order of rows
    pad_rows: Callable
    # (x_WE of pad_rows, tiles, tokens) -> its rows by tile, as parts x_CrE that give x_WE again when they are joined
    rows_by_tile: Callable
    # (x_WE, kept list of x_WE, tiles, tokens) -> x_SU: each tile's tokens, each followed by its kept features
    join_features: Callable
    # (k_TKH, v_TKH, pages, slot_T): writes row t to slot slot_T[t]; slots are unique
    write_pages_: Callable
    # (q_TQH, k_TKH, v_TKH, pages, table_BJ, rows_B, past_B): each sequence's rows_B new rows see its past_B earlier
    # tokens and, causally, each other. All have been written to the pages of table_BJ; None: one sequence, no earlier
    attend_prompt: Callable
    # (q_TQH, pages, table_BJ, len_B): T = B * q; row i of a sequence sees its first len - q + 1 + i tokens
    attend_pages: Callable
    # (q_TQH, pages, table_BJ, fill_BJ, see_T2, rows_B): row t sees the first fill tokens of the entries
    # see[0] .. see[1]-1 of its sequence. rows_B: rows of each sequence; None: T / B
    attend_image: Callable
    # (q_SAH, k_SAH, v_SAH, pad_S, scale): all rows see all rows, but padding does not see padding
    attend_tiles: Callable
    # (x_BV, k) -> (value_Bk, column_Bk): the k largest of each row in descending order, equal ones in any order
    top_k: Callable
    # sum over ranks
    all_reduce: Callable[[Tensor], Tensor]
    # stack over ranks: x -> (world, *x.shape)
    all_gather: Callable[[Tensor], Tensor]
