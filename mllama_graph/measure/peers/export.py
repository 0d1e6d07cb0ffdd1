"""The language model without cross-attention, in files for engines of plain Llama models, and a proof of their reading.

Without an image the cross-attention layers change nothing, so such an engine must generate the same tokens.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mllama_graph.model.inputs import PromptInput
from mllama_graph.model.meta_files import open_checkpoint
from mllama_graph.model.placement import Placement
from mllama_graph.model.reading import DTYPES
from mllama_graph.model.shape import ModelShape
from mllama_graph.model.table import table
from mllama_graph.model.text import prefill
from mllama_graph.model.tree import Fill, Pixels, TextWeights, build, inverse_frequencies
from mllama_graph.model.weights import from_checkpoint, random_fill
from mllama_graph.ops.plain import PLAIN

# What the language model's tensors are called in the files, by the ends of their names.
NAMES = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
PROOF = "proof"
PROOF_VOCAB, PROOF_PROMPTS, PROOF_LENGTH, PROOF_NEW = 512, 2, 24, 12


def export_text(shape: ModelShape, checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint's language model to `folder` in its stored dtype, and to `folder`/proof a small model.

    The small one has the rotary embedding, head width and group size of `shape`, random weights, and in its text.json
    also prompts ("ids") and the tokens that this engine generates from them greedily in fp32 ("tokens").
    """
    files = open_checkpoint(checkpoint)
    _write(shape, from_checkpoint(files), files.stored, folder)
    small = _small(shape)
    fill = random_fill(small, 0, torch.float32)
    _write(small, fill, "fp32", folder / PROOF)
    ids = np.random.default_rng(0).integers(0, small.text.vocab, (PROOF_PROMPTS, PROOF_LENGTH)).tolist()
    pixels = Pixels(1.0, (0.0,) * small.vision.channels, (1.0,) * small.vision.channels)
    place = Placement.at(torch.device("cpu"))
    weights = build(small, pixels, torch.float32, place, fill, lambda count: None).text
    proof = {"ids": ids, "tokens": [_greedy(weights, prompt, small) for prompt in ids]}
    path = folder / PROOF / "text.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | proof))
    return folder


def _write(shape: ModelShape, fill: Fill, store: str, folder: Path) -> None:
    """Write text.json, and one .npy file per tensor: `embed.npy`, `0.q.npy` and so on; bf16 as uint16."""
    folder.mkdir(exist_ok=True)
    text = shape.text
    dtype = DTYPES[store.replace("fp", "F").upper()]
    for entry in table(shape):
        name = entry.name.removeprefix("language_model.")
        if name == entry.name:
            continue
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        end = name.removeprefix(f"model.layers.{layer}.")
        if end not in NAMES or (layer and int(layer) in text.cross_layers):
            continue
        number = f"{text.self_layers.index(int(layer))}." if layer else ""
        # The embedding has rows beyond the vocabulary, of the image token and others, which no text contains.
        rows = text.vocab if NAMES[end] == "embed" else entry.shape[0]
        values = torch.empty((rows, *entry.shape[1:]), dtype=dtype)
        fill(entry, values, (slice(0, rows), *(slice(0, size) for size in entry.shape[1:])))
        np.save(folder / f"{number}{NAMES[end]}.npy", _array(values))
    rope = {"theta": text.rope.theta, "inv_freq": inverse_frequencies(text.rope, text.head_width).tolist()}
    described = asdict(text) | {"layers": len(text.self_layers), "cross_layers": [], "rope": rope}
    (folder / "text.json").write_text(json.dumps(described))


def _array(values: Tensor) -> np.ndarray:
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _small(shape: ModelShape) -> ModelShape:
    """A model of a few layers that has the head width, the group size and the rotary embedding of `shape`."""
    text, vision = shape.text, shape.vision
    width = 4 * text.head_width
    return replace(
        shape,
        text=replace(
            text,
            vocab=min(text.vocab, PROOF_VOCAB),
            width=width,
            layers=4,
            heads=2 * shape.group,
            kv_heads=2,
            mlp=2 * width,
            cross_layers=(2,),
        ),
        vision=replace(vision, width=8, heads=1, layers=1, global_layers=1, mlp=8, tile=vision.patch, features=(0,)),
        embeddings=PROOF_VOCAB,
    )


def _greedy(weights: TextWeights, prompt: list[int], shape: ModelShape) -> list[int]:
    """Generate greedily, with the whole text as one prompt for each token."""
    ids = list(prompt)
    page = (1, PROOF_LENGTH + PROOF_NEW, shape.text.kv_heads, shape.text.head_width)
    pages = tuple((torch.zeros(page), torch.zeros(page)) for _ in shape.text.self_layers)
    for _ in range(PROOF_NEW):
        row_T = torch.arange(len(ids), dtype=torch.int32)
        one_1, count_1 = torch.ones(1, dtype=torch.int32), row_T[-1:] + 1
        given = PromptInput(
            torch.tensor(ids, dtype=torch.int32),
            position_T=row_T,
            slot_T=row_T,
            last_B=row_T[-1:],
            real_1=count_1,
            outputs_1=one_1,
            decoding_1=one_1 - 1,
            rows_B=count_1,
            past_B=one_1 - 1,
            table_BJ=None,
            image=None,
        )
        ids.append(int(prefill(weights, given, pages, (), shape, torch.float32, PLAIN).argmax()))
    return ids[PROOF_LENGTH:]
