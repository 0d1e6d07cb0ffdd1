"""Reads weights from Meta's own format, in the layout of Hugging Face's."""

from collections.abc import Callable

import torch
from torch import Tensor

from mllama_graph.model.meta_files import EMBEDDING, LEARNABLE, MetaFiles
from mllama_graph.model.reading import Region, read_pth
from mllama_graph.model.table import Entry


def reader(files: MetaFiles) -> Callable[[Entry, Region], Tensor]:
    """Reads a region of an entry, joined over the files. Only the region's part of the files is read."""
    rotated = {
        f"language_model.model.layers.{layer}.self_attn.{part}_proj.weight"
        for layer in files.shape.text.self_layers
        for part in "qk"
    }

    def read(entry: Entry, region: Region) -> Tensor:
        name, whole = files.source(entry.name), files.meta_shape(entry)
        if name == EMBEDDING:
            return _embedding(files, whole, region)
        if entry.name in rotated:
            return _rotated(files, name, whole, region)
        if len(whole) == 4 and len(entry.shape) == 2:
            return _per_aspect_ratio(files, _joined(files, name, whole)).view(entry.shape)[region]
        if whole != entry.shape:
            return _joined(files, name, whole).view(entry.shape)[region]
        return _joined(files, name, whole, region)

    return read


def _joined(files: MetaFiles, name: str, whole: tuple[int, ...], region: Region | None = None) -> Tensor:
    """A region of a tensor, joined over the files that split it, or the whole."""
    region = region or tuple(slice(0, n) for n in whole)
    axis, parts, start = files.axis(name, whole), [read_pth(shard, name) for shard in files.shards], 0
    if axis is None:
        return parts[0].reshape(whole)[region]
    taken = []
    for part in parts:
        size = part.shape[axis]
        first, last = (min(max(at - start, 0), size) for at in (region[axis].start, region[axis].stop))
        taken.append(part[(*region[:axis], slice(first, last), *region[axis + 1 :])])
        start += size
    return torch.cat(taken, axis)


def _embedding(files: MetaFiles, whole: tuple[int, ...], region: Region) -> Tensor:
    """Rows of the embedding: those of the vocabulary, then those that vision training added."""
    rows, vocab = region[0], whole[0]
    added = (files.shape.embeddings - vocab, *whole[1:])
    known = slice(min(rows.start, vocab), min(rows.stop, vocab))
    new = slice(max(rows.start - vocab, 0), max(rows.stop - vocab, 0))
    return torch.cat(
        [_joined(files, EMBEDDING, whole, (known, *region[1:])), _joined(files, LEARNABLE, added, (new, *region[1:]))]
    )


def _rotated(files: MetaFiles, name: str, whole: tuple[int, ...], region: Region) -> Tensor:
    """Rows of a rotated projection: Meta rotates dimensions 2i and 2i + 1 of a head, Hugging Face i and i + H / 2."""
    H = files.shape.text.head_width
    rows = region[0]
    # Whole heads.
    first, last = rows.start // H * H, -(-rows.stop // H) * H
    value = _joined(files, name, whole, (slice(first, last), *region[1:]))
    heads = value.view(-1, H // 2, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
    return heads[rows.start - first : rows.stop - first]


def _per_aspect_ratio(files: MetaFiles, embedding: Tensor) -> Tensor:
    """Embeddings (tiles, tiles, L, E) of the tiles at each place -> (aspect ratios + 1, tiles, L, E).

    Row 0 stands for no image. Tiles beyond an aspect ratio's own are zeros.
    """
    vision = files.shape.vision
    size = (len(vision.aspect_ratios) + 1, vision.max_tiles, *embedding.shape[2:])
    result = torch.zeros(size, dtype=embedding.dtype)
    for id, (height, width) in enumerate(vision.aspect_ratios, start=1):
        result[id, : height * width] = embedding[:height, :width].flatten(0, 1)
    return result
