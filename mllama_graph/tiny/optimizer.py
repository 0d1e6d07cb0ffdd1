"""Muon for the hidden matrices, in batches of equal shape."""

from __future__ import annotations

import torch
from torch import Tensor

# Newton-Schulz coefficients of Keller Jordan's Muon.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(x: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of [n, rows, columns], rows <= columns, in bfloat16."""
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; for two-dimensional weights only."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                wide = update if p.shape[0] <= p.shape[1] else update.T
                by_shape.setdefault(tuple(sorted(p.shape)), []).append((p, wide))
            for members in by_shape.values():
                for (p, _), x in zip(members, orthogonalise(torch.stack([u for _, u in members]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    step = group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                    p.add_(x if p.shape[0] <= p.shape[1] else x.T, alpha=-step)
