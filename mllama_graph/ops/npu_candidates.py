"""The k largest logits on an NPU: TopKV2, or ArgMaxWithValue for one.

torchair's own converter of torch.topk gives TopKV2 an int64 k, for which the IR of CANN 8.5 has no form (int32), an
attribute that only CANN's newest IR knows (sort_policy, for another device), and a Cast of the columns to int64.
This operation is lowered without them.
"""

from typing import Any

import torch
import torchair
from torch import Tensor
from torchair._ge_concrete_graph import ge_apis as ge


@torch.library.custom_op("mllama_graph::npu_top_k", mutates_args=())
def npu_top_k(x_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `top_k` of model/ops.py; columns are int32. Captured kernels (npugraph_ex) run this body."""
    value_Bk, column_Bk = x_BV.topk(k)
    return value_Bk, column_Bk.int()


@npu_top_k.register_fake
def _(x_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    value_Bk = x_BV.new_empty((*x_BV.shape[:-1], k))
    return value_Bk, torch.empty_like(value_Bk, dtype=torch.int32)


@torchair.register_fx_node_ge_converter(torch.ops.mllama_graph.npu_top_k.default)
def _converter(x_BV: Any, k: int, meta_outputs: Any = None) -> tuple[Any, Any]:
    if k == 1:
        column_B1, value_B1 = ge.ArgMaxWithValue(x_BV, dimension=1, keep_dims=True)
        return value_B1, column_B1
    value_Bk, column_Bk = ge.TopKV2(x_BV, torchair.ge.Const(k, dtype=torchair.ge.DataType.DT_INT32))
    del value_Bk.node.attr["sort_policy"]
    return value_Bk, column_Bk


def top_k(x_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.ops.mllama_graph.npu_top_k(x_BV, k)
