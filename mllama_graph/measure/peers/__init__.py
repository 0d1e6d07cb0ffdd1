"""Settings of the other engines (peers) that are measured on the same checkpoint; process.py runs them."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from mllama_graph.core.errors import UserError

# Later versions fail at the first image (0.9.5: "`max_image_tiles` must be set").
MISTRALRS_VERSION = "0.8.23"
TRANSFORMERS = "transformers>=5.17,<6"


@dataclass(frozen=True)
class Setting:
    """One way to run a peer. `dtype` is torch's name.

    For transformers, cache: the kind of KV cache. compiled: whether decode steps are compiled. freezing: whether
    Inductor freezes the weights.
    """

    name: str
    dtype: str
    cache: str | None = None
    compiled: bool = False
    freezing: bool = False

    @property
    def peer(self) -> str:
        """The engine's name."""
        return self.name.split()[0]


SETTINGS = (
    Setting("transformers fp32", "float32"),
    Setting("transformers fp32 static", "float32", "static"),
    Setting("transformers fp32 static compiled", "float32", "static", compiled=True),
    Setting("transformers fp32 static frozen", "float32", "static", compiled=True, freezing=True),
    Setting("transformers bf16", "bfloat16"),
    Setting("mistralrs fp32", "float32"),
)


def settings_of(names: list[str], mistralrs: Path) -> list[Setting]:
    """The settings that peers= selects: one setting by its full name, or all settings of a peer by the peer's name.

    `mistralrs` is the Python interpreter of an environment with mistralrs. Raises UserError for an unknown name, and
    for a peer that is not installed.
    """
    found: list[Setting] = []
    for peer in names:
        named = [setting for setting in SETTINGS if peer in (setting.name, setting.peer)]
        if not named:
            known = dict.fromkeys(name for setting in SETTINGS for name in (setting.peer, setting.name))
            raise UserError(f"peers={peer} is not one of {', '.join(known)}.")
        found += named
    peers = {setting.peer for setting in found}
    if "mistralrs" in peers and not os.access(mistralrs, os.X_OK):
        raise UserError(
            f"peers=mistralrs runs in its own environment, and task.mistralrs={mistralrs} is not an executable. "
            "Create the environment: python3 -m venv .venv/mistralrs && "
            f".venv/mistralrs/bin/pip install mistralrs=={MISTRALRS_VERSION}"
        )
    if "transformers" in peers and not importlib.util.find_spec("transformers"):
        raise UserError(
            "peers=transformers needs transformers, which is not installed. Install it with: "
            f"pip install '{TRANSFORMERS}'"
        )
    return list(dict.fromkeys(found))
