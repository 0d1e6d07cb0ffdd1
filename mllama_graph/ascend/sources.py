"""Where each rule of the lint comes from. docs/ascend.md shows this as a table, which a test compares with it.

`python -m mllama_graph.ascend -m mllama_graph.ascend.sources` prints the table.
"""

from mllama_graph.ascend.ge_ops import OPERATIONS
from mllama_graph.ascend.rules import RULES

# Rule -> its source. Paths are those of CANN's open repositories (ops-transformer, ops-nn, ops-math, ge).
SOURCES = {
    "outputs": "this project: what a graph returns is copied",
    "moves": "torchair, which inserts TensorMove where it can't write in place",
    "straight": "ge, tiling_schedule_optimize; ops-transformer, fused_infer_attention_score",
    "masks": "ge's folding kernels; ops-transformer, tiling of fused_infer_attention_score in CANN 8.5 to 9.1",
    "paged": "ops-transformer, tiling of fused_infer_attention_score in CANN 8.5 to 9.1",
    "candidates": "ops-math, top_k_v2_proto.h of CANN 8.5 to 9.1; this project: only candidates leave the device",
    "forms": "docs npu_fused_infer_attention_score: layouts, lengths and softmax_lse_flag; plan/forms.py",
    "writes": "torchair, graph_pass.py: operations that write to their inputs",
    "numbers": "docs npu_fused_infer_attention_score: lengths in int64; no kernel of the hot path takes float64",
    "weights": "ops-nn, QuantBatchMatmulV3TransposeFusionPass and WeightQuantBatchMatmulV2TransposeFusionPass",
    "collectives": "this project: tensor parallelism over heads, MLP and vocabulary",
    "casts": "this project",
    "kernels": "ops-math and ops-nn 9.1, the lists for ascend910b that ascend/kernels.py names",
    "known": "torch_npu 2.13.0, torchair's IR of each operation",
    "layouts": "the rows below",
    "histogram": "this project: ascend/golden.json",
}
# Operation -> the limits that the rule `layouts` holds it to; its source is that of ge_ops.
LIMITS = {
    "FusedInferAttentionScore": "16-bit types, at most 256 heads and 64 per KV head, width a multiple of 16 up to 512, "
    "N * D below 65535; int32 table and int64 lengths; pages of 16 to 512 tokens (several rows: multiples of 128), "
    "below 2^31 elements; masks up to the table's end. int8 pages: one row, fp32 scales (N, K, P), pages and heads in "
    "multiples of 32. Tiling code of CANN 8.5 to 9.1: one length per sequence, lengths of queries and sparse_mode 3 "
    "for several rows alone",
    "ScatterPaKvCache": "one dtype, 16-bit or int8, rows (T, K, H), pages (N, P, K, H), slots in int32 or int64, "
    "unique and in range",
    "ScatterNdUpdate": "one dtype, indices in int32 or int64, unique and in range",
    "MatMul": "two matrices of one dtype, a bias in fp32, or in fp16 for fp16 (ops-nn, mat_mul_v3_def.cpp, ascend910b)",
    "RotaryMul": "4 axes, cos and sin (1, S, 1, D), B and N below 1000, an even D below 896",
    "RmsNorm": "a weight in the dtype of its input",
    "WeightQuantBatchMatmulV2": "K and N at most 65535, groups in multiples of 32, scales in the dtype of the input",
    "QuantBatchMatmulV3": "int8 matrices, scales in fp32, an output in fp16 only with a scale of each row",
}


def claim(rule: str) -> str:
    """What a rule demands: the first line of its docstring."""
    return (RULES[rule].__doc__ or "").partition("\n")[0].removesuffix(".")


def rows() -> list[tuple[str, str, str]]:
    """(rule or operation, what it demands, source): the rows of the table in docs/ascend.md."""
    rules = [(f"`{rule}`", claim(rule), SOURCES[rule]) for rule in RULES]
    return rules + [(f"`layouts`: {op}", limits, OPERATIONS[op].source) for op, limits in LIMITS.items()]


if __name__ == "__main__":
    print("\n".join(f"| {' | '.join(row)} |" for row in rows()))
