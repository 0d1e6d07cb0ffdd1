"""Names and sizes of the dtypes that weights, activations and pages come in. No torch."""

from dataclasses import dataclass

# What dtype= accepts, and bytes per element of each dtype.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
DTYPES = ("auto", *BYTES)

# The names that safetensors headers use, and ours.
SAFETENSORS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}

# A weight stored narrower than it is computed in is widened while it is read, for products of up to this many rows;
# for more rows it is widened once, ahead of a GEMM. Read while tracing (ops/plain.py) and by the memory plan.
WIDEN_ROWS = 8


@dataclass(frozen=True)
class Precision:
    """Dtypes by name. store: of the weights. compute: of activations and pages."""

    store: str
    compute: str

    @property
    def widths(self) -> tuple[int, int]:
        """Bytes per element of the weights, and of activations and pages."""
        return BYTES[self.store], BYTES[self.compute]
