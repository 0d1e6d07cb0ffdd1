"""Builds weight trees from checkpoint folders, and the tensors that they must hold."""

import torch
from checkpoints import model_config, random_weights, rename
from engines import CPU

from mllama_graph.model.adapter import read_adapters
from mllama_graph.model.meta_files import open_checkpoint
from mllama_graph.model.names import legacy_name
from mllama_graph.model.shape import shape_of
from mllama_graph.model.table import WHOLE, Shard, table
from mllama_graph.model.tree import Linear, Pixels, build
from mllama_graph.model.weights import from_checkpoint

PIXELS = Pixels(1 / 255, (0.5,) * 3, (0.25,) * 3)


def ignore(count):
    """A progress callback that does nothing."""


def linear_leaf(weight, bias=None, **parts):
    """A linear layer with these parts: those of `Linear`, or its format."""
    leaf = Linear()
    leaf.format = parts.pop("format", None)
    for name, value in {"weight": weight, "bias": bias, **parts}.items():
        if value is not None:
            setattr(leaf, name, torch.nn.Parameter(value, requires_grad=False))
    return leaf


def tree(folder, dtype=torch.float32, shard=WHOLE, adapter=None):
    """A rank's weights of a checkpoint, with the adapters of adapter= merged."""
    checkpoint = open_checkpoint(folder, read_adapters(adapter))
    checkpoint.verify()
    return build(checkpoint.shape, PIXELS, dtype, CPU, from_checkpoint(checkpoint), ignore, shard)


def grouped(shape):
    """Path in the weight tree -> the table's entries that are stacked there."""
    groups = {}
    for entry in table(shape):
        groups.setdefault(entry.path, []).append(entry)
    return groups


def same_as_state(root, shape, state, **tolerance):
    """Check every parameter of a whole tree against a transformers state dict."""
    named = {legacy_name(name): value for name, value in state.items()}
    for path, entries in grouped(shape).items():
        wanted = torch.cat([named[entry.name].float().view(entry.shape) for entry in entries])
        torch.testing.assert_close(parameter(root, path), wanted, **tolerance, msg=f"{path}: {{}}".format)


def parameter(root, path):
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


def stacked(spec) -> dict[str, torch.Tensor]:
    """The expected tensor at each path of the weight tree, found by the table's legacy names."""
    weights = {rename(name, "legacy"): value for name, value in random_weights(spec).items()}
    paths: dict[str, list[torch.Tensor]] = {}
    for entry in table(shape_of(model_config(spec))):
        paths.setdefault(entry.path, []).append(weights.pop(entry.name).view(entry.shape))
    assert not weights, "tensors that the table does not name"
    return {path: torch.cat(parts) for path, parts in paths.items()}


def joined(parts: list[torch.Tensor], entries, world: int) -> torch.Tensor:
    """A Parameter reassembled from the ranks' shards by Megatron's rule: each stacked tensor is sharded by itself."""
    sizes = [entry.local(Shard(0, world))[0] for entry in entries]
    pieces = [part.split(sizes) for part in parts]
    whole = []
    for n, entry in enumerate(entries):
        if entry.shard is None:
            assert all(torch.equal(piece[n], pieces[0][n]) for piece in pieces)
            whole.append(pieces[0][n])
            continue
        padded = torch.cat([piece[n] for piece in pieces], entry.shard)
        size = entry.shape[entry.shard]
        assert not padded.narrow(entry.shard, size, padded.shape[entry.shard] - size).any(), "padding is not zero"
        whole.append(padded.narrow(entry.shard, 0, size))
    return torch.cat(whole)
