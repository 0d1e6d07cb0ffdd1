"""Meta's own format: every weight equals that of the Hugging Face checkpoint it was made from."""

import base64
import json
import pickle

import pytest
import torch
from checkpoints import image_config, model_config, rename, write_weights
from engines import start, tokens_of
from meta_checkpoint import META, write_meta, write_tokenizer_model
from PIL import Image
from tokenizer_files import write_json, write_tokenizer
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from trees import grouped, joined, parameter, same_as_state, tree

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.tiktoken import SPECIAL_TOKENS, tokenizer_of
from mllama_graph.model.meta_files import MetaFiles, open_checkpoint
from mllama_graph.model.shape import shape_of
from mllama_graph.model.table import Shard

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module", params=[1, 2])
def meta(request, tmp_path_factory):
    """(folder in one or two files, the Hugging Face weights that it is equal to)."""
    folder = tmp_path_factory.mktemp("meta")
    return folder, write_meta(folder, shards=request.param)


def test_the_shape_is_read_from_params_json_and_the_tensors(meta):
    assert open_checkpoint(meta[0]).shape == shape_of(model_config(META))
    assert open_checkpoint(meta[0]).stored == "fp32"


def test_every_weight_is_hugging_faces_on_one_rank_and_on_two(meta):
    folder, weights = meta
    shape, whole = open_checkpoint(folder).shape, tree(folder)
    same_as_state(whole, shape, weights, **EXACT)
    parts = [tree(folder, shard=Shard(rank, 2)) for rank in range(2)]
    for path, entries in grouped(shape).items():
        assert torch.equal(joined([parameter(part, path) for part in parts], entries, 2), parameter(whole, path)), path


def test_the_files_survive_the_way_to_another_process(meta):
    again = pickle.loads(pickle.dumps(open_checkpoint(meta[0])))
    assert isinstance(again, MetaFiles) and again.shape == open_checkpoint(meta[0]).shape
    again.verify()


def edited(folder, **keys):
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def resaved(folder, change):
    path = folder / "consolidated.00.pth"
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


NORM = "text_model.layers.1.ffn_norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: edited(f, dim="wide"), "params.json: dim is 'wide'; it must be a whole number"),
        (lambda f: edited(f, n_layers=9), "tensors missing: text_model.layers.8"),
        (lambda f: edited(f, vision_num_cross_attention_layers=None), "cross_attention_layers is null"),
        (lambda f: edited(f, vision_chunk_size=42), r"positional_embedding is \[5, 64\], expected \[10, 64\]"),
        (lambda f: (f / "params.json").write_bytes(b"\xff"), "params.json is not valid JSON"),
        (lambda f: resaved(f, lambda t: t.pop(NORM)), f"1 tensors missing: {NORM}"),
        (lambda f: resaved(f, lambda t: t.update({NORM: torch.ones(5)})), rf"{NORM} is \[5\], expected \[128\]"),
        (lambda f: resaved(f, lambda t: t.update(extra=torch.ones(5))), "1 tensors unexpected: extra"),
        (lambda f: resaved(f, lambda t: t.update({NORM: torch.ones(128).to(torch.int8)})), "is stored as I8"),
        (lambda f: (f / "consolidated.00.pth").write_bytes(b"PK no zip"), "is no zip archive"),
        (lambda f: (f / "consolidated.00.pth").rename(f / "consolidated.01.pth"), "a file is missing"),
        (lambda f: torch.save(torch.nn.Linear(2, 2), f / "consolidated.00.pth"), "holds more than tensors: torch.nn"),
        (lambda f: torch.save([torch.ones(2)], f / "consolidated.00.pth"), "holds a list, not tensors by name"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, change, message):
    write_meta(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        tree(tmp_path)


class Executed:
    def __reduce__(self):
        return open, ("executed", "w")


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path)
    resaved(tmp_path, lambda tensors: tensors.update(extra=Executed()))
    with pytest.raises(UserError, match="holds more than tensors: .*open"):
        tree(tmp_path)
    assert not (tmp_path / "executed").exists()


# ---- tokenizer.model

# Meta's tokenizer has 256 special tokens; the rest of the vocabulary are byte-level tokens.
TOKENS = META.vocab - 256
TEXTS = [
    "What is this?",
    "Compare the two images: 1234567 and  more\n\n",
    "图里有什么？ 🙂 naïve\r\n\t end",
    "",
    "I'LL we've",
]


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """(tokenizer.model, the byte-level tokenizer that it lists)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, TOKENS, None)
    trained = Tokenizer.from_file(str(folder / "tokenizer.json"))
    write_tokenizer_model(trained, folder, TOKENS)
    return folder / "tokenizer.model", trained


class Converter(TikTokenConverter):
    """transformers' conversion, without the package tiktoken, which only reads the file."""

    @staticmethod
    def load_tiktoken_bpe(path):
        lines = (line.split() for line in open(path))
        return {base64.b64decode(token): int(rank) for token, rank in lines}


def test_a_converted_tokenizer_encodes_as_the_original_and_as_transformers_conversion(tokenizer_model):
    path, trained = tokenizer_model
    ours, theirs = tokenizer_of(path), Converter(vocab_file=str(path)).converted()
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert (
            ids
            == theirs.encode(text, add_special_tokens=False).ids
            == trained.encode(text, add_special_tokens=False).ids
        )
        assert ours.decode(ids) == text
    for place, token in enumerate(SPECIAL_TOKENS):
        assert ours.encode(f"{token}a", add_special_tokens=False).ids[0] == TOKENS + place
    assert ours.token_to_id("<|image|>") == META.vocab


@pytest.mark.parametrize("content", ["AA== x\n", "!!! 0\n", "AA== 0\n", "one two three\n", "AA== 0\nAQ== 0\n"])
def test_a_damaged_tokenizer_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(UserError, match="tokenizer.model (can't be read: line 1|is damaged)"):
        tokenizer_of(tmp_path / "tokenizer.model")


def test_metas_folder_gives_hugging_faces_tokens(tokenizer_model, tmp_path):
    weights, meta, hf = write_meta(tmp_path / "meta", shards=2), tmp_path / "meta", tmp_path / "hf"
    (meta / "tokenizer.model").write_bytes(tokenizer_model[0].read_bytes())
    hf.mkdir()
    write_json(hf / "config.json", model_config(META))
    write_json(hf / "preprocessor_config.json", image_config(META))
    write_weights(hf, {rename(name, "legacy"): value for name, value in weights.items()}, 1)
    tokenizer_of(tokenizer_model[0]).save(str(hf / "tokenizer.json"))
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "noise.png")
    lines = [
        {"id": "text", "prompt": "What is this?"},
        {"id": "image", "prompt": "What do you see?", "images": [str(tmp_path / "noise.png")]},
    ]
    lines = [line | {"ignore_eos": True, "max_new_tokens": 12} for line in lines]
    found = tokens_of(start(meta), lines)
    assert found == tokens_of(start(hf), lines) and all(len(set(ids)) > 2 for ids in found.values())
