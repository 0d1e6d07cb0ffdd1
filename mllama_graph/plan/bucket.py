"""The static sizes of one graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Bucket:
    """The static sizes of one graph.

    rows: sequences (B). tokens: token rows (T); in a decode step, as many of each sequence. pages: K/V pages per
    sequence (J); a prefill with 0 is that of one sequence without earlier tokens, whose rows attend only to each other.
    image_pages: image K/V pages per sequence; a graph with 0 leaves out the cross-attention layers. tiles: real tiles
    of the image of a vision graph; 0 if the graph takes any number of them. prompts: of a mixed step, the prefill whose
    rows follow those of `rows` decoding sequences; `tokens` counts both. outputs: the most rows of logits of a prefill;
    0: one for each sequence.
    """

    phase: str
    rows: int
    tokens: int
    pages: int
    image_pages: int
    tiles: int = 0
    prompts: "Bucket | None" = None
    outputs: int = 0

    def __str__(self) -> str:
        sizes = {
            "vision": [("tiles", self.tiles)] if self.tiles else [],
            "prefill": [("rows", self.rows)] * (self.rows > 1) + [("tokens", self.tokens), ("pages", self.pages)],
            "decode": [("batch", self.rows)] + [("each", self.each)] * (self.each > 1) + [("pages", self.pages)],
            "mixed": [("batch", self.rows), ("pages", self.pages)],
        }[self.phase]
        if self.prompts:
            sizes += [
                ("prompts", self.prompts.rows),
                ("tokens", self.prompts.tokens),
                ("prompt_pages", self.prompts.pages),
            ]
        image = [("image_pages", self.image_pages)]
        return self.phase + " " + " ".join(f"{name}={size}" for name, size in sizes + image)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Bucket":
        """The bucket with these fields, in the form of dataclasses.asdict."""
        prompts = fields.get("prompts")
        return cls(**{**fields, "prompts": cls(**prompts) if prompts else None})

    @property
    def each(self) -> int:
        """Token rows of each sequence in a decode step."""
        return self.tokens // self.rows

    @property
    def decoding(self) -> "Bucket":
        """The decode step within a mixed step."""
        return Bucket("decode", self.rows, self.rows, self.pages, self.image_pages)

    @property
    def rows_of_logits(self) -> int:
        """The rows of logits that a text step gives."""
        return self.tokens if self.phase == "decode" else self.rows + (self.prompts.rows if self.prompts else 0)

    def holds(self, need: "Bucket") -> bool:
        """Whether a graph of this bucket can run a step that needs `need`.

        A batch without images never runs in a graph with cross-attention layers, to avoid reading their weights.
        """
        return (
            self.phase == need.phase
            and (self.phase != "decode" or self.each == need.each)
            and self.tiles == need.tiles
            and (self.image_pages == 0) == (need.image_pages == 0)
            and (self.pages == 0) == (need.pages == 0)
            and self.rows >= need.rows
            and self.tokens >= need.tokens
            and self.pages >= need.pages
            and self.image_pages >= need.image_pages
            and self.outputs >= need.outputs
            and (self.prompts is None or need.prompts is None or self.prompts.holds(need.prompts))
        )
