"""One step of the model, as the module that compilers take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mllama_graph.model.inputs import Pages
from mllama_graph.model.ops import Ops
from mllama_graph.model.sample import best
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.text import decode, mixed, prefill
from mllama_graph.model.tree import Weights
from mllama_graph.model.vision import encode_image
from mllama_graph.plan.bucket import Bucket

# What a step returns: nothing, logits, or logits and candidates.
Output = Tensor | tuple[Tensor, ...] | None
PHASES = ("vision", "prefill", "mixed", "decode")
TEXT: dict[str, Callable[..., Tensor]] = {"prefill": prefill, "mixed": mixed, "decode": decode}
# Prefix of the weights in compiled packages, whose names are those in `Flat`.
WEIGHT_PREFIX = "step.weights."


class Step(nn.Module):
    """One phase of the model, with the shared weight tree. Activations are in `dtype`.

    A text step returns the logits of this rank, with `candidates` also the largest ones of every rank (sample.best).
    """

    def __init__(
        self, phase: str, weights: Weights, shape: ModelShape, dtype: torch.dtype, ops: Ops, candidates: int = 0
    ):
        super().__init__()
        self.phase, self.weights, self.shape, self.dtype, self.ops = phase, weights, shape, dtype, ops
        self.candidates = candidates

    def forward(self, given: Any, pages: Pages, image_pages: Pages) -> Output:
        if self.phase == "vision":
            encode_image(self.weights, given, image_pages, self.shape, self.dtype, self.ops)
            return None
        logits_BV = TEXT[self.phase](self.weights.text, given, pages, image_pages, self.shape, self.dtype, self.ops)
        if not self.candidates:
            return logits_BV
        return logits_BV, best(logits_BV, self.candidates, self.weights.text.padding_V, self.ops)


class Flat(nn.Module):
    """A step as a function of only its input tensors, in tree order: the form in which packages are called."""

    def __init__(self, step: Step, inputs: tuple[Any, ...]):
        super().__init__()
        self.step = step
        leaves, self.spec = pytree.tree_flatten(inputs)
        self.present = [isinstance(leaf, Tensor) for leaf in leaves]

    def forward(self, *given: Tensor) -> Output:
        remaining = iter(given)
        leaves = [next(remaining) if present else None for present in self.present]
        return self.step(*pytree.tree_unflatten(leaves, self.spec))


def arguments(bucket: Bucket, given: Any, pages: Pages, image_pages: Pages) -> tuple[Any, Pages, Pages]:
    """A step's arguments, with only the pages that its phase uses."""
    return given, () if bucket.phase == "vision" else pages, image_pages if bucket.image_pages else ()


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree in the order in which a graph takes them."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
