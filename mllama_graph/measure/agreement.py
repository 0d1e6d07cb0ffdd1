"""How well the distributions of two models agree: KL divergence and top-1 agreement at the same positions."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Agreement:
    """Agreement with a reference model, position by position. divergences: in nats. same: whether the likeliest id is
    the same."""

    divergences: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def add(self, reference_NV: NDArray[np.float32], other_NV: NDArray[np.float32]) -> None:
        """Add N positions, given all V log-probabilities of both models.

        The divergence is sum p (log p - log q), p being the reference's: what the other model loses on text drawn
        from the reference, in nats per token.
        """
        p_NV, q_NV = reference_NV.astype(np.float64), other_NV.astype(np.float64)
        terms_NV = np.exp(p_NV) * (np.where(np.isneginf(p_NV), q_NV, p_NV) - q_NV)
        self.divergences += terms_NV.sum(-1).tolist()
        self.same += (p_NV.argmax(-1) == q_NV.argmax(-1)).tolist()

    def metrics(self) -> dict[str, float]:
        """The figures for result.json; none where no position was compared."""
        if not self.same:
            return {}
        return {
            "positions": len(self.same),
            "kl_mean": float(np.mean(self.divergences)),
            "kl_99th": float(np.percentile(self.divergences, 99)),
            "top1_agreement_percent": round(100 * float(np.mean(self.same)), 3),
        }
