"""Writes quantised checkpoints as the formats' own tools publish them, each beside a twin with the dequantised weights.

compressed-tensors and bitsandbytes write their own formats. GPTQ, AWQ and ModelSlim are written here from their
definitions, bit by bit in loops over words, and import nothing of the engine.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TEXT = r".*language_model\..*(q|k|v|o|gate|up|down)_proj\.weight"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# (module, weight in fp32) -> (tensors by the rest of their name, dequantised weight)
Quantise = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def write_quantised(
    base: Path, folder: Path, quantise: Quantise, config: dict, modules: str = TEXT, files: dict | None = None
) -> Path:
    """Write `folder` with the weights that match `modules` quantised, and its twin. Returns the twin's folder."""
    twin = folder.parent / f"{folder.name}-twin"
    for target in (folder, twin):
        shutil.copytree(base, target)
        for path in target.glob("*.safetensors*"):
            path.unlink()
    weights = {}
    for path in sorted(base.glob("*.safetensors")):
        weights |= load_file(path)
    stored, plain = {}, {}
    for name, value in weights.items():
        stored[name] = plain[name] = value
        if re.fullmatch(modules, name):
            module = name.removesuffix("weight")
            tensors, plain[name] = quantise(module.rstrip("."), value.float())
            if tensors:
                del stored[name]
            stored |= {module + end: tensor.contiguous() for end, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({n: v.contiguous() for n, v in plain.items()}, twin / "model.safetensors", metadata={"format": "pt"})
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | config))
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return twin


# ---- compressed-tensors and bitsandbytes, written by the libraries


def compressed_tensors(folder: Path, base: Path, form: str, *, weights: dict, inputs: dict | None = None):
    """A checkpoint that compressed-tensors' compressor of `form` writes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    given = None if inputs is None else QuantizationArgs(**inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=given)
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantise(module, weight):
        rows, columns = weight.shape
        group = args.group_size or (weight.numel() if args.strategy == "tensor" else columns)
        grouped = weight.view(1, 1, -1) if args.strategy == "tensor" else weight.view(rows, columns // group, group)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        scale, zero = (value.flatten() if args.strategy == "tensor" else value for value in (scale, zero))
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        tensors = compressor.compress(state, scheme)
        plain = compressor.decompress({n: v.float() if n == "weight_scale" else v for n, v in tensors.items()}, scheme)
        if inputs is not None and not inputs.get("dynamic"):
            tensors["input_scale"] = torch.tensor([0.05], dtype=torch.bfloat16)
        return tensors, plain["weight"].float()

    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": json.loads(scheme.model_dump_json()) | {"format": form}},
            # The names of another generation, as today's tools write them.
            "ignore": ["re:.*nothing.*", "language_model.lm_head"],
        }
    }
    return write_quantised(base, folder, quantise, config)


def bitsandbytes_4(folder: Path, base: Path, kind: str = "nf4", nested: bool = True, modules: str = TEXT):
    """4 bits by bitsandbytes, in blocks of 64, with or without quantised scales."""
    from bitsandbytes import functional

    def quantise(module, weight):
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        # bitsandbytes 0.50.2 on a CPU begins new blocks at each row when it dequantises, but not when it quantises, so
        # that rows must be whole blocks.
        state.shape = (weight.numel() // 64, 64)
        plain = functional.dequantize_4bit(packed, state)
        return {"weight": packed} | parts, plain.float().view(weight.shape)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return write_quantised(base, folder, quantise, {"quantization_config": config}, modules)


def bitsandbytes_8(folder: Path, base: Path):
    """LLM.int8 by bitsandbytes."""
    from bitsandbytes import functional

    def quantise(module, weight):
        codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
        tensors = {"weight": codes, "SCB": largest.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, codes.float() * largest.float()[:, None] / 127

    return write_quantised(
        base, folder, quantise, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    )


# ---- GPTQ and AWQ


def words_of(codes: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """int32 words along the last axis: code i of a word in its bits i x bits and up, or in place of order[i]."""
    per = 32 // bits
    order = order or range(per)
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per))
    words = torch.zeros(*padded.shape[:-1], padded.shape[-1] // per, dtype=torch.int64)
    for place, code in enumerate(order):
        words |= padded[..., code::per] << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def asymmetric(weight: torch.Tensor, group_K: torch.Tensor, bits: int, symmetric: bool):
    """Codes from 0 (N, K), scales and zero points (N, G), and the weight that they stand for."""
    groups, top = int(group_K.max()) + 1, 2**bits - 1
    scale, zero = torch.empty(len(weight), groups), torch.empty(len(weight), groups)
    for group in range(groups):
        part = weight[:, group_K == group]
        if symmetric:
            scale[:, group], zero[:, group] = 2 * part.abs().amax(1) / top, (top + 1) / 2
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale[:, group] = (high - low) / top
            zero[:, group] = (-low / scale[:, group]).round().clamp(1, top)
    scale = scale.half().float()
    codes = (weight / scale[:, group_K] + zero[:, group_K]).round().clamp(0, top)
    return codes, scale, zero, (codes - zero[:, group_K]) * scale[:, group_K]


def shared_seed(module: str) -> int:
    """The same for weights with the same input, as GPTQ orders them alike."""
    place = re.search(r"layers\.(\d+)\.(.*)\.(\w+)", module)
    kind = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3}.get(place[3], 4)
    return 10 * int(place[1]) + kind


def gptq(
    folder: Path,
    base: Path,
    bits: int = 4,
    group: int = 32,
    act_order: bool = False,
    symmetric: bool = True,
    version: int = 1,
    method: dict | None = None,
    seed: Callable[[str], int] = shared_seed,
    modules: str = TEXT,
):
    """GPTQ's layout: codes packed by inputs, transposed; zero points by outputs, in version 1 less one."""

    def quantise(module, weight):
        inputs = weight.shape[1]
        size = inputs if group < 0 else group
        group_K = torch.arange(inputs) // size
        if act_order:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed(module)))
            group_K = torch.empty_like(group_K).scatter_(0, order, torch.arange(inputs) // size)
        codes, scale, zero, plain = asymmetric(weight, group_K, bits, symmetric)
        tensors = {
            "qweight": words_of(codes, bits).T,
            "qzeros": words_of(zero.T - float(version == 1), bits),
            "scales": scale.T.half(),
        }
        if method is None:
            tensors["g_idx"] = group_K.to(torch.int32)
        return tensors, plain

    config = method or {
        "quant_method": "gptq", "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip
    config = config | {"bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return write_quantised(base, folder, quantise, {"quantization_config": config}, modules)


def awq(folder: Path, base: Path, group: int = 32):
    """AWQ's GEMM layout: codes and zero points packed along the outputs in the order of AWQ_ORDER."""

    def quantise(module, weight):
        group_K = torch.arange(weight.shape[1]) // group
        codes, scale, zero, plain = asymmetric(weight, group_K, 4, symmetric=False)
        return {
            "qweight": words_of(codes.T, 4, AWQ_ORDER),
            "qzeros": words_of(zero.T, 4, AWQ_ORDER),
            "scales": scale.T.half(),
        }, plain

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return write_quantised(base, folder, quantise, {"quantization_config": config})


# ---- ModelSlim


def modelslim(
    folder: Path,
    base: Path,
    kind: str = "W8A16",
    version: int = 1,
    offsets: bool = False,
    fp16: bool = False,
    input_scale: Callable[[str], float] = lambda module: 0.0625,
):
    """ModelSlim's files. Layer 2's down projections stay in floating point."""
    dtype = torch.float32 if version == 1 else torch.bfloat16
    description = {}

    def quantise(module, weight):
        if ".layers.2.mlp.down" in module:
            description[f"{module}.weight"] = "FLOAT"
            return {}, weight
        description[f"{module}.weight"] = kind
        if offsets:
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            scale = ((high - low) / 255).to(dtype).float()
            offset = (-128 - low / scale).round()
        else:
            scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype).float()
            offset = torch.zeros_like(scale)
        codes = (weight / scale + offset).round().clamp(-128, 127)
        tensors = {
            "weight": codes.to(torch.int8), "weight_scale": scale.to(dtype), "weight_offset": offset.to(dtype),
        }  # fmt: skip
        if kind == "W8A8":
            given, zero = torch.tensor([input_scale(module)]), torch.tensor([-7.0])
            bits = (scale[:, 0] * given).float()
            deq = torch.tensor([int(v) for v in bits.view(torch.int32)]) if fp16 else bits
            bias = (-zero * codes.sum(1)).to(torch.int32)
            tensors |= {"input_scale": given.to(dtype), "input_offset": zero.to(dtype)}
            tensors |= {"deq_scale": deq, "quant_bias": bias}
        return tensors, (codes - offset) * scale

    name = "quant_model_description.json" if version == 1 else f"quant_model_description_{kind.lower()}.json"
    twin = write_quantised(base, folder, quantise, {} if version == 1 else {"quantize": kind.lower()})
    (folder / name).write_text(json.dumps({"model_quant_type": kind} | description))
    (folder / "model.safetensors").rename(folder / "quant_model_weights-00001-of-00001.safetensors")
    return twin
