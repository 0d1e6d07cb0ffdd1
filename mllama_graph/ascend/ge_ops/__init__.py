"""What every operation of a GE graph computes, in plain PyTorch, and the documented limits that nothing else checks.

There is one function per operation. Each names its source, in the torch_npu 2.13.0 package:

    IR NAME      the operator's definition, REG_OP(NAME), in torch_npu/dynamo/torchair: _ge_concrete_graph/
                 auto_generated_ge_raw_ops.py, _ge_concrete_graph/ge_apis.py or ge/_ge_graph.py
    docs NAME    torch_npu/_op_plugin_docs.py under NAME: formula, layouts, dtypes, limits
    ONNX / TF    CANN's IR says "compatible with" that operator

16-bit tensors are computed in fp32 and rounded once at the end of each operation. An NPU's kernels may round elsewhere,
which is not reproduced here.
"""

from mllama_graph.ascend.ge_ops import attention, collectives, layers, quantised, tensors
from mllama_graph.ascend.ge_ops.registry import OPERATIONS, GraphError, Operation

__all__ = ["OPERATIONS", "GraphError", "Operation", "attention", "collectives", "layers", "quantised", "tensors"]
