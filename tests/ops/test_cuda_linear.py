"""The Triton kernels of quantised linear layers against the values that codes stand for; see test_cuda.py.

Triton's interpreter multiplies bfloat16 as integers in tl.dot, so that bfloat16 rows are tested on a GPU only.
"""

from types import SimpleNamespace

import pytest
import torch
from gpu_kernels import DEVICE, GPU, compiles, compiling, ptxas, runs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mllama_graph.model.codes import Codes, pack, values
from mllama_graph.model.formats import DYNAMIC, STATIC, Format
from mllama_graph.model.tree import Linear
from mllama_graph.ops import cuda, cuda_linear, cuda_products, cuda_triton, plain
from mllama_graph.ops.cuda_linear import fits, lay_out, splits
from mllama_graph.ops.cuda_products import tile_for

FORMATS = {
    "int8": Format("int8"),
    "int8 in groups with shifts": Format("int8", group=32, shifted=True),
    "int8 with a shift": Format("int8", shifted=True),
    "fp8": Format("fp8"),
    "int4, one group": Format("int4"),
    "int4": Format("int4", group=128),
    "int4 in odd groups": Format("int4", group=96),
    "int4 with shifts, sorted": Format("int4", group=64, shifted=True, sorted=True),
    "NF4": Format("codebook", group=64),
}
# Rows of each tile, and outputs that fill none.
ROWS, OUTPUTS, INPUTS = (3, 20, 70), 136, 384
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not GPU, reason="Triton's interpreter has no bfloat16 tl.dot")
    ),
]
# Values of a codebook are rounded to the type of x; a result is.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def leaf_of(form, outputs=OUTPUTS, inputs=INPUTS, bias=False):
    """A leaf of random codes in the canonical layout, and its values (O, I) in fp64, columns in the order of inputs."""
    torch.manual_seed(outputs * inputs)
    groups = form.groups(inputs)
    codes = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)
    if form.code == "fp8":
        # All codes but NaN: subnormal and negative ones.
        codes = torch.where(codes & 127 == 127, 1, codes).view(torch.float8_e4m3fn)
    elif form.bits == 4:
        codes = (codes & 15).to(torch.uint8)
    size = {"int8": 2**-6, "fp8": 2**-8}.get(form.code, 2**-3)
    found = Codes(
        codes,
        (torch.rand(outputs, groups) + 0.5) * size,
        torch.randn(outputs, groups) if form.shifted else None,
        torch.randperm(inputs).int() if form.sorted else None,
        torch.randn(16) if form.code == "codebook" else None,
        torch.tensor([0.03]) if form.activations == STATIC else None,
        torch.tensor([5.0]) if form.activations == STATIC else None,
    )
    wide = values(found, form).double()
    if found.order is not None:
        wide[:, found.order.long()] = wide.clone()
    leaf = Linear()
    leaf.format = form
    parts = vars(found) | {"weight": pack(codes, form), "bias": torch.randn(outputs) if bias else None}
    for name in ("weight", "scale", "shift", "order", "codebook", "input_scale", "input_zero", "bias"):
        if parts[name] is not None:
            setattr(leaf, name, torch.nn.Parameter(parts[name].clone(), requires_grad=False))
    return leaf.to(DEVICE), wide.to(DEVICE)


def laid_out(leaf):
    lay_out(torch.nn.ModuleList([leaf]))
    return leaf


@pytest.fixture(params=[1, 132], ids=["whole", "split"])
def device(request, monkeypatch):
    """A device of so many multiprocessors: inputs are not split, or split."""
    monkeypatch.setattr(cuda_linear, "multiprocessors", lambda device: request.param)
    monkeypatch.setattr(cuda_linear, "LEAST_TILES", 1)


def rows_of(count, dtype, inputs=INPUTS):
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).to(DEVICE, dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_values(device, name, dtype):
    leaf, wide = leaf_of(FORMATS[name], bias=name == "int4")
    laid_out(leaf)
    for rows in ROWS:
        x = rows_of(rows, dtype)
        y, expected = cuda_linear.linear(x, leaf), x.double() @ wide.T
        if leaf.bias is not None:
            expected = expected + leaf.bias.double()
        assert y.dtype == dtype
        # Sums in fp32 of as many terms as inputs: some roundings of the sum of their sizes.
        most = (x.double().abs() @ wide.abs().T * (2e-6 + ROUNDING[dtype] * (name == "NF4"))).max()
        assert_close(y.double(), expected, rtol=ROUNDING[dtype], atol=float(most))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activations", [DYNAMIC, STATIC])
@pytest.mark.parametrize("inputs", [INPUTS, 200])
def test_products_of_integers_are_those_of_the_plain_operations(device, activations, inputs, dtype):
    leaf, _ = leaf_of(Format("int8", activations=activations), inputs=inputs)
    for rows in ROWS:
        x = rows_of(rows, dtype, inputs) * 3
        expected = plain.quantised_linear(x, laid_out(leaf))
        # Sums are exact; scales are multiplied in another order.
        assert_close(cuda_linear.linear(x, leaf), expected, rtol=max(4e-7, ROUNDING[dtype]), atol=0)
        if activations == DYNAMIC:
            half = x.abs().amax(-1, keepdim=True)
            largest = torch.stack((half / 2, 2 * half))
            given = cuda_linear.linear(x, leaf, largest)
            assert_close(given, plain.quantised_linear(x, leaf, largest), rtol=max(4e-7, ROUNDING[dtype]), atol=0)


@runs
def test_leading_axes_are_kept_and_strided_rows_are_read_as_they_are(device):
    leaf, wide = leaf_of(FORMATS["int4"])
    laid_out(leaf)
    x = rows_of(6, torch.float32).view(3, 2, -1).transpose(0, 1)
    assert_close(cuda_linear.linear(x, leaf).double(), x.double() @ wide.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", [Format("int4", group=8), Format("int8", group=24), Format("codebook", group=16)])
def test_leaves_that_the_kernels_do_not_read_stay_plain(form):
    leaf, wide = leaf_of(form)
    laid_out(leaf)
    x = rows_of(3, torch.float32)
    assert not fits(form, INPUTS) and not fits(Format("int8"), INPUTS + 8)
    assert torch.equal(cuda_linear.linear(x, leaf), plain.quantised_linear(x, leaf))


def test_splits_fill_a_device_without_tiny_parts():
    few, many = tile_for(1, False), tile_for(512, False)
    assert splits(1, 4096, 4096, few, 132) == 8
    assert splits(1, 28672, 4096, few, 132) == 1
    assert splits(1, 768, 4096, few, 132) == 8
    assert splits(512, 28672, 4096, many, 132) == 1


def launch(operation, *given):
    """Call the function under a triton_op."""
    return operation._init_fn(*given)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("name", ["int8", "int4 with shifts, sorted", "fp8", "NF4"])
def test_kernels_compile_for_a_gpu_without_spilling_registers(capability, rows, name, monkeypatch, tmp_path):
    form, compiled = FORMATS[name], []
    monkeypatch.setattr(cuda_products, "wrap_triton", compiling(capability, compiled))
    parts = {
        key: torch.empty(part.shape, dtype=getattr(torch, part.dtype)) for key, part in form.parts(512, 1024).items()
    }
    x = torch.empty(rows, 1024, dtype=torch.bfloat16)
    launch(
        cuda_products.coded_product,
        x,
        parts["weight"].view(torch.int32),
        parts["scale"],
        parts.get("shift"),
        parts.get("codebook"),
        None,
        form.code,
        cuda_linear.segment_of(form),
        4 if rows == 1 else 1,
    )
    check(compiled, capability, tmp_path)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 300])
def test_kernels_of_integers_compile_for_a_gpu_without_spilling_registers(capability, rows, monkeypatch, tmp_path):
    compiled, codes, one = [], torch.empty(512, 1024, dtype=torch.int8), torch.empty(1)
    monkeypatch.setattr(cuda_products, "wrap_triton", compiling(capability, compiled))
    x, scale = torch.empty(rows, 1024, dtype=torch.int8), torch.empty(512, 1)
    for zero in (None, one):
        launch(cuda_products.integer_product, x, one, zero, codes, scale, None, torch.bfloat16, 4 if rows == 1 else 1)
    check(compiled, capability, tmp_path)


def check(compiled, capability, folder):
    for kernel in compiled:
        assert "0 bytes spill stores, 0 bytes spill loads" in ptxas(kernel, capability, folder)
        # Tensor cores: of a warp group on sm_90, of a warp on sm_80.
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in kernel.asm["ptx"]
        # sm_80 has 163 KiB of shared memory for a program.
        assert kernel.metadata.shared <= 163 * 1024
        # Codes are decoded through subnormal numbers, which must not be flushed to zero.
        assert ".ftz" not in kernel.asm["ptx"]


@compiles
def test_an_exported_layer_keeps_the_kernels_and_they_write_nothing_but_their_results(monkeypatch):
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(cuda_triton.triton.runtime.driver, "_active", target, raising=False)
    monkeypatch.setattr(cuda_linear, "multiprocessors", lambda device: 132)
    ops = cuda.cuda_ops(1)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            forms = (Format("int4", group=64, shifted=True), Format("fp8"), Format("int8", activations=DYNAMIC))
            self.leaves = torch.nn.ModuleList(Linear() for _ in forms)
            for leaf, form in zip(self.leaves, forms):
                leaf.format = form
                for name, part in form.parts(1024, 1024).items():
                    data = torch.empty(part.shape, dtype=getattr(torch, part.dtype), device="cuda")
                    leaf.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))

        def forward(self, x):
            for leaf in self.leaves:
                x = ops.linear(x, leaf)
            return x

    with FakeTensorMode():
        program = torch.export.export(
            Layer(), (torch.empty(2, 1024, dtype=torch.bfloat16, device="cuda"),), strict=False
        )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.mllama_graph.coded_product.default) == 2
    assert called.count(torch.ops.mllama_graph.integer_product.default) == 1
    lowered = program.run_decompositions(decompose_custom_triton_ops=True)
    written = [
        node.kwargs["tensors_to_clone"]
        for node in lowered.graph.nodes
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional
    ]
    assert written == [["out_ptr"]] * 3
