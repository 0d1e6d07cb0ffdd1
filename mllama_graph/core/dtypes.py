"""Names and sizes of the dtypes of weights, activations and pages. Imports no torch."""

from dataclasses import dataclass

# Bytes per element of each dtype, and the values that dtype= accepts.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
DTYPES = ("auto", *BYTES)

# Bytes per element of K/V pages, without scales, and the values that kv= accepts.
PAGE_BYTES = BYTES | {"int8": 1}
KVS = ("auto", "bf16", "int8")

# Names of dtypes in safetensors headers -> names in this package.
SAFETENSORS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}

# A weight whose storage dtype is narrower than the compute dtype is widened inside a product of up to this many rows;
# for more rows it is widened once, before a GEMM. Read while tracing (ops/plain.py) and by the memory plan.
WIDEN_ROWS = 8


@dataclass(frozen=True)
class Precision:
    """Dtypes by name. store: dtype of the weights. compute: dtype of activations. kv: dtype of K/V pages."""

    store: str
    compute: str
    kv: str
