"""An NPU's weights: what would be computed from them in every step is computed when they are loaded."""

import torch
from torch import nn

from mllama_graph.model.tree import CrossLayer, VisionLayer, Weights, linears
from mllama_graph.ops import npu_quantised

GATED = (CrossLayer, VisionLayer)
GATES = ("attention_gate", "mlp_gate")


def lay_out(weights: Weights, dtype: torch.dtype, nz: bool = False) -> None:
    """Convert weights in place, on the host, to what ops/npu.py reads. dtype: of activations. nz: see npu_quantised.py.

    Biases become fp32 for bf16 activations: MatMul has a kernel for no other (ops-nn, mat_mul_v3_def.cpp, ascend910b).
    The gates of layers become tanh(gate), rounded as plain.py rounds it.
    """
    npu_quantised.lay_out(weights, dtype, nz)
    for leaf in linears(weights):
        if leaf.format is None and leaf.bias is not None and dtype == torch.bfloat16:
            _replace(leaf, "bias", leaf.bias.cpu().float())
    for layer in weights.modules():
        for name in GATES if isinstance(layer, GATED) else ():
            if (gate := getattr(layer, name)) is not None:
                _replace(layer, name, gate.cpu().to(dtype).tanh())


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    old = getattr(module, name)
    module.register_parameter(name, nn.Parameter(value.to(old.device), requires_grad=False))
