"""Kernels on pages in bf16 and int8 compute what plain.py computes; what a row sees does not depend on chunks."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllama_graph import native
from mllama_graph.ops import plain
from mllama_graph.ops.cpu import CPU, without_padding

# fp32 sums in another order: a few units in the last place of values of order one to ten.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
KINDS = (torch.bfloat16, torch.int8)


@pytest.fixture(scope="module", autouse=True)
def kernels(cache_home):
    native.load("kernels", cache_home)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def empty(kind, count, page, heads, width):
    """Pages of zeros."""
    data = tuple(torch.zeros(count, page, heads, width, dtype=kind) for _ in range(2))
    return data if kind != torch.int8 else (*data, *(torch.zeros(count, heads, page) for _ in range(2)))


def filled(kind, count, page, heads, width, seed=0):
    """Pages with random values of various sizes in every slot, so that reading a wrong slot or scale shows."""
    pages, slots = empty(kind, count, page, heads, width), count * page
    size = 0.1 + normal(slots, heads, 1, seed=seed).abs()
    rows = [size * normal(slots, heads, width, seed=seed + n) for n in (1, 2)]
    plain.write_pages_(*rows, pages, torch.arange(slots).int())
    return pages


def widened(pages):
    """The fp32 pages that hold the same values, element by element as the definition says."""
    if len(pages) == 2:
        return tuple(data.float() for data in pages)
    return tuple(data.float() * scales.transpose(1, 2)[..., None] for data, scales in zip(pages[:2], pages[2:]))


SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "heads": st.integers(1, 3),
        "width": st.sampled_from((1, 5, 8, 16, 20, 96)),
        "page": st.sampled_from((1, 3, 16, 128)),
    }
)
GROUPS = st.integers(1, 6)


def pool(kind, seed, heads, width, page, J):
    pages = filled(kind, 3 * J + 1, page, heads, width, seed)
    order = torch.randperm(3 * J + 1, generator=torch.Generator().manual_seed(seed))
    return pages, order[: 3 * J].view(3, J).int()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(shape=SHAPES)
def test_both_write_the_same_bits_to_the_slots_of_real_rows_and_nothing_else(kind, shape):
    heads, width = shape["heads"], shape["width"]
    k, v = (normal(6, heads, width, seed=shape["seed"] + n) * 10.0**n for n in (0, 1))
    k[1], v[2, 0] = 0, 0
    ours, theirs = (filled(kind, 9, shape["page"], heads, width) for _ in range(2))
    slots = torch.randperm(9 * shape["page"], generator=torch.Generator().manual_seed(shape["seed"]))[:6].int()
    plain.write_pages_(k[:4], v[:4], theirs, slots[:4])
    without_padding(CPU, SimpleNamespace(real_1=int32(4))).write_pages_(k, v, ours, slots)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_value_is_rounded_by_at_most_half_a_step_of_its_tokens_and_heads_scale():
    pages, k = empty(torch.int8, 2, 8, 3, 64), normal(16, 3, 64) * torch.logspace(-6, 6, 16)[:, None, None]
    CPU.write_pages_(k, k, pages, torch.arange(16).int())
    step = k.abs().amax(-1, keepdim=True) / 127
    for values in widened(pages):
        assert ((values.view(k.shape) - k).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(shape=SHAPES, group=GROUPS, rows=st.integers(1, 3), J=st.integers(1, 4))
def test_attention_to_pages(kind, shape, group, rows, J):
    pages, table = pool(kind, J=J, **shape)
    most = J * shape["page"]
    rows = min(rows, most)
    q = 2 * normal(3 * rows, shape["heads"] * group, shape["width"])
    length = int32(rows, most, (rows + most) // 2)
    ours = CPU.attend_pages(q, pages, table, length)
    torch.testing.assert_close(ours, plain.attend_pages(q, pages, table, length), **CLOSE)
    torch.testing.assert_close(ours, plain.attend_pages(q, widened(pages), table, length), **CLOSE)
    assert torch.equal(ours[:rows], CPU.attend_pages(q[:rows], pages, table[:1], length[:1]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(shape=SHAPES, group=GROUPS, rows=st.sampled_from((1, 2, 33)), J=st.integers(1, 4))
def test_attention_to_images(kind, shape, group, rows, J):
    pages, table = pool(kind, J=J, **shape)
    generator = torch.Generator().manual_seed(shape["seed"])
    q = 2 * normal(3 * rows, shape["heads"] * group, shape["width"])
    fill = torch.randint(1, shape["page"] + 1, (3, J), generator=generator).int()
    see = torch.tensor([[0, J]] * (3 * rows)).int()
    see[::2] = torch.tensor([J - 1, J]).int()
    # Of sequences with equally many rows, and packed.
    for packed in (None, int32(0, rows, 2 * rows), int32(rows + 1, 0, 2 * rows - 1)):
        given = pages, table[:3], fill, see, packed
        ours = CPU.attend_image(q, *given)
        torch.testing.assert_close(ours, plain.attend_image(q, *given), **CLOSE)
        torch.testing.assert_close(ours, plain.attend_image(q, widened(pages), *given[1:]), **CLOSE)
    beside = CPU.attend_image(q, *given[:-1], int32(1, 0, 3 * rows - 1), int32(1))
    assert torch.equal(beside[:1], CPU.attend_image(q[:1], pages, table[:1], fill[:1], see[:1]))
    alone = CPU.attend_image(q[rows + 1 :], pages, table[2:3], fill[2:3], see[rows + 1 :], packed[2:])
    assert torch.equal(ours[rows + 1 :], alone)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(shape=SHAPES, group=GROUPS, cut=st.sampled_from((1, 40, 99)))
def test_a_prompt_in_two_chunks_has_the_bits_of_one(kind, shape, group, cut):
    T, page, heads, width = 100, shape["page"], shape["heads"], shape["width"]
    count = -(-T // page)
    order = torch.randperm(count + 1, generator=torch.Generator().manual_seed(shape["seed"]))
    table = order[:count].int()
    q, k, v = (2 * normal(T, n, width, seed=n) for n in (heads * group, heads, heads))
    slots = (table[:, None] * page + torch.arange(page)).flatten()[:T].int()
    made = []
    for ops in (CPU, plain):
        pages = empty(kind, count + 1, page, heads, width)

        def attend(start, stop, ops=ops, pages=pages):
            ops.write_pages_(k[start:stop], v[start:stop], pages, slots[start:stop])
            given = k[start:stop], v[start:stop], pages, table[None], int32(stop - start), int32(start)
            return ops.attend_prompt(q[start:stop], *given)

        made.append((attend(0, T), attend(0, cut), attend(cut, T)))
    for whole, first, second in made:
        torch.testing.assert_close(torch.cat((first, second)), whole, **CLOSE)
    assert torch.equal(torch.cat(made[0][1:]), made[0][0])
    torch.testing.assert_close(made[0][0], made[1][0], **CLOSE)
    # Without a table, keys and values are rounded as the pages hold them.
    torch.testing.assert_close(made[1][0], plain.attend_prompt(q, k, v, pages, None, int32(T), int32(0)), **CLOSE)


@pytest.mark.parametrize("ops", [CPU, plain])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_sequence_alone(ops, kind, value):
    pages = empty(kind, 3, 4, 1, 20)
    k, v = normal(12, 1, 20), normal(12, 1, 20, seed=1)
    v[5, 0, 7] = value
    ops.write_pages_(k, v, pages, torch.arange(12).int())
    q, table = normal(2, 2, 20), torch.tensor([[1], [2]]).int()
    see = torch.tensor([[0, 1], [0, 1]]).int()
    for y in (
        ops.attend_pages(q, pages, table, int32(4, 4)),
        ops.attend_prompt(q, None, None, pages, table, int32(1, 1), int32(3, 3)),
        ops.attend_image(q, pages, table, torch.tensor([[4], [4]]).int(), see, int32(1, 1)),
    ):
        assert not y[0].isfinite().all() and y[1].isfinite().all()


def test_pages_of_wrong_parts_are_refused():
    pages, q, k = empty(torch.int8, 3, 4, 2, 8), normal(1, 2, 8), normal(1, 2, 8)
    halves = empty(torch.bfloat16, 3, 4, 2, 8)
    for wrong in (
        pages[:2],
        (*halves, *pages[2:]),
        (pages[0], halves[0]),
        (*pages[:2], *(scales.transpose(1, 2).contiguous() for scales in pages[2:])),
        (*pages[:2], *(scales.double() for scales in pages[2:])),
        tuple(data.half() for data in halves),
    ):
        with pytest.raises(RuntimeError):
            CPU.attend_pages(q, wrong, torch.zeros(1, 1).int(), int32(1))
        with pytest.raises(RuntimeError):
            CPU.write_pages_(k, k, wrong, int32(0))
