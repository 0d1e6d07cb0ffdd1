"""Other engines on the same checkpoint, to measure beside: here what peers= may name, in process.py what runs one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from mllama_graph.core.config import Run, UserError

MISTRALRS_VERSION = "0.8.23"  # later ones stop at the first image (0.9.5: `max_image_tiles` must be set)


@dataclass(frozen=True)
class Setting:
    """One way to run a peer: dtype as torch names it; for transformers the cache, and whether decode steps are compiled."""

    name: str
    dtype: str
    cache: Optional[str] = None
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


def settings_of(run: Run) -> list[Setting]:
    """The settings that peers= names: one by its whole name, all of a peer by its first word.

    Raises UserError for an unknown one, and for one whose environment is not there.
    """
    found: list[Setting] = []
    for peer in run.peers:
        named = [setting for setting in SETTINGS if peer in (setting.name, setting.peer)]
        if not named:
            known = dict.fromkeys(name for setting in SETTINGS for name in (setting.peer, setting.name))
            raise UserError(f"peers={peer} is not one of {', '.join(known)}.")
        found += named
    python = mistralrs_python(run)
    if any(setting.peer == "mistralrs" for setting in found) and not os.access(python, os.X_OK):
        raise UserError(f"peers=mistralrs runs in an environment of its own, and task.mistralrs={python} is no Python. Make it: "
                        f"python3 -m venv .venv/mistralrs && .venv/mistralrs/bin/pip install mistralrs=={MISTRALRS_VERSION}")
    return list(dict.fromkeys(found))


def mistralrs_python(run: Run) -> Path:
    """The Python of the environment that mistralrs is installed in."""
    return Path(run.task.mistralrs).expanduser()
