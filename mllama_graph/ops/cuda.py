"""The operations on a CUDA device: plain.py's, with Triton kernels for paged attention of decode steps and, in
cuda_linear.py, for quantised linear layers.

Inductor compiles the rest, with SDPA for prompts and tiles. The kernels are registered with `triton_op`, so that
ahead-of-time packages contain them compiled and need no Python. Shape letters in addition to those of model/ops.py:

    R new rows per sequence   G query heads per kv head   S splits   M = R * G, the queries of one kv head

`_partial` is flash-decoding: a program handles one sequence, one kv head and one of S equal shares of the sequence's
keys. A share consists of whole tiles of keys, so that the last programs of a short sequence have no work. `_combine`
merges the S partial results, weighted by their softmax sums. The kernels read lengths from device memory.

Run by Triton's interpreter and compiled for sm_80 and sm_90 on hosts without a GPU; never run on a GPU.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.library import wrap_triton

from mllama_graph.model.inputs import LayerPages
from mllama_graph.model.ops import Ops
from mllama_graph.ops import cuda_linear, plain
from mllama_graph.ops.cuda_triton import DOT, jit, multiprocessors, operation, power_of_2, tl, triton
from mllama_graph.ops.plain import PLAIN
from mllama_graph.ops.ranks import ranked

LOG2_E = 1.4426950408889634
# Bytes of one tile of keys: two tiles (K and V) in two stages take 64 KiB of a multiprocessor's shared memory.
TILE_BYTES = 16384
# Most queries of a kv head that one program holds; SDPA handles more.
MOST_QUERIES = 64
# Programs per multiprocessor: one computes while another waits for memory.
PROGRAMS = 2
# Minimum keys per program, and the most splits that `_combine` holds in registers.
LEAST_KEYS, MOST_SPLITS = 128, 64


def splits(sequences: int, kv_heads: int, keys: int, multiprocessors: int) -> int:
    """Number of shares into which the keys of a sequence are split: enough to fill a device, but no tiny shares.

    `keys` is the most that a bucket holds; the number depends only on shapes, so that a graph can be captured.
    """
    to_fill = -(-PROGRAMS * multiprocessors // (sequences * kv_heads))
    return max(1, min(to_fill, keys // LEAST_KEYS, MOST_SPLITS))


@jit
def _partial(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    len_ptr,
    fill_ptr,
    see_ptr,
    k_scales_ptr,
    v_scales_ptr,
    partial_ptr,
    lse_ptr,
    R: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IMAGE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Attention over one share of keys: partial (B, K, S, M, H), and lse (B, K, S, M) in base 2.

    If a row sees no key of the share, its lse is -inf and its partial result is not written. With IMAGE, fill (B, J)
    and see (T, 2) are read, otherwise len (B). With SCALED, pages hold codes,
    and the scales (N, K, P) are read. SCALE includes log2(e).
    """
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m_M, h_H = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    real_M, real_H = m_M < R * G, h_H < H
    row_M = b * R + m_M // G

    # Row m sees the keys from_M .. to_M - 1 of the table; the program needs begin .. end - 1.
    if IMAGE:
        from_M = tl.load(see_ptr + row_M * 2, mask=real_M, other=0) * P
        to_M = tl.load(see_ptr + row_M * 2 + 1, mask=real_M, other=0) * P
        begin = tl.min(tl.where(to_M > from_M, from_M, J * P), axis=0)
        end = tl.minimum(tl.max(tl.where(to_M > from_M, to_M, 0), axis=0), J * P)
    else:
        length = tl.load(len_ptr + b)
        from_M = tl.zeros([BLOCK_M], dtype=tl.int32)
        to_M = length - R + 1 + m_M // G
        begin = length * 0
        end = tl.minimum(length, J * P)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), S) * BLOCK_N
    first = begin + split * share
    stop = tl.minimum(first + share, end)

    q_at = ((row_M * K + head) * G + m_M % G)[:, None] * H + h_H[None, :]
    q_MH = tl.load(q_ptr + q_at, mask=real_M[:, None] & real_H[None, :], other=0.0)
    top_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    out_MH = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    for start in range(first, stop, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        held_N = n_N < stop
        entry_N = b * J + n_N // P
        page_N = tl.load(table_ptr + entry_N, mask=held_N, other=0).to(tl.int64)
        if IMAGE:
            held_N = held_N & (n_N % P < tl.load(fill_ptr + entry_N, mask=held_N, other=0))
        at_N = ((page_N * P + n_N % P) * K + head) * H
        k_HN = tl.load(k_ptr + at_N[None, :] + h_H[:, None], mask=held_N[None, :] & real_H[:, None], other=0.0)
        v_NH = tl.load(v_ptr + at_N[:, None] + h_H[None, :], mask=held_N[:, None] & real_H[None, :], other=0.0)

        score_MN = tl.dot(q_MH, k_HN.to(q_MH.dtype), input_precision="ieee") * SCALE
        if SCALED:
            scale_N = (page_N * K + head) * P + n_N % P
            score_MN *= tl.load(k_scales_ptr + scale_N, mask=held_N, other=0.0)[None, :]
        seen_MN = held_N[None, :] & (n_N[None, :] >= from_M[:, None]) & (n_N[None, :] < to_M[:, None])
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        higher_M = tl.maximum(top_M, tl.max(score_MN, axis=1))
        # 0 for a row that has seen no key yet, as -inf - -inf is NaN.
        base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
        weight_MN = tl.exp2(score_MN - base_M[:, None])
        shrink_M = tl.exp2(top_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, axis=1)
        out_MH = out_MH * shrink_M[:, None]
        if SCALED:
            weight_MN *= tl.load(v_scales_ptr + scale_N, mask=held_N, other=0.0)[None, :]
        out_MH += tl.dot(weight_MN.to(q_MH.dtype), v_NH.to(q_MH.dtype), input_precision="ieee")
        top_M = higher_M

    seen_M = sum_M > 0
    safe_M = tl.where(seen_M, sum_M, 1.0)
    lse_at = ((b * K + head) * S + split) * (R * G) + m_M
    tl.store(lse_ptr + lse_at, tl.where(seen_M, top_M + tl.log2(safe_M), float("-inf")), mask=real_M)
    tl.store(
        partial_ptr + lse_at[:, None] * H + h_H[None, :],
        out_MH / safe_M[:, None],
        mask=(seen_M & real_M)[:, None] & real_H[None, :],
    )


@jit
def _combine(
    partial_ptr,
    lse_ptr,
    out_ptr,
    R: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out (T, Q, H) from the splits' partial results; zeros for a row that sees no key."""
    t, query = tl.program_id(0), tl.program_id(1)
    s_S, h_H = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
    m = (t % R) * G + query % G
    at_S = ((t // R * K + query // G) * S + s_S) * (R * G) + m
    lse_S = tl.load(lse_ptr + at_S, mask=s_S < S, other=float("-inf"))
    # Splits that saw no key have not written their partial result.
    seen_S = lse_S > float("-inf")
    top = tl.max(lse_S, axis=0)
    weight_S = tl.exp2(lse_S - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight_S, axis=0)
    partial_SH = tl.load(
        partial_ptr + at_S[:, None] * H + h_H[None, :], mask=seen_S[:, None] & (h_H < H)[None, :], other=0.0
    )
    out_H = tl.sum(weight_S[:, None] * partial_SH, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (t * K * G + query) * H + h_H, out_H.to(out_ptr.dtype.element_ty), mask=h_H < H)


def _attend(
    q_TQH: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table_BJ: Tensor,
    len_B: Tensor,
    fill_BJ: Tensor,
    see_T2: Tensor,
    count: int,
    image: bool,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> Tensor:
    """Run both kernels over `count` splits. Inputs that `image` leaves unread may be any int32 tensor."""
    (T, Q, H), (_, P, K, _), (B, J) = q_TQH.shape, k_pages.shape, table_BJ.shape
    R, G = T // B, Q // K
    block_h = max(DOT, power_of_2(H))
    item = max(q_TQH.element_size(), k_pages.element_size())
    block_n = min(128, max(DOT, TILE_BYTES // (block_h * item)))
    partial_BKSMH = torch.empty((B, K, count, R * G, H), dtype=torch.float32, device=q_TQH.device)
    lse_BKSM = torch.empty((B, K, count, R * G), dtype=torch.float32, device=q_TQH.device)
    out_TQH = torch.empty((T, Q, H), dtype=q_TQH.dtype, device=q_TQH.device)
    wrap_triton(_partial)[(B, K, count)](
        q_TQH.contiguous(),
        k_pages,
        v_pages,
        table_BJ,
        len_B,
        fill_BJ,
        see_T2,
        k_pages if k_scales is None else k_scales,
        v_pages if v_scales is None else v_scales,
        partial_BKSMH,
        lse_BKSM,
        R=R,
        G=G,
        K=K,
        H=H,
        P=P,
        J=J,
        S=count,
        SCALE=LOG2_E * H**-0.5,
        BLOCK_M=max(DOT, power_of_2(R * G)),
        BLOCK_H=block_h,
        BLOCK_N=block_n,
        IMAGE=image,
        SCALED=k_scales is not None,
        num_stages=2,
        # fp32 products don't use tensor cores and need more registers than 4 warps have.
        num_warps=4 if item == 2 else 8,
    )
    wrap_triton(_combine)[(T, Q)](
        partial_BKSMH,
        lse_BKSM,
        out_TQH,
        R=R,
        G=G,
        K=K,
        H=H,
        S=count,
        BLOCK_S=power_of_2(count),
        BLOCK_H=block_h,
        num_warps=4,
    )
    return out_TQH


@operation
def attend_pages_split(
    q_TQH: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table_BJ: Tensor,
    len_B: Tensor,
    count: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`attend_pages` of model/ops.py over `count` splits. All but q are contiguous; all but q and pages are int32."""
    return _attend(q_TQH, k_pages, v_pages, table_BJ, len_B, len_B, len_B, count, False, k_scales, v_scales)


@operation
def attend_image_split(
    q_TQH: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table_BJ: Tensor,
    fill_BJ: Tensor,
    see_T2: Tensor,
    count: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`attend_image` of model/ops.py over `count` splits; zeros for a row that sees no key.

    All but q are contiguous; all but q and pages are int32.
    """
    return _attend(q_TQH, k_pages, v_pages, table_BJ, fill_BJ, fill_BJ, see_T2, count, True, k_scales, v_scales)


def _fits_one_program(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor) -> bool:
    """Whether one program can hold all queries of a kv head."""
    return q_TQH.shape[0] // table_BJ.shape[0] * (q_TQH.shape[1] // pages[0].shape[2]) <= MOST_QUERIES


def _splits(pages: LayerPages, table_BJ: Tensor) -> int:
    (B, J), (_, P, K, _) = table_BJ.shape, pages[0].shape
    return splits(B, K, J * P, multiprocessors(pages[0].device))


def attend_pages(q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    if not _fits_one_program(q_TQH, pages, table_BJ):
        return plain.attend_pages(q_TQH, pages, table_BJ, len_B)
    return attend_pages_split(q_TQH, *pages[:2], table_BJ, len_B, _splits(pages, table_BJ), *pages[2:])


def attend_image(
    q_TQH: Tensor, pages: LayerPages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor, rows_B: Tensor | None = None
) -> Tensor:
    if rows_B is not None or not _fits_one_program(q_TQH, pages, table_BJ):
        return plain.attend_image(q_TQH, pages, table_BJ, fill_BJ, see_T2, rows_B)
    return attend_image_split(q_TQH, *pages[:2], table_BJ, fill_BJ, see_T2, _splits(pages, table_BJ), *pages[2:])


def triton_version() -> str | None:
    """Triton's version, part of a graph's key since the kernels are compiled into the graph; None without Triton."""
    return None if triton is None else triton.__version__


def cuda_ops(world: int) -> Ops:
    """The operations of one of `world` ranks on CUDA devices; collectives are torch.distributed's, which map to NCCL's.

    Raises ImportError if Triton isn't installed.
    """
    if triton is None:
        raise ImportError(
            "device=cuda needs Triton, which torch's CUDA wheels include and its CPU wheels don't. "
            "Install a CUDA wheel of torch, or the triton package."
        )
    base = replace(PLAIN, linear=cuda_linear.linear, attend_pages=attend_pages, attend_image=attend_image)
    return ranked(world, "distributed", base)
