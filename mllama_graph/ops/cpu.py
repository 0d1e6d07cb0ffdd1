"""The operations on a CPU that computes in fp32: plain.py's, with C++ kernels where memory or plain attention bounds them.

The kernels are in mllama_graph/native/kernels.cpp; `native.load("kernels", folder)` comes before the first use. Every
length is data there, and so is the number of rows: a step costs what its tokens cost, whatever the bucket holds.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mllama_graph.model.inputs import PromptInput, TokenInput
from mllama_graph.model.ops import Ops
from mllama_graph.model.tree import Weights, matrices
from mllama_graph.ops import plain
from mllama_graph.ops.plain import PLAIN, Pages


def lay_out(weights: Weights) -> None:
    """Lay the matrices of linear layers out as the kernel reads them, in place: outputs side by side, as many as a vector has."""
    for weight in matrices(weights):
        torch.ops.mllama_graph.lay_out_(weight)


def linear(x: Tensor, leaf, real_1: Tensor | None = None) -> Tensor:
    """Of a weight that `lay_out` has laid out; rows from `real_1` on get zeros."""
    return torch.ops.mllama_graph.linear(x, leaf.weight, leaf.bias, real_1)


def attend_prompt(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, pages: Pages, table_J: Tensor | None,
                  past_1: Tensor, real_1: Tensor | None = None) -> Tensor:
    """As plain.py's; rows from `real_1` on get zeros."""
    if table_J is None:
        return plain.attend_prompt(q_TQH, k_TKH, v_TKH, pages, table_J, past_1)
    return torch.ops.mllama_graph.attend_prompt(q_TQH, k_TKH, v_TKH, *pages, table_J, past_1, real_1,
                                                q_TQH.shape[-1] ** -0.5)


def attend_pages(q_TQH: Tensor, pages: Pages, table_BJ: Tensor, len_B: Tensor) -> Tensor:
    return torch.ops.mllama_graph.attend_pages(q_TQH, *pages, table_BJ, len_B, q_TQH.shape[-1] ** -0.5)


def attend_image(q_TQH: Tensor, pages: Pages, table_BJ: Tensor, fill_BJ: Tensor, see_T2: Tensor) -> Tensor:
    return torch.ops.mllama_graph.attend_image(q_TQH, *pages, table_BJ, fill_BJ, see_T2, q_TQH.shape[-1] ** -0.5)


def attend_tiles(q_SAH: Tensor, k_SAH: Tensor, v_SAH: Tensor, pad_S: Tensor) -> Tensor:
    return torch.ops.mllama_graph.attend_tiles(q_SAH, k_SAH, v_SAH, pad_S, q_SAH.shape[-1] ** -0.5)


def without_padding(ops: Ops, given: PromptInput | TokenInput) -> Ops:
    """Other padded rows cost nothing already: they see no image, and one token of the pages."""
    real_1 = given.real_1
    return replace(ops, linear=partial(ops.linear, real_1=real_1), attend_prompt=partial(ops.attend_prompt, real_1=real_1))


CPU = replace(PLAIN, without_padding=without_padding, linear=linear, attend_prompt=attend_prompt, attend_pages=attend_pages,
              attend_image=attend_image, attend_tiles=attend_tiles)
