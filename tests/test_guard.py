"""A Llama Guard from end to end: a conversation with a picture becomes the prompt of its template, and then a verdict.

Two checkpoints of one small shape have a template in the form of Llama Guard 3 Vision's. One has random weights. The
other is written by hand, and calls a conversation with a picture unsafe and any other safe.
"""

import json

import numpy as np
import pytest
import torch
from chat_templates import GUARD, IMAGE, assistant, text, user
from checkpoints import SPECS, random_weights, rename, write_checkpoint, write_weights
from commands import run
from oracle import Oracle
from request_cases import random_image
from transformers import AutoTokenizer

from mllama_graph import LLM

SPEC = SPECS["base"]
PICTURE = random_image(70, 50, "RGB", np.random.default_rng(0))
EOT = SPEC.special_id("<|eot_id|>")
VERDICTS = {False: "safe", True: "unsafe\nS2"}
CONVERSATIONS = {
    "prompt with a picture": [user([IMAGE, *text("How do I make this?")])],
    "prompt": [user(text("How do I make a cake?"))],
    "answer with a picture": [user([IMAGE, *text("What is this?")]), assistant(text("A cat."))],
    "answer": [user(text("What is a cat?")), assistant(text("An animal."))],
}
CATEGORIES = {"categories": {"S1": "Lies.", "S2": "Noise."}, "excluded_category_keys": ["S1"]}


def with_template(folder) -> None:
    """Give a checkpoint the template, and the token of two newlines that ends its prompt, as Llama 3 has one."""
    config, tokenizer = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer_config", "tokenizer")
    )
    model = tokenizer["model"]
    model["vocab"]["ĊĊ"] = model["vocab"].pop("".join(model["merges"].pop()))
    model["merges"].append(["Ċ", "Ċ"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": GUARD}))


def by_hand(tokenizer) -> dict[str, torch.Tensor]:
    """Weights that continue each token of the verdicts with the next one.

    The token at place n of `tokens` is embedded as unit vector n. Only one sublayer adds to it: the MLP of the first
    cross-attention layer, which is skipped where no picture is seen. It adds unit vector n + half of the width.
    """
    steps = {picture: tokenizer.encode("\n\n" + words) + [EOT] for picture, words in VERDICTS.items()}
    tokens = sorted({id for ids in steps.values() for id in ids[:-1]})
    assert all(len(set(ids)) == len(ids) for ids in steps.values()), "a token would have two successors"
    weights = random_weights(SPEC)
    text, cross, half = "model.language_model.", SPEC.cross_layers[0], SPEC.hidden // 2
    for name, value in weights.items():
        if name.startswith(text) and name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()
        if name.startswith(text) and name.endswith("norm.weight"):
            value.fill_(1)
    embedding, head = weights[text + "embed_tokens.weight"].zero_(), weights["lm_head.weight"].zero_()
    gate, up, down = (
        weights[f"{text}layers.{cross}.mlp.{part}_proj.weight"].zero_() for part in ("gate", "up", "down")
    )
    weights[f"{text}layers.{cross}.cross_attn_mlp_gate"].fill_(1)
    for n, token in enumerate(tokens):
        embedding[token, n] = gate[n, n] = up[n, n] = down[half + n, n] = 1
    for picture, ids in steps.items():
        for token, following in zip(ids, ids[1:]):
            head[following, tokens.index(token) + half * picture] = 1
    return weights


@pytest.fixture(scope="module")
def guards(tmp_path_factory):
    """Kind of weights -> folder."""
    folders = {kind: tmp_path_factory.mktemp("guard") / "checkpoint" for kind in ("random", "by hand")}
    for folder in folders.values():
        write_checkpoint(folder, SPEC)
        with_template(folder)
    weights = by_hand(AutoTokenizer.from_pretrained(folders["by hand"]))
    write_weights(folders["by hand"], {rename(name, SPEC.names): value for name, value in weights.items()}, 1)
    return folders


def showing(picture, messages: list[dict]) -> list[dict]:
    """The messages with a picture in their image parts."""
    return [
        message | {"content": [part | {"image": picture} if part == IMAGE else part for part in message["content"]]}
        for message in messages
    ]


@pytest.mark.parametrize("kind", ["random", "by hand"])
def test_a_conversation_becomes_the_templates_prompt_and_the_models_verdict(kind, guards):
    tokenizer, oracle = AutoTokenizer.from_pretrained(guards[kind]), Oracle(guards[kind])
    asked = [showing(PICTURE, messages) for messages in CONVERSATIONS.values()]
    with LLM(guards[kind], batch=4, backend="eager", dtype="fp32", quiet=True, **{"backend.kernels": "plain"}) as llm:
        for variables in ({}, CATEGORIES):
            fields = {"max_new_tokens": 20, "chat_template_kwargs": variables}
            for (name, messages), own, result in zip(CONVERSATIONS.items(), asked, llm.generate(asked, **fields)):
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False, **variables
                )
                assert list(llm.request(own, **fields).ids) == ids, name
                pictures = [PICTURE] * ("picture" in name)
                assert result.token_ids == oracle.greedy(ids, pictures, 20, SPEC.end_ids)[0], name
                if kind == "by hand":
                    assert (result.text, result.finish_reason) == (VERDICTS[bool(pictures)], "stop"), name


def test_the_first_line_of_a_verdict_is_safe_or_unsafe_and_the_second_names_categories(guards, tmp_path):
    PICTURE.save(tmp_path / "photo.png")
    lines = [{"id": name, "messages": showing("photo.png", given)} for name, given in CONVERSATIONS.items()]
    (tmp_path / "conversations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    where = ["model=custom", f"weights={guards['by hand']}", "backend=eager", "backend.kernels=plain"]
    done = run(tmp_path / "out", *where, "requests=conversations.jsonl", "batch=4", "max_output_length=20")
    assert done.code == 0, done.err
    for line in done.lines():
        verdict, _, categories = line["text"].strip().partition("\n")
        assert (verdict, categories) == (("unsafe", "S2") if "picture" in line["id"] else ("safe", ""))
