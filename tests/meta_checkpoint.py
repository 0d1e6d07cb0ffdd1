"""Writes a small checkpoint in Meta's own format: the inverse of transformers' conversion, from Hugging Face weights.

Names, layouts and the split over files follow llama_models 0.3.0 (llama3/multimodal/model.py, checkpoint.py); this
file imports nothing of the engine.
"""

import base64
import json
from dataclasses import replace

import torch
from checkpoints import SPECS, Spec, random_weights
from tokenizers import Tokenizer

# Meta's vision tower has sizes that params.json does not say: 16 heads, five layers that join the output.
META = replace(
    SPECS["base"],
    hidden=128, heads=4, kv_heads=2, mlp=256, layers=10, cross_layers=[3, 8], text_vocab=600,
    vision_hidden=64, vision_heads=16, vision_mlp=256, vision_layers=32, global_layers=8,
    intermediate=[3, 7, 15, 23, 30], tile_size=28, patch_size=14, max_tiles=4, seed=31,
)  # fmt: skip
# Weights that Meta splits by columns (outputs) and by rows (inputs).
COLUMN = (
    "wq",
    "wk",
    "wv",
    "w1",
    "w3",
    "c_fc",
    "_linear",
    "tok_embeddings",
    "learnable_embedding",
    "output",
    "projection",
)
ROW = ("wo.weight", "w2.weight", "c_proj.weight")
ENCODER = "vision_model.vision_encoder."


def params(spec: Spec) -> dict:
    """params.json with the keys of Llama-3.2-11B-Vision."""
    return {
        "dim": spec.hidden, "n_layers": spec.layers - len(spec.cross_layers), "n_heads": spec.heads,
        "n_kv_heads": spec.kv_heads, "vocab_size": spec.vocab, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
        "norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope_theta, "use_scaled_rope": spec.rope_scaling is not None,
        "vision_chunk_size": spec.tile_size, "vision_max_num_chunks": spec.max_tiles,
        "vision_num_cross_attention_layers": len(spec.cross_layers),
    }  # fmt: skip


def meta_weights(spec: Spec, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Meta's tensors, and `weights` with the position embeddings made consistent: Meta has one per place of a tile."""
    text, vision, out = "model.language_model.", "model.vision_model.", {}
    parts = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "cross_attn.q_proj": "attention.wq", "cross_attn.k_proj": "attention.wk",
        "cross_attn.v_proj": "attention.wv", "cross_attn.o_proj": "attention.wo",
        "cross_attn.q_norm": "attention.q_norm", "cross_attn.k_norm": "attention.k_norm",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "cross_attn_attn_gate": "gate_attn", "cross_attn_mlp_gate": "gate_ffwd",
    }  # fmt: skip
    vision_parts = {
        "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv",
        "self_attn.o_proj": "attn.wo", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2", "gate_attn": "gate_attn", "gate_ffn": "gate_ffn",
    }  # fmt: skip
    own, cross = [i for i in range(spec.layers) if i not in spec.cross_layers], spec.cross_layers
    for name, value in weights.items():
        if name.startswith(text + "layers."):
            layer, part = name.removeprefix(text + "layers.").split(".", 1)
            stem, leaf = (part[:-7], ".weight") if part.endswith(".weight") else (part, "")
            stack = (
                f"cross_attention_layers.{cross.index(int(layer))}"
                if int(layer) in cross
                else f"layers.{own.index(int(layer))}"
            )
            if part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                # Meta rotates dimensions 2i and 2i + 1 of a head, Hugging Face i and i + H / 2.
                head = spec.hidden // spec.heads
                value = value.view(-1, 2, head // 2, spec.hidden).transpose(1, 2).reshape(value.shape)
            out[f"text_model.{stack}.{parts[stem]}{leaf}"] = value
        elif ".layers." in name:
            stack, layer, part = name.removeprefix(vision).replace(".layers.", "|").replace(".", "|", 1).split("|")
            stem, leaf = next((part.removesuffix(end), end) for end in (".weight", ".bias", "") if part.endswith(end))
            out[f"{ENCODER}{stack}.resblocks.{layer}.{vision_parts[stem]}{leaf}"] = value
    out["text_model.norm.weight"] = weights[text + "norm.weight"]
    out["text_model.output.weight"] = weights["lm_head.weight"]
    embedding = weights[text + "embed_tokens.weight"]
    out["text_model.tok_embeddings.weight"], out["text_model.learnable_embedding.weight"] = embedding.split(
        [spec.vocab, 8]
    )
    out["text_model.rope.freqs"] = torch.ones(4)
    for leaf in ("weight", "bias"):
        out[f"vision_model.vision_projection.{leaf}"] = weights[f"model.multi_modal_projector.{leaf}"]
        for place in ("pre", "post"):
            out[f"{ENCODER}ln_{place}.{leaf}"] = weights[f"{vision}layernorm_{place}.{leaf}"]
    out[ENCODER + "class_embedding"] = weights[vision + "class_embedding"]
    out[ENCODER + "conv1._linear.weight"] = weights[vision + "patch_embedding.weight"].flatten(1)
    position = vision + "gated_positional_embedding."
    out[ENCODER + "positional_embedding"] = weights[position + "embedding"]
    out[ENCODER + "gated_positional_embedding_gate"] = weights[position + "gate"]
    tiles, tokens = spec.max_tiles, (spec.tile_size // spec.patch_size) ** 2 + 1
    places = {position + "tile_embedding.weight": ("gated_positional_embedding", tokens)}
    for place in ("pre", "post"):
        name = f"{vision}{place}_tile_positional_embedding."
        out[f"{ENCODER}{place}_tile_pos_embed.gate"] = weights[name + "gate"]
        places[name + "embedding.weight"] = (f"{place}_tile_pos_embed.embedding", 1)
    for name, (meta, length) in places.items():
        # A table (aspect ratio, tile) is made from one value per (row, column): what conversion to Hugging Face does.
        grid = torch.randn(tiles, tiles, length, spec.vision_hidden, generator=torch.Generator().manual_seed(length))
        out[ENCODER + meta] = grid
        table = torch.zeros(len(spec.aspect_ratios) + 1, tiles, length, spec.vision_hidden)
        for id, (height, width) in enumerate(spec.aspect_ratios, start=1):
            table[id, : height * width] = grid[:height, :width].reshape(height * width, length, -1)
        weights[name] = table.flatten(1)
    return out


def shard(tensors: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """The tensors of each of `count` model-parallel ranks."""

    def part(name, value, rank):
        axis = 1 if name.endswith(ROW) else 0 if any(key in name for key in COLUMN) and "c_proj" not in name else None
        return value if axis is None else value.chunk(count, axis)[rank].clone()

    return [{name: part(name, value, rank) for name, value in tensors.items()} for rank in range(count)]


def write_meta(folder, spec: Spec = META, shards: int = 1) -> dict[str, torch.Tensor]:
    """Write params.json and the .pth files. Returns the Hugging Face weights that they are equal to."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(spec)
    tensors = meta_weights(spec, weights)
    (folder / "params.json").write_text(json.dumps(params(spec)))
    for rank, part in enumerate(shard(tensors, shards)):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    return weights


def write_tokenizer_model(tokenizer: Tokenizer, folder, count: int) -> None:
    """Write the first `count` entries of a byte-level BPE tokenizer as tokenizer.model: base64 of bytes, and rank."""
    # The printable characters that byte-level BPE writes for bytes (GPT-2's table).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    characters |= {chr(256 + i): byte for i, byte in enumerate(others)}
    lines = []
    for id in range(count):
        token = bytes(characters[character] for character in tokenizer.id_to_token(id))
        lines.append(f"{base64.b64encode(token).decode()} {id}\n")
    (folder / "tokenizer.model").write_text("".join(lines))
