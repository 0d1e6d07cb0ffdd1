"""The kernels of linear layers with quantised weights, against the values that their codes stand for, in fp64."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from trees import linear_leaf

from mllama_graph import native
from mllama_graph.model.codes import Codes, pack, quantise, rounded_rows, values
from mllama_graph.model.formats import DYNAMIC, STATIC, Format
from mllama_graph.model.layout import LeafRows
from mllama_graph.model.tree import Linear
from mllama_graph.model.weights import write_codes
from mllama_graph.ops import cpu, plain

# Outputs around a panel of three vectors of 4, 8 or 16, and inputs that are no multiple of a decoded block.
SIZES = [(48, 64), (53, 320), (7, 1024), (144, 416)]
# Rows around the most of a tile, and beyond the rows of one task.
ROWS = (1, 3, 4, 8, 9, 50)
FORMATS = {
    "int8": Format("int8"),
    "int8 in groups with shifts": Format("int8", group=32, shifted=True),
    "int8 with a shift": Format("int8", shifted=True),
    "fp8": Format("fp8"),
    "int4": Format("int4", group=32),
    "int4, one group": Format("int4"),
    "int4 with shifts, sorted": Format("int4", group=32, shifted=True, sorted=True),
    "NF4": Format("codebook", group=32),
}
# Those whose activations are rounded to int8.
INTEGERS = {
    DYNAMIC: Format("int8", activations=DYNAMIC),
    STATIC: Format("int8", activations=STATIC),
    "w4a8": Format("int4", group=32, activations=DYNAMIC),
    "w4a8, one group": Format("int4", activations=DYNAMIC),
    "w4a8 with shifts, sorted": Format("int4", group=32, shifted=True, sorted=True, activations=DYNAMIC),
}


@pytest.fixture(scope="module", autouse=True)
def kernels(cache_home):
    native.load("kernels", cache_home)
    native.load("quantised", cache_home)


def leaf_of(form: Format, outputs: int, inputs: int, bias: bool) -> tuple[Linear, torch.Tensor]:
    """A leaf of random codes in the kernels' layout, and its values (O, I) in fp64, columns in the order of inputs."""
    torch.manual_seed(outputs * inputs)
    groups = form.groups(inputs)
    codes = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)
    if form.code == "fp8":
        codes = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    elif form.bits == 4:
        codes = (codes & 15).to(torch.uint8)
    found = Codes(
        codes,
        torch.rand(outputs, groups) + 0.5,
        torch.randn(outputs, groups) if form.shifted else None,
        torch.randperm(inputs).int() if form.sorted else None,
        torch.randn(16) if form.code == "codebook" else None,
        torch.tensor([0.03]) if form.activations == STATIC else None,
        torch.tensor([5.0]) if form.activations == STATIC else None,
    )
    wide = values(found, form).double()
    if found.order is not None:
        wide[:, found.order.long()] = wide.clone()
    parts = {name: value for name, value in vars(found).items() if name != "codes"}
    packed = pack(codes, form).clone()
    return linear_leaf(packed, torch.randn(outputs) if bias else None, format=form, **parts), wide


def in_panels(leaf: Linear) -> Linear:
    """The leaf, laid out as its kernel reads it."""
    for name in ("weight", "scale", "shift"):
        if (part := getattr(leaf, name)) is not None:
            LeafRows({name: part}, leaf.format, 0, cpu.PANELS).write(name, part.clone())
    return leaf


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_is_that_of_the_values(name, size):
    leaf, wide = leaf_of(FORMATS[name], *size, bias=size[0] == 53)
    in_panels(leaf)
    for rows in ROWS:
        x = torch.randn(rows, size[1])
        y, expected = cpu.linear(x, leaf), x.double() @ wide.T + (0 if leaf.bias is None else leaf.bias.double())
        # Sums in fp32 of as many terms as inputs: a few roundings of the sum of their sizes. Where products are of
        # whole numbers, an input is off by at most 2^-16 of the row's largest.
        most = (x.double().abs() @ wide.abs().T * 2e-6).max()
        most += (x.abs().amax() * wide.abs().sum(-1).max()).double() * 2**-16
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=float(most))
        # Such errors are spread evenly and have random signs: 3.5 (largest of a block) / 2^16 / 3^0.5 of the result.
        assert (y.double() - expected).square().mean().sqrt() < 6e-5 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", FORMATS | INTEGERS)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_a_chunk(name):
    leaf, _ = leaf_of((FORMATS | INTEGERS)[name], 149, 1024, bias=False)
    in_panels(leaf)
    x = torch.randn(120, 1024)
    whole = cpu.linear(x, leaf)
    for rows in ROWS:
        assert torch.equal(cpu.linear(x[:rows], leaf), whole[:rows])
    real = cpu.linear(x, leaf, torch.tensor([7], dtype=torch.int32))
    assert torch.equal(real[:7], whole[:7]) and not real[7:].any()


@pytest.mark.parametrize("activations", [DYNAMIC, STATIC])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_integers_are_exact(activations, size):
    leaf, wide = leaf_of(Format("int8", activations=activations), *size, bias=False)
    whole_codes = (wide / leaf.scale.double()).round()
    in_panels(leaf)
    for rows in ROWS:
        x = torch.randn(rows, size[1]) * 3
        if activations == DYNAMIC:
            codes, scale = rounded_rows(x)
        else:
            codes, scale = ((x / 0.03).round() + 5).clamp(-128, 127) - 5, torch.tensor(0.03)
        exact = codes.double() @ whole_codes.T
        expected = exact.float() * scale * leaf_scales(leaf, size)
        y = cpu.linear(x, leaf)
        # Three roundings, by the scales.
        torch.testing.assert_close(y, expected, rtol=4e-7, atol=0)
        if activations == DYNAMIC:
            half = x.abs().amax(-1, keepdim=True)
            assert torch.equal(cpu.linear(x, leaf, largest=torch.stack((half / 2, half))), y)


@pytest.mark.parametrize("name", [name for name in INTEGERS if name.startswith("w4a8")])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_four_bits_and_int8_activations_are_exact_in_each_group(name, size):
    leaf, wide = leaf_of(INTEGERS[name], *size, bias=size[0] == 53)
    x = torch.randn(max(ROWS), size[1]) * 3
    emulated = plain.linear(x, leaf)
    codes, scale = (part.double() for part in rounded_rows(x))
    expected = codes @ wide.T * scale + (0 if leaf.bias is None else leaf.bias.double())
    # A group's sum is exact; its scale, the sum over up to 32 groups and the row's scale are rounded to 24 bits.
    within = (codes.abs() @ wide.abs().T * scale * 2e-6).max()
    torch.testing.assert_close(emulated.double(), expected, rtol=0, atol=float(within))
    in_panels(leaf)
    half = x.abs().amax(-1, keepdim=True)
    for rows in ROWS:
        y = cpu.linear(x[:rows], leaf)
        torch.testing.assert_close(y.double(), expected[:rows], rtol=0, atol=float(within))
        assert torch.equal(cpu.linear(x[:rows], leaf, largest=torch.stack((half / 2, half))[:, :rows].contiguous()), y)


def leaf_scales(leaf: Linear, size: tuple[int, int]) -> torch.Tensor:
    """The scales of a leaf with one group, which its layout leaves in order."""
    return leaf.scale.view(size[0])


def test_rows_of_an_int8_embedding_are_looked_up_with_their_scales():
    found = quantise(torch.randn(20, 24), Format("int8"))
    leaf = linear_leaf(found.codes, format=Format("int8"), scale=found.scale)
    leaf.first, ids = torch.tensor(7, dtype=torch.int32), torch.tensor([3, 19, 0, 12], dtype=torch.int32)
    real = torch.tensor([3], dtype=torch.int32)
    wanted = values(found, leaf.format)[ids.long()]
    assert torch.equal(cpu.embed(ids, leaf), wanted) and torch.equal(plain.embed(ids, leaf), wanted)
    assert torch.equal(cpu.embed(ids, leaf, real)[:3], wanted[:3])
    # A part of the table that begins at id 7.
    wanted = torch.where(ids[:, None] >= 7, values(found, leaf.format)[(ids.long() - 7).clamp(0)], 0)
    assert torch.equal(cpu.embed_held(ids, leaf), wanted) and torch.equal(plain.embed_held(ids, leaf), wanted)
    # One call and nothing else: a graph of calls alone is compiled without torch's headers.
    calls = [
        node.target for node in make_fx(lambda ids: cpu.embed(ids, leaf))(ids).graph.nodes if node.op[:4] == "call"
    ]
    assert calls == [cpu.kernels.embed.default]


def test_codes_are_the_nearest_values():
    torch.manual_seed(0)
    x = torch.randn(40, 256)
    for form, error in ((Format("int8"), 1 / 254), (Format("fp8"), 1 / 16), (Format("int4", group=32), 1 / 14)):
        found = quantise(x, form)
        grouped = x.view(40, form.groups(256), -1)
        # Half a step of the largest value, or half a unit of E4M3's last of three bits.
        bound = grouped.abs() if form.code == "fp8" else grouped.abs().amax(-1, keepdim=True)
        bound = (bound * error * 1.001 + found.scale[..., None] * 2**-10).expand_as(grouped).reshape(40, 256)
        wrong = (values(found, form) - x).abs() > bound
        # 4-bit scales of least squared error may clip a group's largest values.
        assert wrong.float().mean() < (0.02 if form.code == "int4" else 1e-9)


@pytest.mark.parametrize("form", [Format("int8"), Format("fp8"), Format("int4", 32), Format("int4", 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_round_weights_to_the_same_codes(form, dtype):
    torch.manual_seed(0)
    x = torch.randn(97, 192)
    x[3], x[4, 1:], x[5], x[6] = 0, 0, x[5] * 1e-40, x[6] * 1e-6
    # Ties, which a product with 1 / scale would round to another number.
    x[7:40] = torch.randint(-127, 127, (33, 192)) + 0.5
    x[7:40, ::32] = 127
    x = x.to(dtype)
    expected, got = quantise(x.float(), form), cpu.rounded(x, form)
    assert torch.equal(got.codes.view(torch.int8), expected.codes.view(torch.int8))
    assert torch.equal(got.scale, expected.scale)
    # Some columns of these rows, as the rows after the first five of a leaf in panels.
    taken, parts = slice(64, 192), form.parts(102, 128)
    one, other = (
        {name: torch.zeros(part.shape, dtype=getattr(torch, part.dtype)) for name, part in parts.items()}
        for _ in range(2)
    )
    write_codes(LeafRows(one, form, 5, cpu.PANELS), expected, taken)
    cpu.PANELS.rounded(other, form, 5, x, taken)
    assert all(torch.equal(part.view(torch.int8), other[name].view(torch.int8)) for name, part in one.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FORMATS | INTEGERS)
def test_a_row_with_a_value_that_is_not_finite_has_no_finite_result(name, value):
    form = (FORMATS | INTEGERS)[name]
    leaf, _ = leaf_of(form, 53, 320, bias=False)
    in_panels(leaf)
    for rows in (40, 3):
        x = torch.randn(rows, 320)
        whole = cpu.linear(x, leaf)
        x[1, 77] = value
        found = cpu.linear(x, leaf)
        assert not found[1].isfinite().any()
        assert torch.equal(found[[0, *range(2, rows)]], whole[[0, *range(2, rows)]])
    if form.activations == DYNAMIC:
        largest = torch.stack((x.abs().amax(-1, keepdim=True), torch.ones(3, 1)))
        sound = x.nan_to_num(0, 0, 0)
        assert not cpu.linear(sound, leaf, largest=largest)[1].isfinite().any()
