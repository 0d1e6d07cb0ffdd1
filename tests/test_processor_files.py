"""A checkpoint's tokenizer and processor files in every form that transformers reads, and files that are wrong."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import SPECS, image_config
from hypothesis import given, settings
from hypothesis import strategies as st
from request_cases import random_image
from tokenizer_files import CHAT_TEMPLATE
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.processor import Processor
from mllama_graph.inputs.request import Sampling
from mllama_graph.model.fields import read_json
from mllama_graph.model.shape import shape_of

SPEC = SPECS["base"]
FILES = ("config", "generation_config", "preprocessor_config", "tokenizer", "tokenizer_config")
END, EOM, EOT = (SPEC.special_id(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id"))


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint's files without weights; its template is in tokenizer_config.json."""
    for name in FILES:
        shutil.copy(checkpoint("base") / f"{name}.json", tmp_path)
    return tmp_path


def load(folder) -> Processor:
    return Processor(folder, shape_of(read_json(folder / "config.json")), 10, 300, 310, Sampling())


def edit(folder, name: str, **fields) -> None:
    """Set fields of a JSON file; ... removes one."""
    path = folder / f"{name}.json"
    values = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    random_image(70, 60, "RGB", np.random.default_rng(0)).save(path)
    return path


# ---- image settings


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"size": 56},
        {"size": [56, 56]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": 0, "image_std": 1},
        {"image_mean": ...},
        {"rescale_factor": ...},
        {"rescale_factor": None, "do_rescale": False},
        {"image_mean": None, "image_std": None, "do_normalize": False},
        {"rescale_factor": 0.5},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_normalize": None},
        {"do_rescale": None},
        {"do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["preprocessor_config", "processor_config"])
def test_pixels_are_those_of_transformers_with_the_same_file(where, fields, folder, picture):
    config = {name: value for name, value in (image_config(SPEC) | fields).items() if value is not ...}
    if where == "preprocessor_config":
        (folder / f"{where}.json").write_text(json.dumps(config))
    else:  # it comes before preprocessor_config.json, as in transformers 5
        edit(folder, "preprocessor_config", image_mean=9, image_std=9)
        edit(folder, where, image_processor=config)
    processor = load(folder)
    scale, mean, std = (np.asarray(value, dtype=np.float64) for value in processor.pixels)
    image = processor.request({"prompt": "x", "images": [str(picture)]}).images[0]
    mine = (image.data * scale - mean[:, None, None]) / std[:, None, None]
    theirs = MllamaImageProcessorPil.from_dict(config)(random_image(70, 60, "RGB", np.random.default_rng(0)))
    wanted = np.asarray(theirs["pixel_values"])[0, 0, : image.count]
    # fp32 there, fp64 here; values reach 1000 without rescaling.
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"do_resize": False}, "do_resize is false; it must be true"),
        ({"do_pad": False}, "do_pad is false; it must be true"),
        ({"do_pad": None}, "do_pad is null; it must be true"),
        ({"image_mean": None}, "image_mean is null; it must be a finite number or a list of 3"),
        ({"rescale_factor": None}, "rescale_factor is null; it must be a finite number"),
        ({"do_pad": "no"}, "do_pad is 'no'; it must be true or false"),
        ({"resample": 3}, "resample is 3; it must be 2: the engine resizes bilinearly"),
        ({"resample": None}, "resample is null; it must be 2"),
        ({"resample": "bilinear"}, "resample is 'bilinear'; it must be 2"),
        ({"size": {"shortest_edge": 56}}, r"size is \{'shortest_edge': 56\}; it must be one number, or height"),
        ({"size": {"height": 56, "width": 28}}, "size is .*'width': 28.*must be .* equal, since mllama's"),
        ({"size": {"height": "56", "width": 56}}, "size is .*'height': '56'.*must be .* equal"),
        ({"size": True}, "size is true; it must be a whole number"),
        ({"size": -1}, "size is -1; it must be at least 1"),
        ({"size": [56]}, r"size is \[56\]; it must be one side, or two equal ones"),
        ({"size": 448}, "up to 4 tiles of 448 px, config.json says 4 of 56 px"),
        ({"size": None}, "size is null"),
        ({"max_image_tiles": None}, "max_image_tiles is null"),
        ({"max_image_tiles": 0}, "max_image_tiles is 0; it must be at least 1"),
        ({"max_image_tiles": 2.5}, "max_image_tiles is 2.5"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; it must be a finite number or a list of 3"),
        ({"image_mean": "0.5"}, "image_mean is '0.5'"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std .* must be other than 0"),
        ({"image_std": float("nan")}, "image_std is nan; it must be a finite number"),
        ({"rescale_factor": [1]}, r"rescale_factor is \[1\]; it must be a finite number"),
        ({"rescale_factor": 10**400}, "rescale_factor is a number of more than 20 digits"),
    ],
    ids=str,
)
def test_image_settings_that_cannot_be_followed_are_refused_by_field(fields, message, folder):
    edit(folder, "preprocessor_config", **fields)
    with pytest.raises(UserError, match=f"preprocessor_config.json.*{message}"):
        load(folder)


def test_a_checkpoint_without_image_settings_is_normalised_as_the_released_ones_and_says_so(folder):
    (folder / "preprocessor_config.json").unlink()
    processor = load(folder)
    assert processor.pixels[1:] == tuple(tuple(image_config(SPEC)[name]) for name in ("image_mean", "image_std"))
    assert any("preprocessor_config.json is missing" in note for note in processor.notes)


# ---- tokenizer.json


def test_truncation_and_padding_that_training_left_in_the_tokenizer_are_off(folder):
    edit(
        folder,
        "tokenizer",
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3,
            "pad_type_id": 0, "pad_token": "x",
        },
    )  # fmt: skip
    chat = [{"role": "user", "content": "What do you see in the picture?"}]
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert list(load(folder).request({"messages": chat}).ids) == wanted


def add_tokens(folder, first: int, count: int) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    more = [tokens[-1] | {"id": first + n, "content": f"<loc_{first + n}>"} for n in range(count)]
    edit(folder, "tokenizer", added_tokens=[*tokens, *more])


def test_ids_from_the_tokenizer_are_checked_like_input_ids_and_reserved_rows_are_allowed(folder):
    image = SPEC.vocab
    add_tokens(folder, image + 1, 9)  # 8 rows follow the vocabulary, the first is <|image|>
    processor = load(folder)
    assert image + 7 in processor.request({"prompt": f"<loc_{image + 7}>"}).ids
    for request in ({"prompt": f"at <loc_{image + 8}>"}, {"input_ids": [image + 8]}):
        with pytest.raises(UserError, match=rf"{image + 8} \(<loc_{image + 8}>\); ids run from 0 to {image + 7}"):
            processor.request(request)
    assert any("7 tokens from" in note and "2 tokens from" in note for note in processor.notes)


@pytest.mark.parametrize("id", [None, 5])
def test_a_picture_needs_the_image_token_of_the_tokenizer(id, folder, picture):
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace("<|image|>", "<|other|>"))
    if id is not None:
        edit(folder, "config", image_token_index=SPEC.vocab + 1)
        (folder / "tokenizer.json").write_text(tokenizer)
    processor = load(folder)
    assert processor.request({"prompt": "no picture"}).ids
    with pytest.raises(UserError, match=r"tokenizer.json (has no token|gives) <\|image\|>.*image_token_index"):
        processor.request({"prompt": "x", "images": [str(picture)]})


def test_a_prompt_that_cannot_be_encoded_is_the_requests_error(folder):
    with pytest.raises(UserError, match="can't be tokenized"):
        load(folder).request({"prompt": "\udcff"})


# ---- ends


@pytest.mark.parametrize(
    "generation, config, text, token, wanted",
    [
        ([END], ..., ..., None, {END, EOM, EOT}),
        (None, None, END, ..., {END, EOM, EOT}),
        (..., 7, [END, 8], "<|end_of_text|>", {7, END, 8, EOM, EOT}),
        (..., ..., ..., {"content": "<|python_tag|>"}, {SPEC.special_id("<|python_tag|>"), EOM, EOT}),
        (-1, 10**9, ..., "no such token", {EOM, EOT}),
    ],
)
def test_the_ends_of_all_files_are_united(generation, config, text, token, wanted, folder):
    text_config = json.loads((folder / "config.json").read_text())["text_config"] | {"eos_token_id": text}
    text_config = {name: value for name, value in text_config.items() if value is not ...}
    edit(folder, "generation_config", eos_token_id=generation)
    edit(folder, "config", eos_token_id=config, text_config=text_config)
    edit(folder, "tokenizer_config", eos_token=token)
    assert load(folder).eos == wanted


def test_a_checkpoint_without_any_end_says_so(folder):
    (folder / "generation_config.json").unlink()
    text_config = json.loads((folder / "config.json").read_text())["text_config"] | {"eos_token_id": None}
    edit(folder, "config", text_config=text_config)
    edit(folder, "tokenizer_config", eos_token=...)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace("<|eot_id|>", "<|a|>").replace("<|eom_id|>", "<|b|>"))
    processor = load(folder)
    assert not processor.eos and any("names no end-of-sequence token" in note for note in processor.notes)


# ---- chat templates


def write(folder, place: str, template) -> None:
    if place.endswith(".jinja"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(template)
    else:
        edit(folder, place.removesuffix(".json"), chat_template=template)


PLACES = ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json"]


@pytest.mark.parametrize("count", range(1, len(PLACES) + 1))
def test_of_several_templates_the_one_of_transformers_processor_is_used(count, folder):
    for n, place in enumerate(PLACES[:count]):
        write(folder, place, CHAT_TEMPLATE + f"place {n}")
    edit(folder, "preprocessor_config", processor_class="MllamaProcessor")
    theirs = AutoProcessor.from_pretrained(folder)
    template = theirs.chat_template or theirs.tokenizer.chat_template
    chat = [{"role": "user", "content": "hi"}]
    wanted = theirs.tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True)
    processor = load(folder)
    assert list(processor.request({"messages": chat}).ids) == wanted["input_ids"]
    assert any("in the same folder differ" in note for note in processor.notes) == (count > 1)


@pytest.mark.parametrize(
    "templates",
    [
        {"tokenizer_config.json": [{"name": n, "template": CHAT_TEMPLATE + n} for n in ("default", "tool_use", "rag")]},
        {"chat_template.json": {"default": CHAT_TEMPLATE + "default", "tool_use": CHAT_TEMPLATE + "tool_use"}},
        {
            "chat_template.jinja": CHAT_TEMPLATE + "default",
            "additional_chat_templates/tool_use.jinja": CHAT_TEMPLATE + "tool_use",
        },
    ],
    ids=lambda templates: next(iter(templates)),
)
def test_a_request_with_tools_gets_the_template_for_tools(templates, folder):
    write(folder, "tokenizer_config.json", None)
    for place, template in templates.items():
        write(folder, place, template)
    processor = load(folder)
    for name, tools in (("default", None), ("tool_use", [{"name": "f"}])):
        assert processor.text(processor.request({"prompt": "hi", "tools": tools}).ids).endswith(name)


def test_without_a_default_template_prompts_are_completed_as_text_and_a_line_says_so(folder):
    said = []
    for template in (None, "", [{"name": "tool_use", "template": CHAT_TEMPLATE}]):
        write(folder, "tokenizer_config.json", template)
        processor = load(folder)
        assert processor.text(processor.request({"prompt": "hi"}).ids) == "hi"
        said += [note for note in processor.notes if "prompts" in note and "completed as plain text" in note]
    assert len(said) == 3 and "tool_use" in said[2]
    chat = [{"role": "user", "content": "hi"}]
    assert load(folder).request({"messages": chat, "tools": [{"name": "f"}]}).ids, "tool_use serves tools"
    write(folder, "tokenizer_config.json", None)
    with pytest.raises(UserError, match="tools can't be used: this checkpoint has no chat template"):
        load(folder).request({"messages": chat, "tools": [{"name": "f"}]})


def test_fields_of_the_template_are_refused_beside_input_ids(folder):
    with pytest.raises(UserError, match="tools can't be used: input_ids are used as given"):
        load(folder).request({"input_ids": [1], "tools": [{"name": "f"}]})


# ---- damaged files


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja", *PLACES])
def test_a_file_that_is_not_utf8_is_named(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'{"chat_template": "\xff\xfe"}')
    with pytest.raises(UserError, match="(?i)utf-8") as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", [*PLACES[::2], "generation_config.json", "preprocessor_config.json"])
def test_a_file_that_is_nested_too_deep_is_named(name, folder):
    (folder / name).write_text('{"chat_template": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match=f"{name} is not valid JSON"):
        load(folder)


FIELDS = [
    *(("preprocessor_config", name) for name in image_config(SPEC)),
    *(("tokenizer_config", name) for name in ("chat_template", "bos_token", "eos_token", "added_tokens_decoder")),
    *((name, "eos_token_id") for name in ("config", "generation_config")),
    *(("processor_config", name) for name in ("chat_template", "image_processor")),
    ("special_tokens_map", "eos_token"),
    ("chat_template", "chat_template"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "height", "width", "name", "template", "default"]), inner)
    ),
    max_leaves=5,
)


@given(field=st.sampled_from(FIELDS), value=JSON)
@settings(max_examples=150)
def test_a_value_of_any_type_is_read_or_refused_with_file_and_field(field, value, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(checkpoint("base") / f"{name}.json", folder)
    for name in ("processor_config", "special_tokens_map", "chat_template"):
        (folder / f"{name}.json").unlink(missing_ok=True)
    file, name = field
    edit(folder, file, **{name: value})
    try:
        load(folder).request({"prompt": "hi"})
    except UserError as error:
        message = str(error)
        assert "\n" not in message and (
            file in message and name in message or "template" in message or "tiles" in message
        )
