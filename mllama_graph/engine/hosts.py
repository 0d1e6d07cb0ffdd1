"""Checks that the ranks of several hosts have the same versions, arguments and weights, before anything is built.

Only rank 0 composes the run, so different arguments or weights on another host would otherwise stay unnoticed.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mllama_graph.core import machine
from mllama_graph.core.paths import PACKAGE
from mllama_graph.core.place import Place
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.meta_files import MetaFiles

# A digest reads SAMPLE_BYTES at SAMPLES evenly spaced places of a file: reading all 22 GB would take minutes.
SAMPLES, SAMPLE_BYTES = 256, 4096

# What is compared of one rank. Built-in types only, since another version of the package must be able to read it.
Card = dict[str, Any]
# Path of a weight file -> its size in bytes and a digest of samples of its content.
Digests = dict[str, tuple[int, str]]


def card(place: Place, arguments: Sequence[str] | None = None) -> Card:
    """This rank's card. `arguments`: those of the command line, by default this process's."""
    # Rank 0's command line (cli.py) rewrites sys.argv in Hydra's grammar.
    given = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :] if arguments is None else arguments
    version = import_module("mllama_graph").__version__
    return {
        "rank": place.rank,
        "one_host": place.one_host,
        "host": os.uname().nodename,
        "machine": machine.identity(),
        "versions": {
            "mllama_graph": f"{version} (sources {_sources(PACKAGE)})",
            "torch": str(torch.__version__),
            "Python": ".".join(map(str, sys.version_info[:2])),
        },
        # hydra. keys choose rank 0's folder.
        "arguments": sorted(word for word in given if not word.startswith("hydra.")),
    }


def refusal(mine: Card, others: Sequence[Card]) -> str:
    """Why the ranks with the cards `others` can't work with rank 0, whose card is `mine`; empty if they can."""
    for other in others:
        if other["machine"] == mine["machine"]:
            continue
        who = f"rank {other['rank']} on host {other['host']}"
        if mine["one_host"] or other["one_host"]:
            return (
                f"{who} is not on rank 0's host {mine['host']}, but LOCAL_WORLD_SIZE says that all ranks share one. "
                "Set LOCAL_WORLD_SIZE and LOCAL_RANK on each host, as torchrun does."
            )
        for name, version in mine["versions"].items():
            if other["versions"].get(name) != version:
                return (
                    f"{who} has {name} {other['versions'].get(name)}, rank 0 on host {mine['host']} has {version}. "
                    "Install the same on all hosts."
                )
        if other["arguments"] != mine["arguments"]:
            only = [
                " ".join(word for word in one["arguments"] if word not in two["arguments"]) or "nothing else"
                for one, two in ((other, mine), (mine, other))
            ]
            return (
                f"{who} was started with {only[0]}, rank 0 on host {mine['host']} with {only[1]}. "
                "Start all hosts with the same arguments."
            )
    return ""


def digests(checkpoint: CheckpointFiles | None) -> Digests:
    """The digests of the weight files of a checkpoint and its adapters. Raises OSError for a missing file."""
    if checkpoint is None:
        return {}
    if isinstance(checkpoint, MetaFiles):
        paths = [shard.path for shard in checkpoint.shards]
    else:
        paths = checkpoint.paths
    return {str(path): digest(path) for path in (*paths, *(adapter.path for adapter in checkpoint.adapters))}


def digest(path: Path) -> tuple[int, str]:
    """The size of a file in bytes, and a digest of samples of its content, which cover all of a small file."""
    found, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(size * sample // SAMPLES)
            found.update(file.read(SAMPLE_BYTES))
    return size, found.hexdigest()[:16]


def differing_weights(expected: Mapping[str, tuple[int, str]], place: Place) -> str:
    """How this host's weights differ from rank 0's, whose `digests` are `expected`; empty if they are equal."""
    who = f"rank {place.rank} on host {os.uname().nodename}"
    for name, theirs in expected.items():
        try:
            ours = digest(Path(name))
        except OSError as error:
            return f"{who} can't read {name}: {error.strerror}. Put the weights at the same path on all hosts."
        if ours != theirs:
            what = f"{ours[0]:,} bytes, not {theirs[0]:,}" if ours[0] != theirs[0] else "other content"
            return f"{name} on {who} is not rank 0's: {what}. Put the same weights on all hosts."
    return ""


def _sources(package: Path) -> str:
    """A digest of the package's source files."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")) + sorted(package.rglob("native/*.[ch]*")):
        found.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:8]
