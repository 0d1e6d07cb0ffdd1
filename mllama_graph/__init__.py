"""An inference engine for Llama 3.2 Vision built on static-shaped, paged, compiled graphs.

Public names are imported on first use, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllama_graph.core.errors import UserError
    from mllama_graph.engine.results import Delta, Result
    from mllama_graph.inputs.request import Request, Sampling
    from mllama_graph.llm import LLM

__version__ = "0.2.0"
__all__ = ["LLM", "Delta", "Request", "Result", "Sampling", "UserError"]

_MODULES = {
    "LLM": "llm",
    "Delta": "engine.results",
    "Result": "engine.results",
    "Request": "inputs.request",
    "Sampling": "inputs.request",
    "UserError": "core.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
