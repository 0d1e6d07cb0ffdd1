"""Merges adapters into weights while these are loaded, so that each rank reads and computes only its own part.

The sum is computed in fp32 and rounded once to the weights' dtype. peft's merge_and_unload rounds the product to the
base model's dtype first; in fp32 both agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mllama_graph.model.adapter import Adapter, Change
from mllama_graph.model.pth import PthFile
from mllama_graph.model.reading import Region, block_rows, read_pth, read_safetensors
from mllama_graph.model.table import Entry
from mllama_graph.model.tree import Fill


def merged(fill: Fill, adapters: Sequence[Adapter]) -> Fill:
    """A Fill that adds the changes of adapters to what `fill` gives, by the rules of peft's merge_and_unload.

    The products of several adapters are summed, each times its weight.
    """

    def fill_merged(entry: Entry, part: Tensor, region: Region) -> None:
        changes = [(adapter, adapter.changes[entry.name]) for adapter in adapters if entry.name in adapter.changes]
        if not changes:
            fill(entry, part, region)
            return
        starts = range(region[0].start, region[0].stop, count := block_rows(part))
        for first, block in zip(starts, part.split(count)):
            rows = slice(first, first + len(block))
            block.copy_(_merged_block(fill, entry, part.device, (rows, *region[1:]), changes))

    return fill_merged if adapters else fill


def _merged_block(
    fill: Fill, entry: Entry, device: torch.device, region: Region, changes: list[tuple[Adapter, Change]]
) -> Tensor:
    """A region of the merged weight in fp32."""
    adapter, first = changes[0]
    # DoRA divides by the norm of whole rows.
    inner = tuple(slice(0, n) for n in entry.shape[1:]) if first.magnitude else region[1:]
    taken = (region[0], *inner)
    value = torch.empty([part.stop - part.start for part in taken], dtype=torch.float32, device=device)
    if first.replacement:
        value.copy_(_read(adapter, first.replacement, taken))
    else:
        fill(entry, value, taken)
    for adapter, change in changes:
        if change.added:
            value += _read(adapter, change.added)[taken[0]].to(value) * (change.scale * adapter.weight)
        elif change.a:
            value += _product(adapter, change, entry, taken, device).view_as(value)
    if first.magnitude:
        rows = value.flatten(1)
        rows *= (_read(adapter, first.magnitude).flatten()[region[0]].to(value) / rows.norm(dim=1))[:, None]
        value = value[(slice(None), *region[1:])]
    return value


def _product(adapter: Adapter, change: Change, entry: Entry, region: Region, device: torch.device) -> Tensor:
    """A region of the product of an adapter's factors, as a matrix. Only 2-D weights are split along their columns."""
    assert change.a and change.b
    a, b = (_read(adapter, name).to(device, torch.float32).flatten(1) for name in (change.a, change.b))
    if change.embedding:
        a, b = b.T, a.T
    columns = region[1] if len(entry.shape) == 2 else slice(None)
    return (b[region[0]] @ a[:, columns]) * (change.scale * adapter.weight)


def _read(adapter: Adapter, name: str, region: Region | None = None) -> Tensor:
    """A region of a tensor of an adapter's file, or the whole."""
    if adapter.path.suffix == ".bin":
        return read_pth(PthFile(adapter.path), name)[region or ...]
    return read_safetensors(adapter.path, name, region)
