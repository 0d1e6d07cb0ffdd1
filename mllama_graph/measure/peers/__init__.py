"""Settings of the other engines (peers) that are measured on the same checkpoint; process.py runs them."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mllama_graph.core.errors import UserError

TRANSFORMERS = "transformers>=5.17,<6"
# What pip installs into the environment of a peer that has one of its own. Later versions of mistralrs fail at the
# first image (0.9.5: "`max_image_tiles` must be set").
ENVIRONMENTS = {
    "mistralrs": "mistralrs==0.8.23",
    "llamacpp": "llama-cpp-python==0.3.36 gguf==0.19.0",
    "openvino": "openvino==2026.4.1 nncf==3.4.0",
}


@dataclass(frozen=True)
class Setting:
    """One way to run a peer. `dtype`: the format of its weights, as the peer calls it.

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
    *(Setting(f"llamacpp {form}", form) for form in ("F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M")),
    *(Setting(f"openvino {form}", form) for form in ("f32", "f16", "int8", "int4")),
)


def settings_of(names: list[str], pythons: Mapping[str, Path]) -> list[Setting]:
    """The settings that peers= selects: one setting by its full name, or all settings of a peer by the peer's name.

    `pythons`: the Python interpreters of the peers that have an environment of their own. Raises UserError for an
    unknown name, and for a peer that is not installed.
    """
    found: list[Setting] = []
    for peer in names:
        named = [setting for setting in SETTINGS if peer in (setting.name, setting.peer)]
        if not named:
            known = dict.fromkeys(name for setting in SETTINGS for name in (setting.peer, setting.name))
            raise UserError(f"peers={peer} is not one of {', '.join(known)}.")
        found += named
    peers = {setting.peer for setting in found}
    for peer in sorted(peers & ENVIRONMENTS.keys()):
        if not os.access(pythons[peer], os.X_OK):
            raise UserError(
                f"peers={peer} runs in its own environment, and task.{peer}={pythons[peer]} is not an executable. "
                f"Create the environment: python3 -m venv .venv/{peer} && "
                f".venv/{peer}/bin/pip install {ENVIRONMENTS[peer]}"
            )
    if "transformers" in peers and not importlib.util.find_spec("transformers"):
        raise UserError(
            "peers=transformers needs transformers, which is not installed. Install it with: "
            f"pip install '{TRANSFORMERS}'"
        )
    return list(dict.fromkeys(found))
