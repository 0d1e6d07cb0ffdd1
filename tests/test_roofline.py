"""Bytes and parameters computed from shapes, against Hugging Face's count and the memory that is allocated."""

from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import SPECS
from engines import start
from transformers import MllamaConfig, MllamaForConditionalGeneration

from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import Storage
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.cost import kv_elements, sizes, step_bytes
from mllama_graph.plan.memory import Memory, require

# Weights, activations and pages in bf16.
BF16 = Storage(2, 2, 2)
CONF = Path(__file__).parents[1] / "conf" / "model"


def released(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["config"]


def shape(name):
    return shape_of({"model_type": "mllama", **released(name)})


def tensors(tree):
    return sum(value.numel() for value in tree.parameters())


@pytest.mark.parametrize("name", SPECS)
def test_sizes_count_every_parameter_of_a_tree(name, model):
    weights, parts = model(name).weights, sizes(model(name).shape)
    assert parts.total == tensors(weights)
    assert parts.vision == tensors(weights.vision)
    assert parts.projector == tensors(weights.projector)
    assert parts.embedding == weights.text.embed.weight.numel()


@pytest.mark.parametrize("name, text, vision, projector", [("11b", 9.78, 0.864, 0.031), ("90b", 87.67, 0.864, 0.063)])
def test_sizes_of_the_released_models_are_hugging_faces(name, text, vision, projector):
    given = released(name)
    # The config has only the sizes of the model; HF's defaults fill the rest, except for the vision output width.
    width = given["vision_config"]["hidden_size"] * (1 + len(given["vision_config"]["intermediate_layers_indices"]))
    config = MllamaConfig(**given | {"vision_config": given["vision_config"] | {"vision_output_dim": width}})
    with torch.device("meta"):
        theirs = MllamaForConditionalGeneration(config)
    parts = sizes(shape(name))
    assert parts.total == tensors(theirs)
    assert parts.vision == tensors(theirs.model.vision_model)
    assert parts.projector == tensors(theirs.model.multi_modal_projector)
    # In billions.
    assert round((parts.total - parts.vision - parts.projector) / 1e9, 2) == text
    assert (round(parts.vision / 1e9, 3), round(parts.projector / 1e9, 3)) == (vision, projector)


@pytest.mark.parametrize(
    "name, self_kib, tile_mb, lean_gb, full_gb", [("11b", 128, 52.5, 15.0, 18.4), ("90b", 320, 131, 139.0, 172.6)]
)
def test_bytes_of_the_released_models_are_those_of_the_table(name, self_kib, tile_mb, lean_gb, full_gb):
    model, width = shape(name), 2  # bf16
    assert kv_elements(model, len(model.text.self_layers)) * width == self_kib * 1024
    assert kv_elements(model, len(model.text.cross_layers)) * width * model.vision.tokens / 1e6 == pytest.approx(
        tile_mb, rel=0.005
    )
    assert step_bytes(model, False, 0, 0, Storage(width, width, width)) / 1e9 == pytest.approx(lean_gb, abs=0.05)
    assert step_bytes(model, True, 0, 0, Storage(width, width, width)) / 1e9 == pytest.approx(full_gb, abs=0.05)


def test_a_step_reads_image_tokens_only_with_images():
    model = shape("11b")
    lean = step_bytes(model, False, 0, 0, BF16)
    assert step_bytes(model, False, 1000, 999, BF16) - lean == 1000 * 128 * 1024
    full = step_bytes(model, True, 0, 0, BF16)
    assert step_bytes(model, True, 0, 4 * 1601, BF16) - full == pytest.approx(209.8e6, rel=0.001)
    assert step_bytes(model, True, 1000, 0, Storage(2, 4, 4)) - full == 2 * 1000 * 128 * 1024


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("base", {"dtype": "fp32"}),
        ("wide", {}),
        ("base", {"quant": "w8a16", "quant_parts": ["text", "head", "embedding"]}),
        ("wide", {"quant": "w4a8", "quant_group": 32}),
    ],
    ids=str,
)
def test_planned_memory_equals_allocated_memory(name, options, checkpoint):
    executor = start(checkpoint(name), batch=3, page_size=16, **options).executor
    rank, memory = executor.rank, executor.run.memory

    def held(pages):
        return sum(data.numel() * data.element_size() for pair in pages for data in pair)

    assert held(rank.pages) == memory.self_pages
    assert held(rank.image_pages) == memory.image_pages
    weights = sum(value.numel() * value.element_size() for value in rank.weights.parameters())
    assert weights == memory.weights


def test_too_little_memory_is_refused_with_the_sum():
    needed = Memory(weights=21_300_000_000, self_pages=2_000_000_000, image_pages=1_000_000_000, workspace=500_000_000)
    with pytest.raises(UserError) as error:
        require(needed, 10_000_000_000, "MemAvailable")
    for part in ("weights 21.30", "2.00", "1.00", "0.50", "= 24.80 GB needed", "10.00 GB available (MemAvailable)"):
        assert part in str(error.value)
    require(needed, 24_800_000_000, "MemAvailable")


def test_a_rank_that_does_not_fit_allocates_nothing(checkpoint):
    with pytest.raises(UserError, match=r"needed, .* available \(memory_gib=0.001\)"):
        start(checkpoint("base"), memory_gib=0.001)
