"""The linear layers of one rank, as what they read and compute."""

from dataclasses import dataclass, replace

from mllama_graph.model.formats import Format, Storage, is_linear, leaf_of, stored_bytes
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard, table


@dataclass(frozen=True)
class Product:
    """A linear layer of a rank: bytes and elements of its weight, and its format. `split`: over inputs, so that ranks
    sum its results."""

    path: str
    bytes: int
    elements: int
    form: Format | None
    split: bool


def products(shape: ModelShape, storage: Storage, ranks: int) -> dict[str, list[Product]]:
    """The linear layers of a rank, by the path of the block that they are in, such as text.layers.0."""
    part, formats = Shard(0, ranks), dict(storage.formats)
    sizes = stored_bytes(shape, storage, part)
    elements: dict[str, int] = {}
    split = set()
    for entry in table(shape):
        if is_linear(entry):
            rows, columns = entry.local(part)
            elements[leaf_of(entry)] = elements.get(leaf_of(entry), 0) + rows * columns
            if entry.shard == 1:
                split.add(leaf_of(entry))
    blocks: dict[str, list[Product]] = {}
    for path, size in elements.items():
        held = sizes[path if path in formats else f"{path}.weight"]
        blocks.setdefault(path.rpartition(".")[0], []).append(
            Product(path, held, size, formats.get(path), path in split)
        )
    return blocks


def scaled(of: Product, times: float) -> Product:
    """A linear layer with `times` its weight."""
    return replace(of, bytes=round(of.bytes * times), elements=round(of.elements * times))
