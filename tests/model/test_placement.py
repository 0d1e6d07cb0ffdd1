"""Memory for weights and pages."""

import pytest
import torch

from mllama_graph.core.errors import UserError
from mllama_graph.model.placement import HUGE_PAGE, Placement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_large_tensors_begin_at_a_huge_page_and_keep_what_is_written(dtype):
    placement = Placement.at(torch.device("cpu"))
    tensors = [placement.allocate((3, HUGE_PAGE + 5), dtype) for _ in range(2)]
    for value, x in enumerate(tensors):
        x.view(torch.uint8).fill_(value)
    for value, x in enumerate(tensors):
        assert x.data_ptr() % HUGE_PAGE == 0 and x.is_contiguous() and (x.shape, x.dtype) == ((3, HUGE_PAGE + 5), dtype)
        assert (x.view(torch.uint8) == value).all()


def test_memory_that_the_host_refuses_is_named():
    with pytest.raises(UserError, match="1125899907 MB for a weight or for K/V pages are refused.*Raise the limit"):
        Placement.at(torch.device("cpu")).allocate((1 << 40, 256), torch.float32)


def test_small_tensors_and_those_without_memory_are_allocated_by_torch():
    assert Placement.at(torch.device("cpu")).allocate((2, 3), torch.float32).shape == (2, 3)
    assert Placement.at(torch.device("meta")).allocate((2, HUGE_PAGE), torch.int8).is_meta
