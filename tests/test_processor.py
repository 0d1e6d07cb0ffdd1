"""Chats to ids against transformers' chat template, ids to text against the tokenizer, and refused requests."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
from checkpoints import SPECS
from engines import resolved, run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from request_cases import random_image, resolve
from tokenizer_files import CHAT_TEMPLATE
from transformers import AutoTokenizer

from mllama_graph.core.errors import UserError
from mllama_graph.engine.start import processor_of
from mllama_graph.inputs.detokenizer import Detokenizer

WITH_TEMPLATE = [name for name, spec in SPECS.items() if spec.template]
# Any text without special tokens, which have tests of their own.
TEXTS = st.text(max_size=40).filter(lambda text: "<|" not in text and text.strip())


@pytest.fixture(scope="session")
def processor(checkpoint):
    """processor(spec name) -> the processor of its checkpoint."""

    @cache
    def load(name):
        return processor_of(resolved(run_of(checkpoint(name))))

    return load


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return cache(lambda name: AutoTokenizer.from_pretrained(checkpoint(name)))


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    random_image(60, 60, "RGB", np.random.default_rng(0)).save(path)
    return str(path)


# ---- chats to ids


@pytest.mark.parametrize("name", WITH_TEMPLATE)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), system=st.none() | TEXTS, image_at=st.integers(0, 3))
@settings(max_examples=30)
def test_a_chat_has_the_ids_of_hugging_faces_template(name, texts, system, image_at, processor, tokenizer, picture):
    messages = [{"role": "system", "content": system}] if system else []
    ours = list(messages)
    for n, text in enumerate(texts):
        role, parts = ("user", "assistant")[n % 2], [{"type": "text", "text": text}]
        messages.append({"role": role, "content": ([{"type": "image"}] if n == image_at else []) + parts})
        image = {"type": "image_url", "image_url": {"url": picture}}
        ours.append({"role": role, "content": ([image] if n == image_at else []) + parts})
    wanted = tokenizer(name).apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    request = processor(name).request({"messages": ours})
    assert list(request.ids) == wanted
    assert request.ids.count(processor(name).bos) == 1, "a second BOS"
    assert [request.ids[at] for at in request.positions] == [SPECS[name].vocab] * (image_at < len(texts))


@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_has_its_images_first_and_goes_through_the_template_if_there_is_one(
    name, processor, tokenizer, picture
):
    given = {"prompt": "Was ist das? 这是什么？", "images": [picture, picture]}
    assert list(processor(name).request(given).ids) == list(resolve(given, tokenizer(name))[0])
    by_chat = processor(name).chat(0, given["prompt"], given["images"])
    assert by_chat.ids == processor(name).request(given).ids


def test_every_way_to_write_an_image_part_is_read(processor, picture):
    parts = [
        {"type": "image", "image": picture},
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "image_url", "image_url": picture},
        {"type": "input_image", "image_url": picture},
        {"type": "image", "path": picture},
        {"type": "image_url", "image_url": {"url": "file://" + picture}},
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "compare"}]}]
    request = processor("base").request({"messages": messages})
    assert len(request.images) == len(request.positions) == len(parts)


def test_input_ids_are_used_exactly_as_given(processor, picture):
    image, embeddings = SPECS["base"].vocab, SPECS["base"].vocab + 8
    ids = [5, image, 7, embeddings - 1]
    request = processor("base").request({"input_ids": ids, "images": picture})
    assert list(request.ids) == ids and request.positions == (1,)


def test_relative_image_paths_are_also_resolved_from_the_requests_file(processor, picture, tmp_path):
    shutil.copy(picture, tmp_path / "beside.png")
    request = processor("base").request({"prompt": "x", "images": ["beside.png"]}, tmp_path)
    assert request.images[0].key == processor("base").request({"prompt": "x", "images": [picture]}).images[0].key


@pytest.mark.parametrize("name", SPECS)
def test_the_eos_ids_of_the_generation_config_and_the_ends_of_the_tokenizer_are_read(name, processor):
    assert processor(name).eos == SPECS[name].end_ids


@pytest.mark.parametrize(
    "request_, message",
    [
        ({}, "exactly one of messages, prompt, input_ids; this has none"),
        ({"prompt": "a", "input_ids": [1]}, "this has prompt, input_ids"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "  \n"}, "empty"),
        ({"prompt": 5}, "prompt must be a string, not int"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": "abc"}, "list of whole numbers"),
        ({"input_ids": [1.5]}, "whole numbers"),
        ({"input_ids": [True]}, "whole numbers"),
        ({"input_ids": [-1]}, "holds -1; ids run from 0 to"),
        ({"input_ids": [417]}, "holds 417; ids run from 0 to 416"),
        ({"messages": []}, "empty"),
        ({"messages": "hello"}, "^messages must be a list of {role, content} objects, not 'hello'"),
        ({"role": "user", "content": "x"}, "this is a message, not a request"),
        ({"promt": "x"}, "this has none, but unknown fields: 'promt'"),
        ({"messages": ["hello"]}, "message object"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty"),
        ({"messages": [{"role": "user"}]}, "content must be a string or a list"),
        ({"messages": [{"role": "cat", "content": "x"}]}, "role 'cat'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither a text nor an image part"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "text must be a string, not 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]},
            "needs its file path",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]}, "images beside messages"),
        ({"input_ids": [1, 409]}, "1 .* tokens for 0 images"),
        ({"prompt": "<|image|> what?"}, "1 .* tokens for 0 images"),
        ({"prompt": "x", "images": ["nowhere.png"]}, "nowhere.png.*does not exist"),
        ({"prompt": "x", "images": 3}, "images must be a list"),
        ({"prompt": "x", "images": [3]}, "images must be a list"),
        ({"prompt": "x", "images": ["https://example.com/a.png"]}, "web address"),
        ({"prompt": "x", "images": ["a" * 5000]}, "does not exist|can't be"),
        ({"input_ids": [1] * 301}, "has 301 ids, max_input_length=300"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"prompt": "x", "priority": 0.5}, "priority=0.5 must be a whole number"),
        ({"prompt": "x", "max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens=True"),
        ({"prompt": "x", "temperature": -1}, "temperature=-1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature='hot' must be a number"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature=nan"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature=inf"),
        ({"prompt": "x", "top_p": 0}, "top_p=0"),
        ({"prompt": "x", "top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"prompt": "x", "top_k": -1}, "top_k=-1"),
        ({"prompt": "x", "top_k": 2**70}, "top_k"),
        ({"prompt": "x", "logprobs": -1}, "logprobs=-1"),
        ({"prompt": "x", "stop": [""]}, "stop must be"),
        ({"prompt": "x", "stop": 7}, "stop must be"),
        ({"prompt": "x", "ignore_eos": "yes"}, "ignore_eos='yes' must be true or false"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_bad_request_is_refused_with_its_reason(request_, message, processor):
    with pytest.raises(UserError, match=message) as error:
        processor("base").request(request_)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- ids to text


# Starts, middles and ends of characters of one to four bytes, and a byte that UTF-8 never uses.
BYTES = [0x61, 0xC3, 0xA9, 0xE5, 0x9B, 0xBE, 0xF0, 0x9F, 0x98, 0x80, 0xFF]


def byte_id(tokenizer, byte: int) -> int:
    """The id of a single-byte token; byte-level BPE writes unprintable bytes as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [other for other in range(256) if other not in printable]
    return tokenizer.token_to_id(chr(byte if byte in printable else 0x100 + others.index(byte)))


def stream(processor, ids, stop=()):
    """(the deltas, the detokenizer) of ids one by one, up to a stop string."""
    text, deltas = processor.detokenizer(stop), []
    for id in ids:
        deltas.append(text.add(id))
        if text.stopped:
            break
    return [*deltas, text.flush()], text


@given(text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé图😀👩‍👩‍👧"))))
def test_characters_split_over_tokens_arrive_whole(text, processor):
    ids = processor("base").codec.tokenizer.encode(text, add_special_tokens=False).ids
    deltas, detokenizer = stream(processor("base"), ids)
    assert "".join(deltas) == detokenizer.text == processor("base").text(ids)
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in deltas), "half a character was shown"


@given(drawn=st.lists(st.sampled_from(BYTES) | st.integers(1000, 999 + SPECS["base"].vocab), max_size=12))
@settings(max_examples=300)
def test_the_streamed_text_of_any_ids_is_their_text_as_a_whole(drawn, processor):
    # A model, in particular one with random weights, can generate bytes that are not valid UTF-8.
    tokenizer = processor("base").codec.tokenizer
    ids = [byte_id(tokenizer, value) if value < 256 else value - 1000 for value in drawn]
    deltas, detokenizer = stream(processor("base"), ids)
    assert "".join(deltas) == detokenizer.text == processor("base").text(ids)


@given(
    text=st.text(alphabet="ab图c ", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="ab图c ", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300)
def test_a_stop_string_across_tokens_ends_the_text_and_is_never_shown(text, stops, processor):
    letters = [processor("base").codec.tokenizer.encode(c, add_special_tokens=False).ids for c in text]
    ids = [id for letter in letters for id in letter]
    deltas, detokenizer = stream(processor("base"), ids, stops)
    # Letters arrive one at a time; the first prefix that contains a stop string ends the text.
    prefix = next((text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    wanted = text if prefix is None else prefix[: min(prefix.find(stop) for stop in stops if stop in prefix)]
    assert detokenizer.stopped == (prefix is not None)
    assert "".join(deltas) == detokenizer.text == wanted


@given(text=st.text(alphabet="abc", max_size=30), stop=st.text(alphabet="abc", min_size=2, max_size=4))
def test_no_more_is_held_back_than_the_start_of_a_stop_string(text, stop):
    detokenizer, shown = Detokenizer(chr, lambda ids: "".join(map(chr, ids)), [stop]), ""
    for n, letter in enumerate(text, start=1):
        shown += detokenizer.add(ord(letter))
        if detokenizer.stopped:
            return
        held = text[len(shown) : n]
        assert text.startswith(shown) and stop.startswith(held) and len(held) < len(stop)


def test_ids_that_a_tokenizer_cannot_stream_become_text_at_the_end():
    def step(id):
        raise Exception("invalid prefix")

    detokenizer = Detokenizer(step, lambda ids: "".join(map(chr, ids)), [])
    assert [detokenizer.add(ord("a")), detokenizer.add(ord("b")), detokenizer.flush()] == ["", "", "ab"]


# ---- a checkpoint's files

# The tokenizers library panics where a merge is shorter than the prefix: its exception is no Exception.
PANICKING = json.dumps(
    {"model": {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}
)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "tokenizer.json can't be read"),
        ("tokenizer.json", PANICKING, r"tokenizer.json can't be read: slice index starts at \d+ but ends at \d+\.$"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("chat_template.jinja", "{% if %}", "chat template is not valid"),
        (
            "preprocessor_config.json",
            '{"max_image_tiles": 2, "size": {"height": 56, "width": 56}}',
            "up to 2 tiles of 56 px",
        ),
    ],
)
def test_a_damaged_file_is_named(file, content, message, checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("base"), folder)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    run = resolved(run_of(folder))
    with pytest.raises(UserError, match=message):
        processor_of(run)


@pytest.mark.parametrize(
    "where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json"]
)
def test_the_template_is_found_in_each_of_its_places(where, checkpoint, tmp_path, processor):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("no_template"), folder)
    if where.endswith(".jinja"):
        (folder / where).write_text(CHAT_TEMPLATE)
    else:
        known = json.loads((folder / where).read_text()) if (folder / where).exists() else {}
        (folder / where).write_text(json.dumps(known | {"chat_template": CHAT_TEMPLATE}))
    ids = processor_of(resolved(run_of(folder))).chat(0, "hello").ids
    header = SPECS["no_template"].special_id("<|start_header_id|>")
    assert ids.count(header) == 2


def test_a_template_that_refuses_is_the_users_error(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("no_template"), folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only one user message, please') }}")
    processor = processor_of(resolved(run_of(folder)))
    with pytest.raises(UserError, match="refuses these messages: only one user message, please"):
        processor.chat(0, "hello")
