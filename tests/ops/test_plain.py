"""Every operation of ops/plain.py against Hugging Face, torch.nn.functional, or naive attention in float64."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.mllama import modeling_mllama as hf
from trees import linear_leaf

from mllama_graph.model.ops import Ops
from mllama_graph.ops.plain import PLAIN

# fp32 sums of at most a few hundred products of order one, against the same sums in float64.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}
SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def dense(q_RQH, k_LKH, v_LKH, mask_RL):
    """Attention by its definition, one head at a time in float64."""
    q, k, v = q_RQH.double(), k_LKH.double(), v_LKH.double()
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        score = q[:, head] @ k[:, head // group].T / q.shape[2] ** 0.5
        heads.append(score.masked_fill(~mask_RL, -torch.inf).softmax(-1) @ v[:, head // group])
    return torch.stack(heads, dim=1).float()


def leaf(out, into, bias=False, dtype=torch.float32):
    return linear_leaf(normal(out, into, dtype=dtype), normal(out, seed=1, dtype=dtype) if bias else None)


def pages_of(num_pages, page_size, heads, width, seed=0):
    """Pages with random values in every slot, so that reading a wrong slot shows."""
    size = (num_pages, page_size, heads, width)
    return normal(*size, seed=seed), normal(*size, seed=seed + 1)


def gathered(pages, table):
    """Keys and values of the pages in a table, page after page, by plain indexing."""
    return tuple(torch.cat([data[page] for page in table]) for data in pages)


def test_every_operation_of_the_contract_has_a_plain_implementation():
    assert all(callable(getattr(PLAIN, field.name)) for field in fields(Ops))


# ---- rows


def test_embed_takes_rows():
    weight = normal(9, 4)
    assert torch.equal(PLAIN.embed(torch.tensor([8, 0, 3], dtype=torch.int32), linear_leaf(weight)), weight[[8, 0, 3]])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_linear_is_x_times_the_transposed_weight_plus_bias(rows, bias):
    w, x = leaf(7, 24, bias), normal(rows, 24)
    wanted = x.double() @ w.weight.double().T + (w.bias.double() if bias else 0)
    assert_close(PLAIN.linear(x, w), wanted.float(), **CLOSE)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_linear_on_a_narrow_weight_is_fp32_of_the_same_weight(rows, stored):
    w, x = leaf(7, 24, bias=True, dtype=stored), normal(rows, 24)
    y = PLAIN.linear(x, w)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x, w.weight.float(), w.bias.float()))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_compiled_form_of_linear_on_a_narrow_weight_agrees(rows, monkeypatch):
    w, x = leaf(40, 300, bias=True, dtype=torch.bfloat16), normal(rows, 300)
    eager = PLAIN.linear(x, w)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    # 300 products of order one in another order.
    assert_close(PLAIN.linear(x, w), eager, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_hugging_faces(dtype):
    theirs = hf.MllamaTextRMSNorm(32, eps=1e-3)
    theirs.weight.data = normal(32, dtype=dtype)
    x = 3 * normal(5, 32, dtype=dtype)
    assert_close(PLAIN.rms_norm(x, theirs.weight.data, 1e-3), theirs(x).detach(), rtol=0, atol=0)


def test_add_rms_norm_gives_the_norm_of_the_sum_and_the_sum():
    x, y, weight = normal(5, 32), normal(5, 32, seed=1), normal(32)
    normed, summed = PLAIN.add_rms_norm(x, y, weight, 1e-5)
    assert torch.equal(summed, x + y)
    assert_close(normed, F.rms_norm(x + y, (32,), weight, 1e-5), **CLOSE)
    normed, summed = PLAIN.add_rms_norm(x, None, weight, 1e-5)
    assert torch.equal(summed, x)
    assert_close(normed, F.rms_norm(x, (32,), weight, 1e-5), **CLOSE)


def test_layer_norm_is_by_its_definition():
    w, x = SimpleNamespace(weight=normal(16), bias=normal(16, seed=1)), 5 + normal(2, 3, 16)
    wide = x.double()
    wanted = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    assert_close(PLAIN.layer_norm(x, w, 1e-3), (wanted * w.weight + w.bias).float(), **CLOSE)


@given(positions=st.lists(st.integers(0, 131071), min_size=1, max_size=20))
def test_rope_is_hugging_faces(positions):
    width, inv_freq = 16, 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    x = normal(len(positions), 3, width)
    angles = PLAIN.rope_angles(torch.tensor(positions, dtype=torch.int32), inv_freq)
    angle = torch.tensor(positions).float()[:, None] @ inv_freq[None]
    cos, sin = (torch.cat((angle, angle), -1)[None].cos(), torch.cat((angle, angle), -1)[None].sin())
    theirs, _ = hf.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    assert_close(PLAIN.rope(x, angles), theirs[0].transpose(0, 1), **CLOSE)


def test_rope_angles_stay_fp32_and_rope_keeps_the_dtype_of_x():
    angles = PLAIN.rope_angles(torch.tensor([3]), torch.ones(4))
    assert all(a.dtype == torch.float32 for a in angles)
    assert PLAIN.rope(normal(1, 2, 8, dtype=torch.bfloat16), angles).dtype == torch.bfloat16


def test_swiglu_and_gelu_are_the_exact_ones():
    x = 3 * normal(4, 20)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(PLAIN.swiglu(x), (gate / (1 + (-gate).exp()) * up).float(), **CLOSE)
    wide = x.double()
    assert_close(PLAIN.gelu(x), (wide * 0.5 * (1 + torch.erf(wide / 2**0.5))).float(), **CLOSE)


def test_patch_embed_multiplies_each_patch_row_by_row():
    x, weight = normal(2, 3, 12, 12), normal(5, 3, 4, 4)
    wanted = torch.stack(
        [
            torch.stack(
                [
                    torch.einsum("chw,echw->e", tile[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], weight)
                    for i in range(3)
                    for j in range(3)
                ]
            )
            for tile in x
        ]
    )
    assert_close(PLAIN.patch_embed(x, weight), wanted, atol=1e-5, rtol=1e-5)


def test_one_rank_has_nothing_to_reduce_or_gather():
    x = normal(3, 4)
    assert PLAIN.all_reduce(x) is x and torch.equal(PLAIN.all_gather(x), x[None])


# ---- pages


@given(seed=SEEDS, page_size=st.integers(1, 7), count=st.integers(1, 10))
def test_write_pages_touches_its_slots_and_nothing_else(seed, page_size, count):
    pages = pages_of(6, page_size, 2, 4, seed)
    count = min(count, 6 * page_size)
    slot = torch.randperm(6 * page_size, generator=torch.Generator().manual_seed(seed))[:count].int()
    fresh = normal(count, 2, 4, seed=seed + 7), normal(count, 2, 4, seed=seed + 8)
    before = tuple(data.clone() for data in pages)
    where = tuple(data.data_ptr() for data in pages)
    PLAIN.write_pages_(*fresh, pages, slot)
    for data, old, rows in zip(pages, before, fresh):
        wanted = old.view(-1, 2, 4).clone()
        for s, row in zip(slot.tolist(), rows):
            wanted[s] = row
        assert torch.equal(data.view(-1, 2, 4), wanted)
    assert where == tuple(data.data_ptr() for data in pages)


@given(seed=SEEDS, T=st.integers(1, 12), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_attend_prompt_without_earlier_pages_is_causal_attention(seed, T, heads):
    q, k, v = (
        normal(T, heads[0], 8, seed=seed),
        normal(T, heads[1], 8, seed=seed + 1),
        normal(T, heads[1], 8, seed=seed + 2),
    )
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    out = PLAIN.attend_prompt(q, k, v, pages_of(2, 4, heads[1], 8), None, torch.tensor([T]), torch.tensor([0]))
    assert_close(out, dense(q, k, v, causal), **CLOSE)


@given(
    seed=SEEDS,
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    past=st.integers(0, 12),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
)
def test_attend_prompt_sees_exactly_the_earlier_tokens_of_its_own_pages(seed, rows, past, heads):
    pages, tables = pages_of(23, 4, heads[1], 8, seed), torch.randperm(23)[:20].view(4, 5)[: len(rows)].int()
    q, past_B = normal(sum(rows) + 1, heads[0], 8, seed=seed), [(past + n) % 13 for n in range(len(rows))]
    given = tables, torch.tensor(rows), torch.tensor(past_B)
    out, first = PLAIN.attend_prompt(q, q, q, pages, *given), 0
    for table, count, earlier in zip(tables.tolist(), rows, past_B):
        if count:
            k, v = (x[: earlier + count] for x in gathered(pages, table))
            mask = torch.arange(earlier + count) <= torch.arange(count)[:, None] + earlier
            assert_close(out[first : first + count], dense(q[first : first + count], k, v, mask), **CLOSE)
        first += count


@given(seed=SEEDS, fresh=st.sampled_from([1, 2, 3]), data=st.data(), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_attend_pages_sees_a_sequence_up_to_each_new_token(seed, fresh, data, heads):
    lengths = data.draw(st.lists(st.integers(fresh, 12), min_size=1, max_size=4))
    order = torch.randperm(3 * len(lengths), generator=torch.Generator().manual_seed(seed)).view(-1, 3).int()
    pages = pages_of(3 * len(lengths), 4, heads[1], 8, seed)
    q = normal(fresh * len(lengths), heads[0], 8, seed=seed + 1)
    out = PLAIN.attend_pages(q, pages, order, torch.tensor(lengths, dtype=torch.int32)).view(-1, fresh, heads[0], 8)
    for row, length in enumerate(lengths):
        k, v = gathered(pages, order[row].tolist())
        mask = torch.ones(fresh, length, dtype=torch.bool).tril(length - fresh)
        assert_close(out[row], dense(q.view_as(out)[row], k[:length], v[:length], mask), **CLOSE)


@given(seed=SEEDS, rows=st.sampled_from([1, 3]), data=st.data(), heads=st.sampled_from([(4, 4), (4, 2)]))
def test_attend_image_sees_the_filled_part_of_the_entries_in_its_range(seed, rows, data, heads):
    B, J, P = data.draw(st.integers(1, 3)), 4, 5
    fill = torch.tensor(data.draw(st.lists(st.integers(1, P), min_size=B * J, max_size=B * J)), dtype=torch.int32).view(
        B, J
    )
    ends = st.lists(st.integers(0, J), min_size=2, max_size=2, unique=True).map(sorted)
    see = torch.tensor(data.draw(st.lists(ends, min_size=B * rows, max_size=B * rows)), dtype=torch.int32)
    table = torch.randint(0, 9, (B, J), generator=torch.Generator().manual_seed(seed)).int()
    pages, q = pages_of(9, P, heads[1], 8, seed), normal(B * rows, heads[0], 8, seed=seed + 1)
    out = PLAIN.attend_image(q, pages, table, fill, see)
    for t in range(B * rows):
        b, (low, high) = t // rows, see[t].tolist()
        k, v = (torch.cat([data[table[b, j]][: fill[b, j]] for j in range(low, high)]) for data in pages)
        assert_close(out[t : t + 1], dense(q[t : t + 1], k, v, torch.ones(1, len(k), dtype=torch.bool)), **CLOSE)


def test_attend_image_is_finite_where_a_row_sees_nothing():
    pages, table = pages_of(4, 5, 2, 8), torch.tensor([[1, 2]], dtype=torch.int32)
    for fill, see in (([[0, 0]], [[0, 0]]), ([[5, 2]], [[1, 1]]), ([[5, 2]], [[0, 0]])):
        out = PLAIN.attend_image(normal(1, 4, 8), pages, table, torch.tensor(fill), torch.tensor(see))
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("real", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [10, 17])
def test_attend_tiles_masks_as_hugging_face_does(real, tokens):
    tiles, rows = 4, tokens + -tokens % 8
    tile_mask = (torch.arange(tiles) < real).float()[None]
    bias = hf._prepare_aspect_ratio_attention_mask(tile_mask, tokens, rows, torch.float64)
    q, k, v = (normal(tiles * rows, 2, 8, seed=n) for n in range(3))
    wanted = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None].double() for x in (q, k, v)), attn_mask=bias)
    row = torch.arange(tiles * rows)
    out = PLAIN.attend_tiles(q, k, v, (row // rows >= real) | (row % rows >= tokens), 8**-0.5)
    assert_close(out, wanted[0].transpose(0, 1).float(), **CLOSE)
