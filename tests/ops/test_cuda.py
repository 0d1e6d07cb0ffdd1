"""The Triton kernels of ops/cuda.py against plain.py: on a GPU, or on a CPU where TRITON_INTERPRET=1 is set.

Without either, they are only compiled for GPUs and traced. Triton is not a dependency of the project on a CPU: install
it with `pip install triton==3.7.1` (3.6 can't interpret with numpy 2.4). Its interpreter multiplies bfloat16 as
integers in tl.dot, so that bfloat16 queries are tested on a GPU only.
"""

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mllama_graph.ops import cuda, plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
NO_TRITON = "Triton is not installed"
runs = pytest.mark.skipif(
    cuda.triton is None or not (INTERPRETED or GPU),
    reason=f"{NO_TRITON}, or neither a GPU nor TRITON_INTERPRET=1 is there",
)
compiles = pytest.mark.skipif(cuda.triton is None or INTERPRETED, reason=f"{NO_TRITON}, or TRITON_INTERPRET=1 is set")

# fp32: sums of at most a few hundred products of order one, in another order. fp16: weights are rounded to it.
CLOSE = {
    torch.float32: {"atol": 5e-6, "rtol": 2e-5},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}
SEEDS = st.integers(0, 2**32 - 1)
# (kv heads, query heads per kv head, head width, page size)
SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 8), st.sampled_from([1, 7, 16, 20, 40, 64]), st.sampled_from([1, 3, 4, 16])
)
few = settings(max_examples=30)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def pages_of(seed, count, page_size, heads, width, dtype=torch.float32):
    return tuple(normal(seed + n, count, page_size, heads, width, dtype=dtype) for n in range(2))


def table_of(seed, sequences, width, count):
    return torch.randint(count, (sequences, width), generator=torch.Generator().manual_seed(seed)).int().to(DEVICE)


@pytest.fixture(params=[cuda.TILE_BYTES, 0], ids=["large_tiles", "tiles_of_16"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setattr(cuda, "TILE_BYTES", request.param)


@runs
@few
@given(
    seed=SEEDS,
    shape=SHAPES,
    rows=st.integers(1, 3),
    sequences=st.integers(1, 3),
    width=st.integers(1, 40),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_attend_pages_is_plain_attention(tile_bytes, seed, shape, rows, sequences, width, count, data):
    K, G, H, P = shape
    width = max(width, -(-rows // P))
    edges = [n for page in range(width + 1) for n in (page * P, page * P + 1) if rows <= n <= width * P]
    lengths = st.one_of(st.sampled_from(edges or [rows]), st.integers(rows, width * P))
    len_B = ints(data.draw(st.lists(lengths, min_size=sequences, max_size=sequences)))
    q, pages = normal(seed, sequences * rows, K * G, H), pages_of(seed + 1, 9, P, K, H)
    table = table_of(seed, sequences, width, 9)
    assert_close(
        cuda.attend_pages_split(q, *pages, table, len_B, count),
        plain.attend_pages(q, pages, table, len_B),
        **CLOSE[torch.float32],
    )


@runs
@few
@given(
    seed=SEEDS,
    shape=SHAPES,
    rows=st.integers(1, 3),
    sequences=st.integers(1, 3),
    width=st.integers(1, 40),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_attend_image_is_plain_attention_and_rows_without_images_are_finite(
    tile_bytes, seed, shape, rows, sequences, width, count, data
):
    K, G, H, P = shape
    fills = st.lists(st.sampled_from([0, 1, P // 2, P]), min_size=width, max_size=width)
    fill = ints(data.draw(st.lists(fills, min_size=sequences, max_size=sequences)))
    ends = st.tuples(st.integers(0, width), st.integers(0, width)).map(sorted)
    see = ints(data.draw(st.lists(ends, min_size=sequences * rows, max_size=sequences * rows)))
    q, pages = normal(seed, sequences * rows, K * G, H), pages_of(seed + 1, 9, P, K, H)
    table = table_of(seed, sequences, width, 9)
    out = cuda.attend_image_split(q, *pages, table, fill, see, count)
    assert torch.isfinite(out).all()
    filled = torch.stack([fill[t // rows, see[t, 0] : see[t, 1]].sum() > 0 for t in range(len(q))])
    assert_close(out[filled], plain.attend_image(q, pages, table, fill, see)[filled], **CLOSE[torch.float32])


@runs
@pytest.mark.parametrize(
    "query, stored",
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        pytest.param(
            torch.bfloat16,
            torch.bfloat16,
            marks=pytest.mark.skipif(not GPU, reason="Triton's interpreter has no bfloat16 tl.dot"),
        ),
    ],
)
def test_narrow_pages_are_read_in_the_type_of_the_queries(query, stored):
    q, pages, table = normal(0, 2, 8, 24, dtype=query), pages_of(1, 20, 16, 2, 24, stored), table_of(2, 2, 20, 20)
    len_B, see = ints([317, 40]), ints([[3, 20], [0, 9]])
    out = cuda.attend_pages_split(q, *pages, table, len_B, 4)
    assert out.dtype == query
    assert_close(out, plain.attend_pages(q, pages, table, len_B), **CLOSE[query])
    fill = torch.full_like(table, 11)
    out = cuda.attend_image_split(q, *pages, table, fill, see, 4)
    assert_close(out, plain.attend_image(q, pages, table, fill, see), **CLOSE[query])


@runs
def test_nothing_beyond_a_length_is_read():
    (k, v), table, len_B = pages_of(0, 40, 4, 1, 16), torch.arange(40).view(2, 20).int().to(DEVICE), ints([9, 33])
    q = normal(3, 2, 4, 16)
    wanted = plain.attend_pages(q, (k, v), table, len_B)
    for row, length in enumerate(len_B.tolist()):
        used = -(-length // 4)
        # A page that does not exist.
        table[row, used:] = 2**30
        for data in (k, v):
            data[20 * row + used - 1, (length - 1) % 4 + 1 :] = torch.nan
    assert_close(cuda.attend_pages_split(q, k, v, table, len_B, 5), wanted, **CLOSE[torch.float32])


@runs
def test_no_entry_outside_of_the_seen_range_is_read():
    pages, see, q = pages_of(0, 20, 4, 1, 16), ints([[2, 5], [4, 9]]), normal(3, 2, 4, 16)
    table, fill = ints([list(range(20))]), ints([[3] * 20])
    wanted = plain.attend_image(q, pages, table, fill, see)
    for data in pages:
        data[:, 3:] = torch.nan
    table[0, :2] = table[0, 9:] = 2**30
    assert_close(cuda.attend_image_split(q, *pages, table, fill, see, 3), wanted, **CLOSE[torch.float32])


@runs
def test_strided_queries_are_read_as_they_are():
    q, pages, table = normal(0, 2, 16, 4).permute(2, 0, 1), pages_of(1, 9, 4, 1, 16), table_of(2, 4, 5, 9)
    len_B = ints([20, 1, 7, 8])
    assert not q.is_contiguous()
    assert_close(
        cuda.attend_pages_split(q, *pages, table, len_B, 2),
        plain.attend_pages(q.contiguous(), pages, table, len_B),
        **CLOSE[torch.float32],
    )


@runs
def test_operations_use_the_kernels_for_few_rows_and_plain_attention_for_many(monkeypatch):
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    launched = []
    for name in ("attend_pages_split", "attend_image_split"):
        launch = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *given, launch=launch: launched.append(given) or launch(*given))
    ops, pages, table = cuda.cuda_ops(1), pages_of(1, 9, 16, 1, 16), table_of(2, 1, 20, 9)
    fill = torch.full_like(table, 11)
    for rows in (3, 40):
        q, see = normal(0, rows, 2, 16), ints([[0, 7]] * rows)
        assert_close(
            ops.attend_pages(q, pages, table, ints([300])),
            plain.attend_pages(q, pages, table, ints([300])),
            **CLOSE[torch.float32],
        )
        assert_close(
            ops.attend_image(q, pages, table, fill, see),
            plain.attend_image(q, pages, table, fill, see),
            **CLOSE[torch.float32],
        )
        assert len(launched) == 2
    assert [given[-1] for given in launched] == [2, 2]


def test_splits_fill_a_device_and_give_each_program_enough_keys():
    assert cuda.splits(1, 8, 8192, 132) == 33
    assert cuda.splits(64, 8, 8192, 132) == 1
    assert cuda.splits(1, 1, 1 << 20, 132) == cuda.MOST_SPLITS
    assert cuda.splits(1, 8, 16, 132) == 1
    assert cuda.splits(1, 8, 512, 132) == 512 // cuda.LEAST_KEYS


@given(
    sequences=st.integers(1, 256),
    kv_heads=st.integers(1, 16),
    keys=st.integers(1, 1 << 17),
    multiprocessors=st.integers(1, 200),
)
def test_splits_are_few_and_never_more_than_a_device_needs(sequences, kv_heads, keys, multiprocessors):
    count = cuda.splits(sequences, kv_heads, keys, multiprocessors)
    assert 1 <= count <= cuda.MOST_SPLITS
    assert count == 1 or keys / count >= cuda.LEAST_KEYS
    assert count == 1 or (count - 1) * sequences * kv_heads < cuda.PROGRAMS * multiprocessors


def test_without_triton_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda, "triton", None)
    with pytest.raises(ImportError, match="CUDA wheel of torch"):
        cuda.cuda_ops(1)


class _Launcher:
    """What `wrap_triton` returns: launch[grid](...)."""

    def __init__(self, launch):
        self._launch = launch

    def __getitem__(self, grid):
        return self._launch


def compiled_for(capability, dtype, queries, pages, scales, monkeypatch, tmp_path):
    """Compile the kernels for a GPU, for queries of `dtype`, and check what ptxas says of their registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
    names[torch.int32] = "*i32"
    compiled = []

    def compile_kernel(kernel):
        def launch(*given, num_warps, num_stages=3, **constants):
            types = [names[tensor.dtype] for tensor in given] + ["constexpr"] * len(constants)
            source = ASTSource(
                fn=kernel,
                signature=dict(zip(kernel.arg_names, types)),
                constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
                attrs={(n,): [["tt.divisibility", 16]] for n in range(len(given))},
            )
            compiled.append(
                compile(
                    source,
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": num_warps, "num_stages": num_stages},
                )
            )

        return _Launcher(launch)

    monkeypatch.setattr(cuda, "wrap_triton", compile_kernel)
    # The heads of the 11B model.
    q = torch.empty(2, 8 * queries, 128, dtype=dtype)
    table = torch.empty(2, 64, dtype=torch.int32)
    for image in (False, True):
        cuda._attend(q, *pages, table, table[:, 0], table, table, 8, image, *scales)
    assert len(compiled) == 4
    for kernel in compiled:
        (tmp_path / "kernel.ptx").write_text(kernel.asm["ptx"])
        ptxas = [
            cuda.triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name=sm_{capability}{'a' * (capability == 90)}",
            "kernel.ptx",
            "-o",
            "kernel.cubin",
        ]
        said = subprocess.run(ptxas, cwd=tmp_path, text=True, stderr=subprocess.PIPE, check=True).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        # Two programs fit a multiprocessor: sm_80 has 164 KiB of shared memory.
        assert kernel.metadata.shared <= 80 * 1024


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("queries", [1, 4])
def test_kernels_compile_for_a_gpu_without_spilling_registers(capability, dtype, queries, monkeypatch, tmp_path):
    pages = (torch.empty(9, 16, 8, 128, dtype=dtype),) * 2
    compiled_for(capability, dtype, queries, pages, (None, None), monkeypatch, tmp_path)


@compiles
def test_an_exported_step_keeps_the_kernels_and_they_write_nothing_but_their_results(monkeypatch):
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(cuda.triton.runtime.driver, "_active", target, raising=False)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    ops = cuda.cuda_ops(1)

    class Attend(torch.nn.Module):
        def forward(self, q, k, v, fresh, slot, table, length, fill, see):
            ops.write_pages_(fresh, fresh, (k, v), slot)
            return ops.attend_pages(q, (k, v), table, length) + ops.attend_image(q, (k, v), table, fill, see)

    with FakeTensorMode():

        def real(*size):
            return torch.empty(size, dtype=torch.bfloat16, device="cuda")

        def index(*size):
            return torch.empty(size, dtype=torch.int32, device="cuda")

        inputs = (
            real(2, 8, 128),
            real(99, 16, 2, 128),
            real(99, 16, 2, 128),
            real(2, 2, 128),
            index(2),
            index(2, 64),
            index(2),
            index(2, 64),
            index(2, 2),
        )
        program = torch.export.export(Attend(), inputs, strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.mllama_graph.attend_pages_split.default in called
    assert torch.ops.mllama_graph.attend_image_split.default in called
    # The decomposition that Inductor applies.
    lowered = program.run_decompositions(decompose_custom_triton_ops=True)
    written = [
        node.kwargs["tensors_to_clone"]
        for node in lowered.graph.nodes
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional
    ]
    assert written == [["partial_ptr", "lse_ptr"], ["out_ptr"]] * 2
