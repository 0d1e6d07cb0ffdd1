"""GE's fused attention: softmax(scale * q k^T + mask) v, over contiguous or paged keys, with its documented limits.

B sequences   R query rows per sequence   T query rows of all sequences   Q query heads   K key-value heads
D head width   L keys
"""

import torch
from torch import Tensor

from mllama_graph.ascend.ge_ops.registry import GraphError, integers, operation, require

INT_MAX = 2147483647
# docs npu_fused_infer_attention_score: side of the fixed mask that the causal modes take.
MASK_SIDE = 2048
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_DOCS = "docs npu_fused_infer_attention_score: "
# TND with pages: its page size, and the widest head (tiling code of CANN 8.5 to 9.1, IsUsingFAI, CheckFAISinglePara).
TND_PAGE, TND_WIDTH = 128, 256
_TILING = "tiling code of fused_infer_attention_score, TND: "
# int8 pages: a scale for each token and head, in pages; the multiple of a page and of a head's width.
BY_TOKEN_AND_HEAD, INT8_MULTIPLE = 5, 32


@operation("FusedInferAttentionScore", source="docs npu_fused_infer_attention_score")
def attention(
    query: Tensor,
    key0: Tensor,
    value0: Tensor,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    block_table: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    *,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    query_quant_mode: int = 0,
    softmax_lse_flag: bool = False,
    pse_type: int = 0,
    out_dtype: int = 0,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention in the layouts BSH and TND, and to int8 pages. `wide` allows fp32, which no kernel supports.

    Rows behind a sequence's own length are not computed: what a kernel leaves there is undefined, here NaN. So are the
    results of a sequence without keys; its log-sum-exp is +inf (ops-transformer, aclnnFusedInferAttentionScore.md).
    """
    unused = (pre_tokens != INT_MAX, next_tokens != INT_MAX, antiquant_mode, query_quant_mode, pse_type, out_dtype)
    require(not any(unused), "other quantisation than that of pages, token windows and pse are not known")
    require(input_layout in ("BSH", "TND"), f"layout {input_layout!r} is not known")
    kv_heads, shape = num_key_value_heads or num_heads, query.shape
    if input_layout == "TND":
        query = _padded(query, key0, num_heads, kv_heads, actual_seq_lengths, block_table, atten_mask, inner_precise)
        actual_seq_lengths = None
    B, R, D = query.shape[0], query.shape[1], query.shape[2] // num_heads
    _check_heads(query, key0, value0, num_heads, kv_heads, D, wide)
    scales = (key_antiquant_scale, value_antiquant_scale)
    _check_codes(key0, scales, (key_antiquant_mode, value_antiquant_mode), kv_heads, R, block_table is not None)
    if block_table is not None:
        lengths = _check_pages(key0, block_table, actual_seq_lengths_kv, block_size, B, R)
        columns = block_table.shape[1] * block_size
    else:
        require(block_size == 0, "a block size is known with pages alone")
        require(key0.shape[0] == B, _DOCS + f"{key0.shape[0]} sequences of keys for {B} of queries")
        lengths, columns = _check_lengths(actual_seq_lengths_kv, B, key0.shape[1]), key0.shape[1]
    _check_mask(atten_mask, sparse_mode, inner_precise, B, R, columns)
    rows = _check_rows(actual_seq_lengths, B, R)
    out, lse = torch.full((B, R, num_heads * D), torch.nan), torch.full((B, num_heads, R, 1), torch.inf)
    for b, (count, length) in enumerate(zip(rows, lengths, strict=True)):
        if block_table is not None:
            pages = block_table[b, : -(-length // block_size)].long()
            require(
                bool(((pages >= 0) & (pages < key0.shape[0])).all()), f"block table {b} names a page that is not there"
            )
            k, v = (
                _values(data[pages], None if scale is None else scale[pages], kv_heads)[:length]
                for data, scale in zip((key0, value0), scales, strict=True)
            )
        else:
            k, v = (data[b, :length].view(-1, kv_heads, D) for data in (key0, value0))
        unseen = None
        if R > 1 and sparse_mode == 3:
            unseen = torch.arange(length)[None, :] > torch.arange(count)[:, None] + length - count
        elif atten_mask is not None:
            unseen = atten_mask[b if atten_mask.shape[0] > 1 else 0, 0, :count, :length].bool()
        if length:
            out[b, :count], lse[b, :, :count, 0] = _attend(
                query[b, :count].view(count, num_heads, D), k, v, unseen, scale
            )
    # Without its flag, the second output is not computed; a graph that reads it is refused.
    given_lse = lse if input_layout == "BSH" else lse.transpose(1, 2).reshape(-1, num_heads, 1)
    return out.to(query.dtype).view(shape), given_lse if softmax_lse_flag else None


def _padded(
    q_TQD: Tensor,
    pages: Tensor,
    heads: int,
    kv_heads: int,
    ends: Tensor | None,
    table: Tensor | None,
    mask: Tensor | None,
    inner_precise: int,
) -> Tensor:
    """The query rows of a layout TND as (B, R, Q * D), after a check of its limits; each sequence has equally many."""
    T, _, D = q_TQD.shape
    if ends is None or ends.dtype != torch.int64:
        raise GraphError(_DOCS + "TND needs actual_seq_lengths in int64")
    values, rows = integers(ends), T // max(1, ends.numel())
    require(
        values == [rows * (b + 1) for b in range(len(values))] and values[-1] == T,
        f"actual_seq_lengths {values} of TND must be the cumulative rows of sequences, equally many of each, up to {T}",
    )
    require(table is not None and pages.dim() == 3, _TILING + "known here only for pages (N, P, K * D)")
    require(pages.shape[1] == TND_PAGE, _TILING + f"pages of {pages.shape[1]} tokens, not {TND_PAGE}")
    require(D <= TND_WIDTH, _TILING + f"heads {D} wide are above {TND_WIDTH}")
    require(heads > kv_heads and inner_precise == 0, _TILING + "serves grouped heads, with inner_precise 0")
    require(mask is None or mask.shape[-1] == MASK_SIDE, _TILING + "takes no mask but the fixed one of sparse_mode 3")
    return q_TQD.reshape(len(values), rows, heads * D)


def _check_rows(lengths: Tensor | None, B: int, R: int) -> list[int]:
    """The number of query rows of each sequence."""
    if lengths is None:
        return [R] * B
    # Tiling code of CANN 8.5 to 9.1: with one row, it drops the lengths of queries.
    require(R > 1, "lengths of queries that have one row are not read")
    rows = integers(lengths)
    require(lengths.dtype == torch.int64 and len(rows) == B, _DOCS + f"{len(rows)} lengths of queries, {lengths.dtype}")
    require(all(0 < count <= R for count in rows), _DOCS + f"{rows} query rows of {R}")
    return rows


def _values(codes_JPx: Tensor, scale_JKP: Tensor | None, kv_heads: int) -> Tensor:
    """The keys or values (J * P, K, D) of pages."""
    data = codes_JPx.view(*codes_JPx.shape[:2], kv_heads, -1)
    return (data if scale_JKP is None else data.float() * scale_JKP.transpose(1, 2)[..., None]).flatten(0, 1)


def _check_codes(
    pages: Tensor, scales: tuple[Tensor | None, ...], modes: tuple[int, int], kv_heads: int, R: int, paged: bool
) -> None:
    """Checks the limits of int8 pages."""
    if pages.dtype != torch.int8:
        require(scales == (None, None) and modes == (0, 0), "scales are known with int8 pages alone")
        return
    require(paged and R == 1, _DOCS + f"int8 keys with {R} query rows; pages of codes serve one")
    require(
        modes == (BY_TOKEN_AND_HEAD, BY_TOKEN_AND_HEAD),
        f"modes {modes} of int8 pages, of which {BY_TOKEN_AND_HEAD} is known",
    )
    (N, P, _), D = pages.shape, pages.shape[2] // kv_heads
    for scale in scales:
        shape = None if scale is None else (scale.dtype, tuple(scale.shape))
        require(shape == (torch.float32, (N, kv_heads, P)), _DOCS + f"scales {shape}, not fp32 ({N}, {kv_heads}, {P})")
    require(P % INT8_MULTIPLE == 0, _DOCS + f"a page of {P} tokens in int8; a multiple of {INT8_MULTIPLE} is needed")
    require(D % INT8_MULTIPLE == 0, f"tiling code: a head width of {D} in int8 is not a multiple of {INT8_MULTIPLE}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, D: int, wide: bool) -> None:
    allowed = (*SIXTEEN_BIT, torch.float32) if wide else SIXTEEN_BIT
    fits = k.dtype == v.dtype and k.dtype in (q.dtype, torch.int8) and q.dtype in allowed
    require(fits, _DOCS + f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    require(
        q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape, _DOCS + "BSH tensors have 3 axes, K and V one shape"
    )
    require(
        q.shape[2] == heads * D and k.shape[2] == kv_heads * D,
        _DOCS + f"{q.shape[2]} and {k.shape[2]} are not heads * {D}",
    )
    require(
        heads % kv_heads == 0 and heads // kv_heads <= 64,
        _DOCS + f"{heads} query heads over {kv_heads} key-value heads",
    )
    require(
        q.shape[0] <= 65536 and heads <= 256 and D <= 512, _DOCS + f"B={q.shape[0]}, N={heads}, D={D} are too large"
    )
    require(D % 16 == 0, _DOCS + f"a head width of {D} is not a multiple of 16")
    require(q.shape[1] == 1 or heads * D < 65535, _DOCS + f"N * D = {heads * D} is not below 65535")


def _check_lengths(lengths: Tensor | None, B: int, L: int) -> list[int]:
    """The number of keys of each sequence, which are the first of L contiguous ones."""
    if lengths is None:
        return [L] * B
    values = integers(lengths)
    require(
        lengths.dtype == torch.int64 and len(values) == B, _DOCS + f"{len(values)} lengths of keys, {lengths.dtype}"
    )
    require(all(0 < value <= L for value in values), _DOCS + f"lengths {values} of {L} keys")
    return values


def _check_pages(pages: Tensor, table: Tensor, lengths: Tensor | None, block_size: int, B: int, R: int) -> list[int]:
    """Checks the limits of paged keys; returns the length of each sequence in tokens."""
    multiple, least = (16, 16) if R == 1 else (128, 128)
    require(block_size == pages.shape[1], f"block_size={block_size}, but pages hold {pages.shape[1]}")
    require(
        least <= block_size <= 512 and block_size % multiple == 0,
        _DOCS + f"a page of {block_size} tokens for {R} query rows; a multiple of {multiple} up to 512 is needed",
    )
    require(pages.numel() < 2**31, _DOCS + f"a cache of {pages.numel()} elements; it must stay below 2^31")
    require(pages.shape[2] <= 65535, _DOCS + f"KV_N * D = {pages.shape[2]} is above 65535")
    require(
        table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == B,
        _DOCS + f"a block table of {table.dtype} {tuple(table.shape)} for {B} sequences",
    )
    if lengths is None or lengths.dtype != torch.int64:
        raise GraphError(_DOCS + "pages need actual_seq_lengths_kv in int64")
    values = integers(lengths)
    # One length for all sequences is documented, too; the tiling code of CANN 9.1 takes it for the first one's.
    require(len(values) == B, f"{len(values)} lengths for {B} sequences")
    used = [-(-value // block_size) for value in values]
    require(
        min(values) >= 0 and max(used) <= table.shape[1],
        _DOCS + f"lengths {values} in a table of {table.shape[1]} pages",
    )
    require(sum(used) <= pages.shape[0], _DOCS + f"{sum(used)} pages are used by all sequences, {pages.shape[0]} exist")
    return values


def _check_mask(mask: Tensor | None, sparse_mode: int, inner_precise: int, B: int, R: int, columns: int) -> None:
    require(sparse_mode in (0, 3), f"sparse_mode {sparse_mode} is not known")
    # Tiling code of CANN 8.5 to 9.1: one row silently resets sparse_mode to 0, and reads the fixed mask as a plain one.
    require(sparse_mode == 0 or R > 1, f"sparse_mode {sparse_mode} for one query row, which resets it to 0")
    require(
        inner_precise in ((0, 1) if R == 1 else (0, 1, 2, 3)),
        _DOCS + f"inner_precise {inner_precise} for {R} query rows",
    )
    if mask is not None:
        require(mask.dtype in (torch.bool, torch.int8, torch.uint8), _DOCS + f"a mask of {mask.dtype}")
    if sparse_mode == 3 and R > 1:
        if mask is None or tuple(mask.shape) != (MASK_SIDE, MASK_SIDE):
            raise GraphError(_DOCS + "sparse_mode 3 takes a 2048 x 2048 mask")
        triangle = torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.bool).triu(1)
        require(
            bool((mask.bool() == triangle).all()),
            _DOCS + "the mask of sparse_mode 3 hides what lies above the diagonal",
        )
    elif mask is not None:
        require(
            tuple(mask.shape) in ((B, 1, R, columns), (1, 1, R, columns)),
            _DOCS + f"a mask {tuple(mask.shape)} for {B} x {R} rows and {columns} columns",
        )
        require(
            not bool(mask.bool().all(-1).any()) or inner_precise >= 2,
            _DOCS + "a row is wholly masked, which needs inner_precise 2 or 3",
        )


def _attend(
    q_RQD: Tensor, k_LKD: Tensor, v_LKD: Tensor, unseen_RL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence's attention in fp32, (R, Q * D), and the log-sum-exp of its scores, (Q, R).

    0 for a row that sees no key. `unseen` broadcasts over heads.
    """
    group = q_RQD.shape[1] // k_LKD.shape[1]
    k_LQD, v_LQD = (x.float().repeat_interleave(group, dim=1) for x in (k_LKD, v_LKD))
    score = torch.einsum("rqd,lqd->qrl", q_RQD.float(), k_LQD) * scale
    if unseen_RL is not None:
        score = score.masked_fill(unseen_RL, -torch.inf)
    out = torch.einsum("qrl,lqd->rqd", score.softmax(-1).nan_to_num(0.0), v_LQD).reshape(q_RQD.shape[0], -1)
    return out, score.logsumexp(-1)
