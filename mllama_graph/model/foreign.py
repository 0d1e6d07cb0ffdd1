"""Recognises what is often given as a checkpoint and isn't one that can be read, and says what to do about it."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import read_json, refuse_lfs_pointer


def open_safetensors(path: Path) -> Any:
    """A file opened to read its header. Raises UserError where it is not in the format."""
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path} can't be read as safetensors: {error}. Download it again.") from error


def explain_missing_config(folder: Path) -> str:
    """Why a folder without config.json is not a checkpoint, and what to give instead, as one line."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return (
            f"weights={folder} is an adapter (adapter_config.json), not a model. Use weights= with a checkpoint of "
            f"{base}, and adapter={folder}."
        )
    inside = sorted(
        path.parent
        for depth in ("*", "*/*")
        for name in ("config.json", "params.json")
        for path in folder.glob(f"{depth}/{name}")
    )
    hint = f" Did you mean weights={inside[0]}?" if inside else " weights= needs a Hugging Face checkpoint folder."
    if not inside and any(folder.glob("*.gguf")):
        hint = " GGUF files are not read: use the Hugging Face checkpoint that they were made from."
    return f"{folder / 'config.json'} is missing.{hint}"


def explain_missing_weights(folder: Path) -> str:
    """Why a folder without safetensors can't be read, and how to convert what it holds, as one line."""
    pickled = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    if pickled:
        return (
            f"{folder} holds no .safetensors file, only {pickled[0]}{' and others' if len(pickled) > 1 else ''}. "
            'Convert it: python -c "from transformers import MllamaForConditionalGeneration as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\"."
        )
    if (folder / "adapter_model.safetensors").is_file():
        return f"{folder} holds only an adapter. Use weights= with its base model, and adapter={folder}."
    if any(folder.glob("*.gguf")):
        return f"{folder} holds no .safetensors file. GGUF files are not read: use the Hugging Face checkpoint."
    return f"{folder} holds no .safetensors file. Download the weights, or convert the checkpoint to safetensors."


def explain_dtype(folder: Path, name: str, kind: str) -> str:
    """Why a tensor's dtype can't be computed, as one line."""
    return (
        f"{folder}: {name} is stored as {kind}, and belongs to no quantised weight that is read; other tensors are "
        f"{', '.join(SAFETENSORS)}."
    )
