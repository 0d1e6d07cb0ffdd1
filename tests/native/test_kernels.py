"""CPU kernels of linear layers and attention compute what plain.py computes; rows do not depend on other rows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from trees import linear_leaf

from mllama_graph import native
from mllama_graph.ops import cpu, plain
from mllama_graph.ops.cpu import CPU

# fp32 sums in another order: a few units in the last place of values of order one to ten.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def kernels(cache_home):
    native.load("kernels", cache_home)


def randoms(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


def laid_out(rows, bias=None):
    """A linear layer's parameters with the weight in the kernel's layout."""
    weight = torch.empty_like(rows)
    cpu.PANELS.rows(weight, 0, rows)
    return linear_leaf(weight, bias)


@pytest.mark.parametrize("inputs", [1, 7, 16, 75, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_panels_are_the_same_from_whole_rows_and_from_pieces_of_any_size_and_alignment(dtype, inputs):
    rows = randoms(inputs)(203, inputs).to(dtype)
    wide = torch.zeros(203, inputs + 3, dtype=dtype)
    wide[:, 1 : inputs + 1] = rows
    whole, pieces = laid_out(rows).weight, torch.zeros_like(rows)
    at = 0
    for count in (1, 23, 30, 5, 100, 44):
        cpu.PANELS.rows(pieces, at, wide[at : at + count, 1 : inputs + 1])
        at += count
    assert torch.equal(pieces, whole) and torch.equal(pieces, rows) == (inputs == 1)


# Input widths around the number of vector lanes and around the pieces in which the kernel processes a row.
@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 31, 512, 515, 1040])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_exact_up_to_rounding_and_does_not_depend_on_the_batch(inputs, dtype):
    normal = randoms(inputs)
    # Numbers of rows around those of a tile, of a pass over the weight and of a block.
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 17, 99):
        for outputs in (1, 5, 24, 51, 203):
            x, weight, bias = normal(rows, inputs), normal(outputs, inputs).to(dtype), normal(outputs).to(dtype)
            leaf = laid_out(weight, bias)
            y = CPU.linear(x, leaf)
            exact = F.linear(x.double(), weight.double(), bias.double())
            # Sums of `inputs` products in fp32.
            torch.testing.assert_close(y.double(), exact, atol=1e-6 * inputs**0.5 * 10, rtol=1e-5)
            alone = torch.cat([CPU.linear(x[t : t + 1], leaf) for t in range(rows)])
            assert torch.equal(y, alone)
            assert torch.equal(CPU.linear(x, laid_out(weight)) + bias.float(), y)


@pytest.mark.parametrize("rows", [1, 4, 60, 200])
def test_padded_rows_are_not_read_and_become_zeros(rows):
    normal = randoms(rows)
    leaf, pages, table = (
        laid_out(normal(51, 40), normal(51)),
        (normal(3, 80, 2, 8), normal(3, 80, 2, 8)),
        torch.tensor([[2, 0, 1], [0, 0, 0]]).int(),
    )
    given = normal(rows, 40), normal(rows, 4, 8)

    def results(x, q, real_1):
        rows_B = torch.cat((real_1, real_1 * 0))
        past_B = torch.tensor([5, 0]).int()
        return cpu.linear(x, leaf, real_1), cpu.attend_prompt(q, None, None, pages, table, rows_B, past_B)

    whole = results(*given, torch.tensor([rows]).int())
    for real in {0, 1, rows // 2, rows}:
        padded = [tensor.clone() for tensor in given]
        for tensor in padded:
            tensor[real:] = torch.nan
        for y, exact in zip(results(*padded, torch.tensor([real]).int()), whole):
            assert torch.equal(y[:real], exact[:real]) and not y[real:].any()


def test_a_product_keeps_leading_axes_and_accepts_zero_rows():
    normal = randoms(0)
    leaf = laid_out(normal(5, 16))
    x = normal(2, 3, 16)
    assert torch.equal(CPU.linear(x, leaf).view(6, 5), CPU.linear(x.view(6, 16), leaf))
    assert CPU.linear(x[:0], leaf).shape == (0, 3, 5)


def test_arguments_of_wrong_shape_or_value_are_refused():
    normal = randoms(0)
    with pytest.raises(RuntimeError):
        CPU.linear(normal(2, 15), linear_leaf(normal(5, 16)))
    with pytest.raises(RuntimeError):
        CPU.attend_pages(normal(2, 3, 8), (normal(4, 2, 2, 8),) * 2, torch.zeros(2, 1).int(), torch.ones(2).int())


SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "keys": st.integers(1, 3),
        "group": st.integers(1, 6),
        "width": st.sampled_from((1, 5, 8, 12, 16, 20, 96)),
        "page": st.sampled_from((1, 3, 16, 128)),
        "J": st.integers(1, 6),
    }
)


def pool(normal, shape: dict):
    """Random pages and the block tables of three sequences that share no page, with the random generator."""
    count, page = 3 * shape["J"] + 1, shape["page"]
    pages = tuple(normal(count, page, shape["keys"], shape["width"]) for _ in range(2))
    generator = torch.Generator().manual_seed(shape["seed"])
    return pages, torch.randperm(count, generator=generator)[: 3 * shape["J"]].view(3, -1).int(), generator


@given(SHAPES, st.integers(1, 3))
# With this many heads the kernel processes fewer tokens at a time.
@example({"seed": 0, "keys": 64, "group": 1, "width": 96, "page": 128, "J": 2}, 1)
def test_attention_to_pages(shape, rows):
    normal = randoms(shape["seed"])
    pages, table, generator = pool(normal, shape)
    most = shape["J"] * shape["page"]
    rows = min(rows, most)
    q = 2 * normal(3 * rows, shape["keys"] * shape["group"], shape["width"])
    length = torch.tensor([rows, most, int(torch.randint(rows, most + 1, (), generator=generator))]).int()
    ours = CPU.attend_pages(q, pages, table, length)
    torch.testing.assert_close(ours, plain.attend_pages(q, pages, table, length), **CLOSE)
    # A sequence's result depends neither on other sequences nor on the width of the table.
    used = -(-int(length[0]) // shape["page"])
    assert torch.equal(ours[:rows], CPU.attend_pages(q[:rows], pages, table[:1, :used].contiguous(), length[:1]))


@given(SHAPES, st.lists(st.tuples(st.integers(0, 2), st.integers(1, 11)), min_size=1, max_size=4))
def test_rows_that_share_pages_have_the_bits_that_each_has_alone(shape, runs):
    normal = randoms(shape["seed"])
    pages, table, generator = pool(normal, shape)
    most = shape["J"] * shape["page"]
    # As a token and its proposals: each row of a run sees one token more than the row before it.
    rows = [(one, min(most, 1 + most // 2 + n)) for one, count in runs for n in range(count)]
    q = 2 * normal(len(rows), shape["keys"] * shape["group"], shape["width"])
    tables, lengths = table[[one for one, _ in rows]].contiguous(), torch.tensor([seen for _, seen in rows]).int()
    ours = CPU.attend_pages(q, pages, tables, lengths)
    for n in range(len(rows)):
        alone = CPU.attend_pages(q[n : n + 1], pages, tables[n : n + 1], lengths[n : n + 1])
        assert torch.equal(ours[n : n + 1], alone)


@given(SHAPES, st.sampled_from((1, 2, 5, 33)))
def test_attention_to_images(shape, rows):
    normal = randoms(shape["seed"])
    pages, table, generator = pool(normal, shape)
    J = shape["J"]
    B = 3 if rows < 5 else 1
    q = 2 * normal(B * rows, shape["keys"] * shape["group"], shape["width"])
    fill = torch.randint(0, shape["page"] + 1, (B, J), generator=generator).int()
    see = torch.sort(torch.randint(0, J + 1, (B * rows, 2), generator=generator)).values.int()
    ours, theirs = (ops.attend_image(q, pages, table[:B], fill, see) for ops in (CPU, plain))
    kept = [any(fill[t // rows, see[t, 0] : see[t, 1]] > 0) for t in range(B * rows)]
    torch.testing.assert_close(ours[kept], theirs[kept], **CLOSE)
    # The model multiplies the result of a row that sees nothing by 0, which would keep a NaN.
    assert ours.isfinite().all()


@given(SHAPES, st.sampled_from((1, 7, 50, 140)))
def test_attention_of_packed_chunks(shape, rows):
    normal = randoms(shape["seed"])
    pages, table, generator = pool(normal, shape)
    most = shape["J"] * shape["page"]
    packed = torch.tensor([0, min(rows, most), min(3, most), 0]).int()
    table = table[[0, 1 % len(table), 0, 0]]
    q = 2 * normal(int(packed.sum()) + 2, shape["keys"] * shape["group"], shape["width"])
    for past in {0, 1, most - rows - 1, most - rows} - {*range(-rows - 1, 0)}:
        past_B = torch.tensor([0, past, most - int(packed[2]), 0]).int().clamp(max=most - packed)
        given = (None, None, pages, table, packed, past_B)
        ours, theirs = CPU.attend_prompt(q, *given), plain.attend_prompt(q, *given)
        torch.testing.assert_close(ours[:-2], theirs[:-2], **CLOSE)
        # A row of a sequence that decodes has the bits of a decode step, whatever is beside it; others are unchanged.
        mixed = torch.cat((packed[1:2] * 0 + 1, packed))
        tables, pasts = torch.cat((table[1:2], table)), torch.cat((past_B[1:2], past_B))
        rows_TQH = torch.cat((q[-1:], q))
        beside = CPU.attend_prompt(rows_TQH, None, None, pages, tables, mixed, pasts, torch.tensor([1]).int())
        assert torch.equal(beside[:1], CPU.attend_pages(q[-1:], pages, table[1:2], past_B[1:2] + 1))
        assert torch.equal(beside[1:], ours)
        # A sequence by itself has the same bits.
        alone = CPU.attend_prompt(q[packed[1] : -2], None, None, pages, table[2:3], packed[2:3], past_B[2:3])
        assert torch.equal(ours[packed[1] : -2], alone)


@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from((1, 5, 16, 80)), st.sampled_from((1, 9, 60, 130)))
def test_attention_among_tiles(seed, heads, width, rows):
    normal = randoms(seed)
    q, k, v = (normal(rows, heads, width) for _ in range(3))
    pad = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.3
    pad[0] = False
    torch.testing.assert_close(CPU.attend_tiles(q, k, v, pad, 0.3), plain.attend_tiles(q, k, v, pad, 0.3), **CLOSE)


def test_results_do_not_depend_on_the_number_of_threads():
    normal, before = randoms(3), torch.get_num_threads()
    x, leaf = normal(105, 700), laid_out(normal(301, 700))
    q, k, v = (normal(150, 3, 16) for _ in range(3))
    pad = torch.zeros(150, dtype=torch.bool)
    # Long enough that threads share the heads of one sequence.
    pages, table, length = (normal(2, 128, 4, 32), normal(2, 128, 4, 32)), torch.tensor([[1, 0]]), torch.tensor([230])
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen = CPU.attend_pages(torch.ones(1, 8, 32), pages, table.int(), length.int())
            results.append((CPU.linear(x, leaf), CPU.attend_tiles(q, k, v, pad, 0.3), seen))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_products_of_several_python_threads_at_once_are_those_of_one():
    """Loops share one set of threads; a loop that finds them taken stays on its own."""
    normal, before = randoms(4), torch.get_num_threads()
    leaf = laid_out(normal(1500, 512))
    given = [normal(rows, 512) for rows in (1, 3, 9, 60)]
    wanted = [CPU.linear(x, leaf) for x in given]

    def differing(x, y) -> int:
        return sum(not torch.equal(CPU.linear(x, leaf), y) for _ in range(200))

    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(len(given)) as pool:
            assert sum(pool.map(differing, given, wanted)) == 0
    finally:
        torch.set_num_threads(before)
