"""Which formats of quantised layers a device's kernels take: decided before any rank exists, so that the memory plan,
the graphs and the ranks agree."""

from collections.abc import Iterator
from dataclasses import replace

from mllama_graph.core.config import TorchairChoice
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import EMBEDDING, FLOAT, STATIC, Format, Formats, is_quantisable, leaf_of
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import Shard, table


def on_device(formats: Formats, quant: str, shape: ModelShape, world: int, device: Device, dtype: str) -> Formats:
    """The formats with which a device that computes in `dtype` holds a model's layers.

    Layers that are too large for its kernels stay in floating point where `quant` chose their format; "none" stands
    for a checkpoint's formats, whose codes can't change; activations of 4-bit layers are not rounded where the device
    can't multiply them so. Raises UserError for a format without a kernel.
    """
    limits, found = device.quantised, []
    source = f"quant={quant}" if quant != "none" else "weights="
    if not device.int4_by_int8 and any(_int4_by_int8(form) for _, form in formats):
        if quant != "none":
            raise UserError(
                f"{source}: device={device.name} has no kernel that multiplies 4-bit weights with int8 activations. "
                "Use quant=w4a16 or w8a8, or device=cpu."
            )
        formats = tuple((p, replace(form, activations=FLOAT) if _int4_by_int8(form) else form) for p, form in formats)
    if limits is None:
        return formats
    for path, form, outputs, inputs in sizes(formats, shape, world):
        if path == EMBEDDING:
            raise UserError(
                f"quant_parts: device={device.name} looks up the embedding in floating point only. Leave embedding out."
            )
        if form.code not in limits.codes:
            raise UserError(
                f"{source}: {path} is in {form.code}, for which device={device.name} has no kernel. Use "
                f"{'quant=w8a16, w8a8 or w4a16' if quant != 'none' else 'a checkpoint in int8 or int4'}, or device=cpu."
            )
        if form.activations == STATIC and dtype in limits.refused_with_static:
            raise UserError(
                f"{source}: {path} has a stored scale of int8 activations, with which device={device.name} gives no "
                f"{dtype}. Use dtype=bf16."
            )
        if form.groups(inputs) > 1 and form.group % limits.group:
            raise UserError(
                f"{source}: {path} has groups of {form.group} inputs; device={device.name} takes multiples of "
                f"{limits.group}. Use device=cpu."
            )
        if form.bits == 4 and outputs % limits.outputs:
            raise UserError(
                f"{source}: {path} has {outputs} outputs a rank; in 4 bits device={device.name} takes multiples of "
                f"{limits.outputs}. Use quant=w8a16, or another tp=."
            )
        if max(outputs, inputs) <= limits.largest:
            found.append((path, form))
        elif quant == "none":
            raise UserError(
                f"{source}: {path} is quantised and has {max(outputs, inputs)} outputs or inputs a rank; "
                f"device={device.name} takes up to {limits.largest}. Raise tp, or use device=cpu."
            )
    return tuple(found)


def _int4_by_int8(form: Format) -> bool:
    return form.bits == 4 and form.activations != FLOAT


def sizes(formats: Formats, shape: ModelShape, world: int) -> Iterator[tuple[str, Format, int, int]]:
    """(path, format, outputs, inputs) of each quantised leaf of a rank."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    for entry in table(shape):
        if is_quantisable(entry):
            rows.setdefault(leaf_of(entry), []).append(entry.local(Shard(0, world)))
    for path, form in formats:
        yield path, form, sum(size[0] for size in rows[path]), rows[path][0][1]


def compiler_choice(formats: Formats, choice: TorchairChoice, device: Device) -> TorchairChoice:
    """torchair's options with the weights' layout decided.

    auto: NZ on an NPU, where every layer has a kernel for it. Raises UserError for weights that have none.
    """
    # Docs of npu_weight_quant_batchmatmul: only graphs of GE multiply such weights in NZ.
    refused = choice.mode != "max-autotune" and any(form.activations == FLOAT for _, form in formats)
    if choice.weight_format == "nz" and refused:
        raise UserError(
            f"backend.torchair.weight_format=nz: layers with int8 weights and float activations have a kernel for "
            f"it only with backend.torchair.mode=max-autotune, not {choice.mode}. Use weight_format=nd, or "
            "quant=w8a8."
        )
    padded = [path for path, _ in formats if path.startswith("vision.") and path.endswith((".qkv", ".o"))]
    if choice.pad_vision_heads and padded:
        raise UserError(
            f"backend.torchair.pad_vision_heads=true: {padded[0]} is quantised, and only layers in floating point are "
            "padded. Use pad_vision_heads=false, or quantise the text layers alone."
        )
    if choice.weight_format != "auto":
        return choice
    return replace(choice, weight_format="nd" if device.simulated or refused else "nz")
