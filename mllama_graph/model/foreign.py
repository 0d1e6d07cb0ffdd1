"""Recognises what is often given as a checkpoint and isn't one that can be read, and says what to do about it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import read_json, refuse_lfs_pointer

# Ends of the names of tensors that belong to a quantised weight, and the formats that write them.
QUANTISED = {
    ".absmax": "bitsandbytes, 4 bits",
    ".quant_map": "bitsandbytes, 4 bits",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes, 4 bits",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight_format": "bitsandbytes, 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_scale_inv": "fp8",
    ".scales": "MLX, GPTQ or AWQ",
}
NOT_READ_YET = "Quantised checkpoints are not read yet: use the model's weights in fp32, fp16 or bf16."


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


def refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError if config.json says that the weights are quantised (`quantization` is MLX's key)."""
    for key in ("quantization_config", "compression_config", "quantization"):
        given = config.get(key)
        if isinstance(given, dict) and given:
            method = given.get("quant_method") or ("MLX" if key == "quantization" else "an unnamed method")
            bits = f", {bits} bits" if (bits := _bits(given)) else ""
            raise UserError(f"{folder} is quantised ({method}{bits}; {key} in config.json). {NOT_READ_YET}")


def _bits(given: dict[str, Any]) -> Any:
    """Bits per weight of a quantisation config, or None."""
    for key, bits in (("load_in_4bit", 4), ("_load_in_4bit", 4), ("load_in_8bit", 8), ("_load_in_8bit", 8)):
        if given.get(key) is True:
            return bits
    groups = given.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("num_bits"):
            return weights["num_bits"]
    return given.get("bits") or given.get("w_bit") or given.get("weight_bits") or (8 if given.get("fmt") else None)


def refuse_quantised_names(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError if a tensor's name belongs to a quantised weight."""
    for name in names:
        for end, method in QUANTISED.items():
            if name.endswith(end):
                raise UserError(f"{folder} is quantised ({method}; it holds {name}). {NOT_READ_YET}")


def explain_dtype(folder: Path, name: str, kind: str) -> str:
    """Why a tensor's dtype can't be computed, as one line."""
    return (
        f"{folder}: {name} is stored as {kind}; supported are {', '.join(SAFETENSORS)}."
        f"{'' if kind in ('F64', 'BOOL', 'I64') else f' {NOT_READ_YET}'}"
    )
