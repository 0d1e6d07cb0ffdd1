"""The language model that other engines are given. The oracle is transformers: its plain Llama, and its mllama."""

import json

import numpy as np
import pytest
import torch
from checkpoints import SPECS, write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MllamaForConditionalGeneration

from mllama_graph.measure.peers.export import NAMES, PROOF, export_text
from mllama_graph.model.meta_files import open_checkpoint


def plain_llama(folder):
    """transformers' model of an exported folder, and its description."""
    text = json.loads((folder / "text.json").read_text())
    config = LlamaConfig(
        vocab_size=text["vocab"],
        hidden_size=text["width"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        num_key_value_heads=text["kv_heads"],
        head_dim=text["head_width"],
        intermediate_size=text["mlp"],
        rms_norm_eps=text["eps"],
        max_position_embeddings=text["positions"],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    ends, state = {short: name for name, short in NAMES.items()}, {}
    for file in folder.glob("*.npy"):
        *layer, name = file.stem.split(".")
        values = np.load(file)
        tensor = torch.from_numpy(values)
        tensor = tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
        state["".join(f"model.layers.{number}." for number in layer) + ends[name]] = tensor.float()
    model.load_state_dict(state)
    model.model.rotary_emb.inv_freq = torch.tensor(text["rope"]["inv_freq"])
    return model, text


@pytest.mark.parametrize("name", ["cross_first", "half"])
def test_an_exported_language_model_is_a_plain_llama(name, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", SPECS[name])
    (tmp_path / "out").mkdir()
    shape = open_checkpoint(tmp_path / "checkpoint").shape
    folder = export_text(shape, tmp_path / "checkpoint", tmp_path / "out")
    ids = torch.arange(40)[None] * 7 % shape.text.vocab
    whole = MllamaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    with torch.inference_mode():
        model, _ = plain_llama(folder)
        found, wanted = model(ids).logits, whole(input_ids=ids).logits
        # Two implementations in fp32; logits are of the order of 1.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        small, proof = plain_llama(folder / PROOF)
        prompt = torch.tensor(proof["ids"])
        written = small.generate(
            prompt, max_new_tokens=len(proof["tokens"][0]), do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert written[:, prompt.shape[1] :].tolist() == proof["tokens"]
