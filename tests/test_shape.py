"""The sizes of a model from its config.json: both styles, HF's defaults, and what is refused."""

import json
from dataclasses import replace

import pytest
from checkpoints import LLAMA3_SCALING, SPECS, model_config
from transformers import MllamaConfig
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from mllama_graph.core.errors import UserError
from mllama_graph.model.fields import Fields, read_json
from mllama_graph.model.shape import RopeShape, differences, shape_of, supported_aspect_ratios

BASE = model_config(SPECS["base"])


def changed(part, **fields):
    return BASE | {part: BASE[part] | fields}


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "default"}, LLAMA3_SCALING, {"rope_type": "linear", "factor": 4.0}]
)
def test_both_rope_styles_give_the_same_rope(scaling):
    spec = replace(SPECS["base"], rope_scaling=scaling, rope_theta=12345.0)
    old, new = (
        shape_of(model_config(replace(spec, rope_style=style))) for style in ("rope_scaling", "rope_parameters")
    )
    assert old == new
    given = scaling or {}
    assert old.text.rope == RopeShape(
        theta=12345.0,
        type=given.get("rope_type", "default"),
        factor=given.get("factor", 1.0),
        original_positions=given.get("original_max_position_embeddings", 8192),
    )


def test_a_bare_config_has_the_defaults_of_hugging_face():
    theirs, ours = MllamaConfig(), shape_of({"model_type": "mllama"})
    text, vision = theirs.text_config, theirs.vision_config
    assert (ours.text.width, ours.text.layers, ours.text.heads, ours.text.kv_heads, ours.text.mlp, ours.text.vocab) == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
        text.vocab_size,
    )
    assert ours.text.cross_layers == tuple(text.cross_attention_layers)
    assert (
        ours.vision.width,
        ours.vision.layers,
        ours.vision.global_layers,
        ours.vision.mlp,
        ours.vision.patch,
        ours.vision.tile,
        ours.vision.max_tiles,
    ) == (
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_global_layers,
        vision.intermediate_size,
        vision.patch_size,
        vision.image_size,
        vision.max_num_tiles,
    )
    assert ours.vision.features == tuple(vision.intermediate_layers_indices)
    assert ours.image_token == theirs.image_token_index


@pytest.mark.parametrize("tiles", range(1, 9))
def test_aspect_ratios_are_hugging_faces_in_its_order(tiles):
    # HF lists (width, height) pairs in the released order; ids count (height, width) pairs.
    assert [tuple(pair) for pair in get_all_supported_aspect_ratios(tiles)] == supported_aspect_ratios(tiles)


@pytest.mark.parametrize("name", SPECS)
def test_every_field_of_a_checkpoint_is_read(name):
    spec, shape = SPECS[name], shape_of(model_config(SPECS[name]))
    assert shape.text.head_width == spec.hidden // spec.heads
    assert shape.text.cross_layers == tuple(spec.cross_layers)
    assert sorted((*shape.text.self_layers, *shape.text.cross_layers)) == list(range(spec.layers))
    assert shape.vision.tokens == (spec.tile_size // spec.patch_size) ** 2 + 1
    assert shape.vision.features == tuple(spec.intermediate), "the order of the list counts"
    assert shape.vision.eps == spec.vision_norm_eps and shape.text.eps == spec.rms_norm_eps
    assert shape.image_token == spec.vocab and shape.embeddings == spec.vocab + 8


@pytest.mark.parametrize(
    "config, message",
    [
        (BASE | {"model_type": "llama"}, "model_type='llama'; only 'mllama' is supported"),
        ({}, "model_type=None"),
        (
            changed("text_config", rope_scaling={"rope_type": "yarn"}),
            "rope_scaling: rope_type is 'yarn'; it must be one of default, linear, llama3",
        ),
        (changed("text_config", hidden_act="gelu"), "text_config: hidden_act is 'gelu'"),
        (changed("vision_config", hidden_act="relu"), "vision_config: hidden_act is 'relu'"),
        (changed("text_config", num_key_value_heads=3), "3 kv heads do not divide 4 query heads"),
        (changed("text_config", head_dim=7), "head_dim 7 is not even"),
        (changed("text_config", cross_attention_layers=[-1, 3]), r"cross_attention_layers is \[-1, 3\]"),
        (
            changed("vision_config", intermediate_layers_indices=[4]),
            r"intermediate_layers_indices \[4\] go beyond the 4",
        ),
        (changed("vision_config", image_size=[56, 40]), "image_size is .56, 40.; .* tiles are square"),
        (changed("vision_config", image_size=57), "tile 57 / patch 8"),
    ],
)
def test_an_unsupported_config_is_refused_with_its_rule(config, message):
    with pytest.raises(UserError, match=message):
        shape_of(config)


@pytest.mark.parametrize(
    "part, fields",
    [
        ("text_config", {"hidden_size": "wide"}),
        ("text_config", {"num_attention_heads": 0}),
        ("text_config", {"num_key_value_heads": 0}),
        ("text_config", {"cross_attention_layers": "all"}),
        ("vision_config", {"patch_size": 0}),
        ("vision_config", {"image_size": []}),
        ("text_config", "text"),
        ("vision_config", [1]),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_the_users_error(part, fields):
    config = changed(part, **fields) if isinstance(fields, dict) else BASE | {part: fields}
    with pytest.raises(UserError, match="config.json"):
        shape_of(config)


@pytest.mark.parametrize("content", ["", "{", '{"a": }', "[1, 2]", "3", "null", '"text"', b"\xff\xfe{}"])
def test_a_broken_json_file_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="config.json"):
        read_json(path)


def test_an_absent_file_is_an_error_only_where_it_is_needed(tmp_path):
    assert Fields.of(tmp_path / "generation_config.json").values == {}
    with pytest.raises(UserError, match="config.json is missing"):
        read_json(tmp_path / "config.json")


def test_differences_name_each_field_with_both_values():
    other = json.loads(json.dumps(BASE))
    other["text_config"]["num_hidden_layers"] = 6
    other["vision_config"]["max_num_tiles"] = 2
    lines = differences(shape_of(BASE), shape_of(other))
    assert "text.layers: expected 5, found 6" in lines and "vision.max_tiles: expected 4, found 2" in lines
    assert len(lines) == 2
    assert differences(shape_of(BASE), shape_of(BASE)) == []
