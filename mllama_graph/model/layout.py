"""How loading writes weights of linear layers: in the layout that a device's kernels read, in one pass from a file."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mllama_graph.model.formats import Format


class Layout(Protocol):
    """Writes rows of the weight of a linear layer, from its row `at` on, in the layout that a device's kernels read.

    Letters: R rows that are written, I their inputs in the leaf, K all inputs of a row, S bytes. Tensors must be in the
    host's memory, or mapped from a file.
    """

    def rows(self, whole: Tensor, at: int, rows_RI: Tensor) -> None:
        """Write rows of an unquantised weight, in its dtype, or rows of scales or shifts, in fp32 or a 16-bit dtype."""

    def codes(self, whole: Tensor, form: Format, at: int, stored: Tensor, layout: str, order: Tensor | None) -> None:
        """Write codes as a file stores them. layout: one of those of stored.py. order: each column's input, or None."""

    def rounded(self, parts: dict[str, Tensor], form: Format, at: int, rows_RK: Tensor, columns: slice) -> None:
        """Round whole rows of a weight, and write the codes and scales of some of their columns."""

    def sums(self, codes_RI: Tensor) -> Tensor:
        """The sum of each row of int8 codes, int32 (R,)."""

    def unnested(
        self, scale_S: Tensor, values: Tensor, of_blocks: Tensor, block: int, first: int, added: float
    ) -> Tensor:
        """Scales that are themselves quantised to bytes: values[byte] * of_blocks[its block] + added, fp32 (S,).

        block: bytes per block. first: the number of bytes of the whole weight before these.
        """


@dataclass(frozen=True)
class LeafRows:
    """Some rows of a quantised leaf, from its row `at` on. layout: how parts are written; None: in rows."""

    parts: dict[str, Tensor]
    form: Format
    at: int = 0
    layout: Layout | None = None

    def after(self, rows: int) -> "LeafRows":
        """The rows of the leaf from `rows` rows further on."""
        return LeafRows(self.parts, self.form, self.at + rows, self.layout)

    def write(self, name: str, value: Tensor) -> None:
        """Write some rows of a part, codes as `pack` gives them; a part that all rows share is written whole."""
        part = self.parts[name]
        if part.dim() == 1:
            part.copy_(value)
        elif self.layout is None:
            part[self.at : self.at + len(value)].copy_(value)
        elif name == "weight":
            self.layout.codes(part, self.form, self.at, value.contiguous(), "rows", None)
        else:
            self.layout.rows(part, self.at, value)
