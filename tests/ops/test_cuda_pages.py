"""The Triton kernels of ops/cuda.py on int8 pages against plain.py. How they are run: see test_cuda.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import CLOSE, DEVICE, SEEDS, SHAPES, compiled_for, compiles, ints, normal, runs, table_of

from mllama_graph.ops import cuda, plain


def int8_pages(seed, count, page_size, heads, width):
    size = (count, page_size, heads, width)
    data = tuple(torch.zeros(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    scales = tuple(torch.zeros(count, heads, page_size, device=DEVICE) for _ in range(2))
    rows = (normal(seed + n, count * page_size, heads, width) * (1 + n) for n in range(2))
    plain.write_pages_(*rows, (*data, *scales), torch.arange(count * page_size, dtype=torch.int32, device=DEVICE))
    return (*data, *scales)


@runs
@settings(max_examples=15)
@given(seed=SEEDS, shape=SHAPES, rows=st.integers(1, 3), width=st.integers(1, 30), count=st.integers(1, 5))
def test_attention_to_int8_pages_is_plain_attention(seed, shape, rows, width, count):
    K, G, H, P = shape
    width = max(width, -(-rows // P))
    q, pages, table = normal(seed, 2 * rows, K * G, H), int8_pages(seed + 1, 9, P, K, H), table_of(seed, 2, width, 9)
    data, scales = pages[:2], pages[2:]
    length = ints([width * P, rows])
    assert_close = torch.testing.assert_close
    assert_close(
        cuda.attend_pages_split(q, *data, table, length, count, *scales),
        plain.attend_pages(q, pages, table, length),
        **CLOSE[torch.float32],
    )
    fill, see = torch.full_like(table, (P + 1) // 2), ints([[width - 1, width], [0, width]] * rows)
    assert_close(
        cuda.attend_image_split(q, *data, table, fill, see, count, *scales),
        plain.attend_image(q, pages, table, fill, see),
        **CLOSE[torch.float32],
    )


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_on_int8_pages_compile_for_a_gpu_without_spilling_registers(capability, monkeypatch, tmp_path):
    pages = tuple(torch.empty(9, 16, 8, 128, dtype=torch.int8) for _ in range(2))
    scales = tuple(torch.empty(9, 8, 16) for _ in range(2))
    compiled_for(capability, torch.bfloat16, 4, pages, scales, monkeypatch, tmp_path)
