"""CPU kernels on rows and tiles compute what plain.py computes; rows do not depend on other rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mllama_graph import native
from mllama_graph.ops import ranks
from mllama_graph.ops.cpu import CPU, SKIP_PADDING, without_padding
from mllama_graph.ops.plain import PLAIN
from mllama_graph.ops.ranks import ranked

# fp32 sums in another order and functions accurate to a few units in the last place, for values of order one to ten.
CLOSE = {"atol": 5e-6, "rtol": 1e-5}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Widths around the number of vector lanes.
WIDTHS = (1, 5, 8, 20, 33, 96, 512)


@pytest.fixture(scope="module", autouse=True)
def kernels(cache_home):
    native.load("kernels", cache_home)


def embedding(weight, **fields):
    """An embedding table in floating point."""
    return SimpleNamespace(weight=weight, format=None, scale=None, **fields)


def normal(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def weights(width, dtype):
    return normal(width, seed=1, dtype=dtype), SimpleNamespace(
        weight=normal(width, seed=2, dtype=dtype), bias=normal(width, seed=3, dtype=dtype)
    )


def row_cases(T, width, dtype):
    """Case -> arguments of an operation on rows; tensors with T rows are the ones to select rows of."""
    weight, leaf = weights(width, dtype)
    x, y, position = 3 * normal(T, width, seed=5), normal(T, width, seed=6), torch.arange(T).int() * 37
    gate = normal(1, seed=9, dtype=dtype)
    see = torch.stack((torch.zeros(T), torch.arange(T) % 3), dim=1).int()
    # Views of wider rows, as q, k and v are.
    heads = normal(T, 3 * 2 * width + 7, seed=8)[:, 7:].view(T, 3, -1)
    angles = PLAIN.rope_angles(position, 1 / 10000 ** torch.linspace(0, 1, width))
    return {
        "rms_norm": (x, weight, 1e-5),
        "rms_norm of heads": (normal(T, 3, width), weight, 1e-5),
        "add_rms_norm": (x, y, weight, 1e-5),
        "add_rms_norm without y": (x, None, weight, 1e-5),
        "layer_norm": (5 + x, leaf, 1e-5),
        "layer_norm of heads": (normal(T, 2, width), leaf, 1e-5),
        "rope": (heads, angles),
        "rope_angles": (position, 1 / 10000 ** torch.linspace(0, 1, width)),
        "swiglu": (torch.cat((x, y), dim=1),),
        "gelu": (x,),
        "gated": (y, gate, see),
        "add_gated": (x, y, leaf.bias, gate),
        "add_gated without a gate": (x, y, leaf.bias, None),
        "add_gated without a bias": (x, y, None, gate),
        "add_gated of both alone": (x, y, None, None),
        "embed": (torch.arange(T).int() % 7, embedding(normal(7, width, dtype=dtype))),
        "embed_held": (torch.arange(T).int(), embedding(normal(5, width, dtype=dtype), first=int32(3)[0])),
    }


def results(ops, name, arguments):
    """An operation's results as a tuple. `gated` gets `see` in the form that `ops.sees_image` returns."""
    name = name.split(" ")[0]
    if name == "gated":
        arguments = (*arguments[:2], ops.sees_image(arguments[2]))
    made = getattr(ops, name)(*arguments)
    return made if isinstance(made, tuple) else (made,)


def cut(argument, T, rows):
    if isinstance(argument, tuple):
        return tuple(cut(part, T, rows) for part in argument)
    tensor = isinstance(argument, torch.Tensor) and argument.dim()
    return argument[rows] if tensor and argument.shape[0] == T else argument


# Different from the size of every other axis, so that `cut` selects only rows.
T = 13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", row_cases(T, 8, torch.float32))
def test_rows_equal_plain_and_do_not_depend_on_the_batch(name, dtype):
    for width in WIDTHS:
        arguments = row_cases(T, width, dtype)[name]
        ours, theirs = results(CPU, name, arguments), results(PLAIN, name, arguments)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == torch.float32 and mine.is_contiguous()
            torch.testing.assert_close(mine, other.float(), **CLOSE)
        for t in range(T):
            alone = results(CPU, name, tuple(cut(a, T, slice(t, t + 1)) for a in arguments))
            assert all(torch.equal(whole[t : t + 1], one) for whole, one in zip(ours, alone))


@pytest.mark.parametrize("real", [0, 1, 7, T])
def test_padded_rows_are_not_read_and_become_zeros(real):
    told = without_padding(CPU, SimpleNamespace(real_1=int32(real)))
    cases = row_cases(T, 20, torch.bfloat16)
    for name in cases:
        if name.split(" ")[0] not in SKIP_PADDING:
            continue
        whole = results(CPU, name, cases[name])
        padded = [cut(a, T, slice(None)) for a in cases[name]]
        # Padding that must not be read: an id beyond the table, or NaN.
        padded[0] = padded[0].clone()
        padded[0][real:] = 99 if name == "embed" else torch.nan
        for y, exact in zip(results(told, name, tuple(padded)), whole):
            # Without y the sum is x itself, including its padding.
            if y is not padded[0]:
                assert torch.equal(y[:real], exact[:real]) and not y[real:].any(), name


def test_the_embedding_of_one_of_several_ranks_also_skips_padding():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_shared_all_reduce", lambda x: x)
        ops = without_padding(
            ranked(2, "shared_memory", replace(CPU, embed_held=lambda ids, leaf, real_1: real_1)),
            SimpleNamespace(real_1=int32(1)),
        )
        assert torch.equal(ops.embed(int32(0), None), int32(1))


def test_extremes_stay_finite():
    wide = torch.tensor([[-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 1e30]])
    ours, theirs = CPU.swiglu(torch.cat((wide, torch.ones_like(wide)), dim=1)), torch.nn.functional.silu(wide)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(CPU.gelu(wide), PLAIN.gelu(wide), **CLOSE)
    grid = torch.linspace(-9, 9, 20001)[None]
    # The kernel's series for erf has an error of 2e-7, which enters the result multiplied by |x| / 2.
    torch.testing.assert_close(CPU.gelu(grid), PLAIN.gelu(grid.double()).float(), atol=1e-6, rtol=1e-6)


def test_take_rows_returns_rows():
    x = normal(9, 20)
    assert torch.equal(CPU.take_rows(x, int32(4, 0)), x[[4, 0]])


@pytest.mark.parametrize("width", [4, 24])
def test_pages_get_the_real_rows_and_nothing_else(width):
    pages = normal(5, 4, 2, width), normal(5, 4, 2, width, seed=1)
    wanted = tuple(data.clone() for data in pages)
    qkv, slot = normal(6, 10 * width), torch.randperm(20, generator=torch.Generator().manual_seed(0))[:6].int()
    k, v = (part.view(6, 2, width) for part in qkv.split([6 * width, 2 * width, 2 * width], dim=1)[1:])
    PLAIN.write_pages_(k[:4], v[:4], wanted, slot[:4])
    where = [data.data_ptr() for data in pages]
    without_padding(CPU, SimpleNamespace(real_1=int32(4))).write_pages_(k, v, pages, slot)
    assert all(torch.equal(a, b) for a, b in zip(pages, wanted)) and where == [data.data_ptr() for data in pages]


# ---- tiles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 48])
@pytest.mark.parametrize("real", [1, 3])
def test_operations_on_tiles_equal_plain(width, dtype, real):
    C, side, patch = 3, 24, 4
    N, aspect = (side // patch) ** 2, int32(2)
    gate, mean, std = normal(1, dtype=dtype), normal(3, 1, 1), 1 + normal(3, 1, 1).abs()
    pixels = torch.randint(0, 256, (C, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    tables = normal(4, C * width, dtype=dtype), normal(4, C * (N + 1) * width, dtype=dtype)
    class_token, position = normal(width, dtype=dtype), normal(N + 1, width, dtype=dtype)
    projection = normal(width, 3, patch, patch, dtype=dtype)
    made = []
    for ops in (CPU, PLAIN):
        x = ops.normalise(pixels, int32(real), torch.tensor(1 / 255), mean, std, torch.float32)
        patches = ops.patch_embed(x, projection)
        patches = ops.add_tile_embedding(patches.contiguous(), tables[0], aspect, gate)
        rows = ops.add_positions(patches, class_token, position, tables[1], aspect, gate)
        padded, pad = ops.pad_rows(rows, int32(real), 8)
        made.append(
            (
                x,
                patches,
                rows,
                padded,
                pad,
                ops.join_features(padded, [2 * padded, padded + 1], C, N + 1),
                ops.join_features(padded, [], C, N + 1),
            )
        )
    for ours, theirs in zip(*made):
        assert ours.dtype == theirs.dtype
        # Sums of 48 products of order one.
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    before, cases = torch.get_num_threads(), row_cases(400, 96, torch.bfloat16)
    image = normal(4, 3, 56, 56)
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(
                [y for name in cases for y in results(CPU, name, cases[name])]
                + [CPU.patch_embed(image, normal(40, 3, 14, 14))]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other))


def test_arguments_of_wrong_shape_or_value_are_refused():
    x, leaf = normal(2, 16), embedding(normal(4, 16))
    for refused in (
        lambda: CPU.rms_norm(x, normal(15), 1e-5),
        lambda: CPU.rms_norm(x.double(), normal(16), 1e-5),
        lambda: CPU.embed(int32(4), leaf),
        lambda: CPU.embed(int32(-1), leaf),
        lambda: CPU.take_rows(x, int32(2)),
        lambda: CPU.add_gated(x, x, normal(15), None),
        lambda: CPU.write_pages_(x[:, None], x[:, None], (normal(3, 2, 1, 16),) * 2, int32(0, 6)),
    ):
        with pytest.raises(RuntimeError):
            refused()
