"""An NPU's weights: what would be computed from them in every step is computed when they are loaded.

Never run on an NPU. Layouts of linear layers in floating point (npu_quantised.py has those of quantised ones):

    ND                   (out, in), as in the checkpoint, with a transpose flag
    NZ                   (in, out), cast to the tiles that the matrix unit reads: so cann-recipes-infer and vllm-ascend
                         give weights to matrix products
    NZ, with a bias      (out, in), cast likewise (torchair's use_internal_format_weight casts nn.Linear's weights so):
                         only npu_linear gives MatMul a bias in fp32. The vision tower's fc1, and the projector

The simulation has the same layouts, but casts nothing: tiles are an order of memory that a graph's tensors don't show.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mllama_graph.model.tree import CrossLayer, Linear, VisionLayer, Weights, linears
from mllama_graph.ops import npu_quantised

GATED = (CrossLayer, VisionLayer)
GATES = ("attention_gate", "mlp_gate")


def inputs_first(leaf: Linear, nz: bool) -> bool:
    """Whether the weight of a layer in floating point is stored as (in, out)."""
    return nz and leaf.bias is None


def lay_out(weights: Weights, dtype: torch.dtype, nz: bool = False, heads: tuple[int, int] | None = None) -> None:
    """Convert weights in place, on the host, to what ops/npu.py reads. dtype: of activations. nz: whether NZ is used.

    Biases become fp32 for bf16 activations: MatMul has a kernel for no other (ops-nn, mat_mul_v3_def.cpp, ascend910b).
    The gates of layers become tanh(gate), rounded as plain.py rounds it. heads: the width of the vision tower's heads,
    and that to which they are padded with zeros, which change no score and no result.
    """
    npu_quantised.lay_out(weights, dtype, nz)
    if heads:
        for layer in weights.modules():
            if isinstance(layer, VisionLayer):
                _pad_heads(layer, *heads)
    for leaf in linears(weights):
        if leaf.format is None and inputs_first(leaf, nz):
            _replace(leaf, "weight", leaf.weight.cpu().T.contiguous())
        if leaf.format is None and leaf.bias is not None and dtype == torch.bfloat16:
            _replace(leaf, "bias", leaf.bias.cpu().float())
    for layer in weights.modules():
        for name in GATES if isinstance(layer, GATED) else ():
            if (gate := getattr(layer, name)) is not None:
                _replace(layer, name, gate.cpu().to(dtype).tanh())


def _pad_heads(layer: VisionLayer, width: int, padded: int) -> None:
    """Pad each head of a layer's q, k and v, and the inputs of o that belong to it."""
    assert layer.qkv.format is layer.o.format is layer.qkv.bias is None, "refused by plan/quantised.py"
    qkv_OI, o_OI = layer.qkv.weight.cpu(), layer.o.weight.cpu()
    by_head = F.pad(qkv_OI.view(-1, width, qkv_OI.shape[1]), (0, 0, 0, padded - width))
    _replace(layer.qkv, "weight", by_head.flatten(0, 1))
    _replace(layer.o, "weight", F.pad(o_OI.view(len(o_OI), -1, width), (0, padded - width)).flatten(1))
    layer.padded_head = padded


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    old = getattr(module, name)
    module.register_parameter(name, nn.Parameter(value.to(old.device), requires_grad=False))
