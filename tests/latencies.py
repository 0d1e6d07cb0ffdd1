"""Shapes and hardware of the latency model's tests: the released models, Qwen3-8B, and conf/hardware/."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from mllama_graph.core.devices import NPU
from mllama_graph.core.hardware import Calibration, HardwareChoice
from mllama_graph.model.formats import Storage, chosen
from mllama_graph.model.shape import RopeShape, TextShape, shape_of
from mllama_graph.plan.latency import Model
from mllama_graph.plan.quantised import on_device

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@cache
def released(name):
    """The shape of 11b or 90b."""
    config = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["config"]
    return shape_of({"model_type": "mllama", **config})


@cache
def qwen():
    """Qwen3-8B's language model; no step of text reads the vision tower beside it."""
    text = TextShape(151936, 4096, 36, 32, 8, 128, 12288, (), 1e-6, 40960, RopeShape(theta=1e6))
    return replace(released("11b"), text=text, embeddings=151936)


def hardware(name="910b"):
    given = yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())
    # YAML reads 6.4e10 without a sign as a string, Hydra as a number.
    return HardwareChoice(**given | {"calibration": Calibration(**given.get("calibration", {}))})


def model(shape, ranks, quant="none", **options):
    """The Model of a shape whose layers are quantised as quant= does on an NPU, with weights and pages in bf16."""
    formats = on_device(chosen(quant, 128, ("text",), shape, ranks), quant, shape, ranks, NPU, "bf16")
    return Model(shape, Storage(2, 2, 2, formats), ranks, hardware(), **options)
