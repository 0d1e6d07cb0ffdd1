"""Linear layers' weights are written as a device's kernels read them while they are loaded, in one pass from a file."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mllama_graph.model.formats import Format


class Layout(Protocol):
    """Writes rows of the weight of a linear layer, from its row `at` on, in the layout that a device's kernels read.

    What is written must be in the host's memory, or mapped from a file.
    """

    def rows(self, whole: Tensor, at: int, rows_RI: Tensor) -> None:
        """Write elements: of an unquantised weight, in the dtype of `whole`, or of scales, in any that is no wider."""

    def codes(self, whole: Tensor, form: Format, at: int, stored: Tensor, layout: str, order: Tensor | None) -> None:
        """Write codes from a file's, whose layout is one of stored.py. order: the input of each column, or None."""

    def rounded(self, parts: dict[str, Tensor], form: Format, at: int, rows_RK: Tensor, columns: slice) -> None:
        """Round whole rows of a weight, and write the codes and scales of some of their columns."""

    def sums(self, codes_RI: Tensor) -> Tensor:
        """The sum of each row of int8, as int32."""

    def unnested(self, scale_S: Tensor, map: Tensor, of_blocks: Tensor, block: int, first: int, added: float) -> Tensor:
        """Scales (S,) that bytes stand for: `map`'s value, times that of the block of bytes, plus `added`; fp32.

        first: the number of bytes that come before these in the first of the blocks.
        """


@dataclass(frozen=True)
class LeafRows:
    """Some rows of a quantised leaf, from its row `at` on. layout: None where its parts are held in rows."""

    parts: dict[str, Tensor]
    form: Format
    at: int = 0
    layout: Layout | None = None

    def after(self, rows: int) -> "LeafRows":
        """The rows of the leaf that come so many rows later."""
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
