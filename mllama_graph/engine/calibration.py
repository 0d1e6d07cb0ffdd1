"""Hessians of linear layers' inputs, from requests that the unquantised model serves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.forced import served
from mllama_graph.inputs.request_file import Line
from mllama_graph.model.error_feedback import factor, quantise_with_feedback
from mllama_graph.model.formats import Formats, is_linear, leaf_of
from mllama_graph.model.inputs import PromptInput, TokenInput
from mllama_graph.model.layout import LeafRows
from mllama_graph.model.ops import Ops
from mllama_graph.model.reading import Region
from mllama_graph.model.table import Entry, table
from mllama_graph.model.tree import Fill, FillQuantised, Linear
from mllama_graph.model.weights import QUANTISED_BLOCK, write_codes

# Bytes of the Hessians that one pass over the requests gathers.
PASS_BYTES = 4 << 30


@dataclass
class Gathering:
    """The Hessians that a pass sums up, by the identity of their leaf, and which rows of a step are real."""

    hessians: dict[int, Tensor] = field(default_factory=dict)
    # Rows of tokens in the present step, and rows of image tokens of the latest image.
    tokens: int = 0
    image_tokens: int = 0


def recording(ops: Ops, gathering: Gathering, tile_tokens: int) -> Ops:
    """Operations that also sum x^T x over the real rows of each linear layer's input.

    `tile_tokens`: tokens of an image's tile. Layers of the vision tower are not recorded.
    """
    in_text = False

    def linear(x: Tensor, leaf: Linear, *rest: Tensor) -> Tensor:
        hessian = gathering.hessians.get(id(leaf))
        if hessian is not None:
            rows = x.flatten(0, -2)[: gathering.tokens if in_text else gathering.image_tokens].float()
            hessian.addmm_(rows.T, rows)
        return ops.linear(x, leaf, *rest)

    def normalise(tiles: Tensor, real_1: Tensor, *rest: Tensor) -> Tensor:
        nonlocal in_text
        in_text, gathering.image_tokens = False, int(real_1) * tile_tokens
        return ops.normalise(tiles, real_1, *rest)

    def without_padding(recorder: Ops, given: PromptInput | TokenInput) -> Ops:
        nonlocal in_text
        in_text, gathering.tokens = True, int(given.real_1)
        return recorder

    return replace(ops, linear=linear, normalise=normalise, without_padding=without_padding)


class Calibration:
    """Factors of the Hessians of the leaves of `formats`, which are asked for in the order of the table.

    The requests are served again for each PASS_BYTES of Hessians. Raises UserError where none can be served.
    """

    def __init__(self, engine: Engine, formats: Formats, lines: Sequence[Line], base: Path, progress: Progress):
        self._engine, self._lines, self._base, self._say = engine, lines, base, progress.say
        leaves = dict.fromkeys(leaf_of(entry) for entry in table(engine.executor.run.shape) if is_linear(entry))
        self._order = [path for path in leaves if path in dict(formats)]
        self._factors: dict[str, Tensor] = {}
        self._gathering = Gathering()
        rank = engine.executor.rank
        ops = recording(rank.ops, self._gathering, rank.shape.vision.tokens)
        rank.graphs = rank.backend.loaded(
            rank.spec, rank.weights, (rank.pages, rank.image_pages), ops, engine.executor.graphs.store, progress.say
        )

    def factor(self, path: str) -> Tensor:
        """The factor of a leaf's Hessian (error_feedback.factor)."""
        if path not in self._factors:
            self._factors = self._pass(path)
        return self._factors[path]

    def _pass(self, path: str) -> dict[str, Tensor]:
        """The factors of a leaf and of those after it, as many as PASS_BYTES hold."""
        weights, begun = self._engine.executor.rank.weights, self._order.index(path)
        taken: dict[str, Tensor] = {}
        for name in self._order[begun:]:
            leaf = weights.get_submodule(name)
            assert isinstance(leaf, Linear)
            inputs = leaf.weight.shape[1]
            if taken and sum(h.numel() * 4 for h in taken.values()) + 4 * inputs**2 > PASS_BYTES:
                break
            taken[name] = torch.zeros(inputs, inputs, device=self._engine.executor.rank.spec.torch_device)
        self._say(f"calibrating {len(taken)} layers from {path} on {len(self._lines)} requests")
        self._gathering.hessians = {id(weights.get_submodule(name)): hessian for name, hessian in taken.items()}
        answered = sum(1 for _ in served(self._engine, self._lines, self._base, range(len(self._lines))))
        if not answered:
            raise UserError("task.calibration= has no request that can be served. Serve it as requests= to see why.")
        self._gathering.hessians = {}
        return {name: factor(hessian.cpu()) for name, hessian in taken.items()}


def quantising_with_feedback(fill: Fill, of_leaf: Callable[[str], Tensor], scale_dtype: torch.dtype) -> FillQuantised:
    """A FillQuantised with error feedback; `of_leaf` gives the factor of a leaf."""

    def fill_quantised(entry: Entry, held: LeafRows, region: Region) -> None:
        rows, inputs = region[0], entry.shape[1]
        for first in range(rows.start, rows.stop, count := QUANTISED_BLOCK // inputs + 1):
            last = min(first + count, rows.stop)
            part = torch.empty((last - first, inputs))
            fill(entry, part, (slice(first, last), slice(0, inputs)))
            found = quantise_with_feedback(part, held.form, of_leaf(leaf_of(entry)), scale_dtype)
            write_codes(held.after(first - rows.start), found, region[1])

    return fill_quantised
