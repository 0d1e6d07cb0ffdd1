"""The dtypes for which a 910B's cores have a kernel of an operation; what has none runs on AICPU, or not at all.

Read in CANN's open sources, ops-math and ops-nn 9.1 of August 2026: the list for ascend910b in the named file, which
aclnn takes to choose between the cores and AICPU. Inferred: GE chooses the same for the operations of a graph.
"""

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BYTES = (torch.int8, torch.uint8)

# Operation type -> dtypes of its inputs, apart from constants, and the source.
KERNELS: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "Add": ((*FLOATS, *BYTES, torch.int32, torch.int64, torch.bool), "math/add/op_api/add.cpp"),
    "Sub": ((*FLOATS, *BYTES, torch.int32, torch.int64, torch.bool), "math/sub/op_api/sub.cpp"),
    "Mul": ((*FLOATS, *BYTES, torch.int32, torch.int64, torch.bool), "math/mul/op_api/mul.cpp"),
    "RealDiv": ((*FLOATS, torch.int32, torch.bool), "math/real_div/op_api/realdiv.cpp"),
    "Neg": ((*FLOATS, torch.int8, torch.int32, torch.int64), "math/neg/op_api/neg.cpp"),
    "Cos": (FLOATS, "math/cos/op_api/cos.cpp"),
    "Sin": (FLOATS, "math/sin/op_api/sin.cpp"),
    "Less": ((*FLOATS, *BYTES, torch.int32, torch.int64, torch.bool), "math/less/op_api/less.cpp"),
    "GreaterEqual": ((*FLOATS, *BYTES, torch.int32, torch.int64), "math/greater_equal/op_api/greater_equal.cpp"),
    "LogicalAnd": ((torch.bool,), "math/logical_and/op_api/logical_and.cpp"),
    "LogicalOr": ((*FLOATS, *BYTES, torch.int32, torch.int64, torch.bool), "math/logical_or/op_api/logical_or.cpp"),
    "ReduceSum": ((*FLOATS, torch.int32, torch.int64), "math/reduce_sum/op_api/reduce_sum_op.cpp"),
    "ClipByValueV2": ((*FLOATS, torch.int32, torch.int64), "conversion/clip_by_value_v2/op_api/clip_by_value.cpp"),
    "SoftmaxV2": (FLOATS, "activation/softmax_v2/op_api/softmax_v2_op.cpp"),
    "SplitV": ((*FLOATS, *BYTES, torch.int64), "conversion/split_v/op_api/split_v.cpp"),
    "Exp": (FLOATS, "math/exp/op_api/exp.cpp"),
    "TopKV2": (FLOATS, "math/top_k_v2/op_api/topk.cpp"),
    "ArgMaxWithValue": (FLOATS, "math/arg_max_with_value/op_graph/arg_max_with_value_proto.h"),
    # HCCL, not a core; its IR lists no bf16.
    "HcomAllGather": (
        (torch.float32, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64),
        "torchair, IR HcomAllGather",
    ),
    "ScatterNdUpdate": ((*FLOATS, torch.int8, torch.int32, torch.int64, torch.bool), "docs npu_scatter_nd_update_"),
    "PadV3": ((*FLOATS, torch.int8, torch.int32), "conversion/pad_v3/op_api/padv3.cpp"),
    "BroadcastTo": (
        (*FLOATS, *BYTES, torch.int32, torch.int64, torch.bool),
        "conversion/broadcast_to/op_api/broadcast_to.cpp",
    ),
}
# dtype -> dtypes that Cast converts it to, of those that a step's tensors can have.
CASTS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    torch.float16: (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    torch.bfloat16: (torch.float32, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    torch.int8: (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32, torch.int64, torch.bool),
    torch.uint8: (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64),
    torch.int32: (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool),
    torch.int64: (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.bool),
    torch.bool: (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64),
}
CAST_SOURCE = "math/cast/op_api/cast.cpp"
# Operations without a kernel whose source is public.
MISSING = ("Sxpy",)
# Pairs of dtypes that MatMul multiplies and adds: x -> the dtypes of a bias.
BIASES = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.float32,),
    torch.float16: (torch.float16, torch.float32),
}
BIAS_SOURCE = "matmul/mat_mul_v3/op_host/mat_mul_v3_def.cpp"
