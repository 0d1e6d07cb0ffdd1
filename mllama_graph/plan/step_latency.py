"""The latency of a step on an NPU, by component. plan/latency.py models it."""

from collections import Counter
from dataclasses import dataclass, field

from mllama_graph.core.hardware import Calibration


@dataclass
class Latency:
    """Seconds of one rank's step by component, and the cores of attention to text and to image pages (0: none)."""

    products: float = 0.0
    attention: float = 0.0
    vector: float = 0.0
    all_reduces: float = 0.0
    step: float = 0.0
    # AICPU computes each attention's tiling beside the device, as lengths are inputs of the graph.
    aicpu: float = 0.0
    cores: int = 0
    image_cores: int = 0
    # Operators by type.
    operators: Counter[str] = field(default_factory=Counter)

    @property
    def device(self) -> float:
        """The graph alone."""
        return max(self.products + self.attention + self.vector + self.all_reduces, self.aicpu)

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.device + self.step

    def eager(self, known: Calibration) -> float:
        """The whole step where the host launches each operator, instead of a graph."""
        sums = self.operators["HcomAllReduce"]
        host = (self.operators.total() - sums) * known.eager + sums * known.eager_all_reduce
        return max(self.device, host) + self.step

    @property
    def bound(self) -> str:
        """The component that takes longest."""
        return max(("products", "attention", "vector", "all_reduces"), key=lambda name: getattr(self, name))

    @property
    def described_cores(self) -> str:
        """Cores of attention to text pages and, after a plus, to image pages."""
        return "+".join(str(count) for count in (self.cores, self.image_cores) if count)
