"""Ids that a step takes from the output of the step before on the device, before the host has read them.

Graphs give the largest logits of every rank (model/sample.py, best), so that each rank knows the ids of greedy rows
without an exchange. The inputs of the next step refer to such an id by its place in the output (engine/batch.py). Here
the references are replaced by the ids. The device works off its queue in order, so that the output is complete before
the next step begins.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.model.inputs import with_ids
from mllama_graph.model.sample import largest
from mllama_graph.ops.npu_inputs import held_rows
from mllama_graph.ops.transfers import sent


class Feedback:
    """The ids of the last step's rows. `simulated`: the device has no kernels, and its memory is the host's."""

    def __init__(self, spec: GraphSpec, simulated: bool):
        self._simulated, self._vocab = simulated, spec.shape.text.vocab
        self._size = spec.shard.size(self._vocab)
        self._held = range(*spec.shard.bounds(spec.shape.embeddings))
        self._last_O: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether ids were ever noted."""
        return self._last_O is not None

    def take(self, found_WBF: Tensor) -> None:
        """Note the ids of a step's rows, which are computed from the candidates that its graph gives."""
        [self._last_O] = self._computed(lambda found: (largest(found, self._size, self._vocab),), found_WBF)

    def fill(self, given: Any) -> Any:
        """Inputs on the device with the noted ids, and with what an NPU's graph takes besides them (`prepared`)."""
        assert self._last_O is not None, "a step with pending ids follows one that gives them"
        [ids_T] = self._computed(lambda ids_T, last_O: (with_ids(ids_T, last_O),), given.ids_T, self._last_O)
        given, made = given._replace(ids_T=ids_T), given.prepared
        if made is None or made.row_T is None:
            return given
        row_T, held_T1 = self._computed(lambda ids_T: held_rows(ids_T, self._held), ids_T)
        return given._replace(prepared=made._replace(row_T=row_T, held_T1=held_T1))

    def _computed(self, function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        if not self._simulated:
            return function(*given)
        # Imported here, since this module imports torchair.
        from mllama_graph.ascend.simulation import host_view

        return tuple(sent(made, given[0].device) for made in function(*map(host_view, given)))
