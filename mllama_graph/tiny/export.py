"""Export a training checkpoint as an mllama checkpoint folder in the released format."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mllama_graph.core.report import write_json
from mllama_graph.tiny.layers import Shape
from mllama_graph.tiny.tiling import CLIP_MEAN, CLIP_STD, MAX_TILES, TILE
from mllama_graph.tiny.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    EOM,
    EOT,
    IMAGE,
    PAD,
    VOCABULARY,
    encode,
    tokenizer,
)

MAX_POSITIONS = 1024


def token_ids() -> dict[str, int]:
    """Ids of the special tokens that the configuration files name."""
    return {t: encode(t)[0] for t in (BOS, EOT, END_OF_TEXT, EOM, PAD, IMAGE)}


def model_config(s: Shape) -> dict[str, Any]:
    """The content of config.json, with the fields of a released checkpoint."""
    ids, v = token_ids(), s.vision
    text = dict(
        model_type="mllama_text_model",
        vocab_size=VOCABULARY,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        intermediate_size=s.mlp,
        hidden_act="silu",
        cross_attention_layers=list(s.cross_layers),
        rms_norm_eps=s.norm_eps,
        rope_theta=s.rope_theta,
        rope_scaling=dict(rope_type="default"),
        max_position_embeddings=MAX_POSITIONS,
        dropout=0,
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=ids[BOS],
        eos_token_id=[ids[END_OF_TEXT], ids[EOM], ids[EOT]],
        pad_token_id=ids[PAD],
        torch_dtype="bfloat16",
    )
    vision = dict(
        model_type="mllama_vision_model",
        hidden_size=v.width,
        attention_heads=v.heads,
        intermediate_size=v.mlp,
        num_hidden_layers=v.layers,
        num_global_layers=v.global_layers,
        intermediate_layers_indices=list(v.features),
        vision_output_dim=v.out_width,
        image_size=v.tile,
        patch_size=v.patch,
        num_channels=v.channels,
        max_num_tiles=v.max_tiles,
        supported_aspect_ratios=[list(r) for r in v.aspect_ratios],
        hidden_act="gelu",
        norm_eps=v.eps,
        initializer_range=0.02,
        torch_dtype="bfloat16",
    )
    return dict(
        architectures=["MllamaForConditionalGeneration"],
        model_type="mllama",
        image_token_index=ids[IMAGE],
        text_config=text,
        vision_config=vision,
        torch_dtype="bfloat16",
    )


def checkpoint_name(name: str) -> str:
    """The name of a weight in the released checkpoints."""
    for ours, theirs in (
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise ValueError(f"{name} is not a weight of this model.")


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.json."""
    tokenizer().save(str(folder / "tokenizer.json"))
    added = {
        str(i): dict(
            content=t.content,
            lstrip=t.lstrip,
            normalized=t.normalized,
            rstrip=t.rstrip,
            single_word=t.single_word,
            special=t.special,
        )
        for i, t in sorted(tokenizer().get_added_tokens_decoder().items())
    }
    named = dict(bos_token=BOS, eos_token=EOT, pad_token=PAD)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "chat_template.json", dict(chat_template=CHAT_TEMPLATE))
    write_json(
        folder / "tokenizer_config.json",
        dict(
            added_tokens_decoder=added,
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=MAX_POSITIONS,
            tokenizer_class="PreTrainedTokenizerFast",
            **named,
        ),
    )


def write_processing(folder: Path) -> None:
    """Write preprocessor_config.json and generation_config.json."""
    write_json(
        folder / "preprocessor_config.json",
        dict(
            do_convert_rgb=True,
            do_normalize=True,
            do_pad=True,
            do_rescale=True,
            do_resize=True,
            image_mean=list(CLIP_MEAN),
            image_std=list(CLIP_STD),
            image_processor_type="MllamaImageProcessor",
            max_image_tiles=MAX_TILES,
            resample=2,
            rescale_factor=1 / 255,
            size=dict(height=TILE, width=TILE),
            processor_class="MllamaProcessor",
        ),
    )
    ids = token_ids()
    write_json(
        folder / "generation_config.json",
        dict(
            bos_token_id=ids[BOS],
            eos_token_id=[ids[END_OF_TEXT], ids[EOM], ids[EOT]],
            pad_token_id=ids[PAD],
            do_sample=False,
            max_new_tokens=64,
        ),
    )


def export(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a checkpoint of these weights, rounded to bfloat16; replaces `folder`."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {checkpoint_name(k): v.to(torch.bfloat16).contiguous() for k, v in weights.items()}
    save_file(tensors, part / "model.safetensors", metadata=dict(format="pt"))
    write_json(part / "config.json", model_config(Shape()))
    write_tokenizer(part)
    write_processing(part)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str]) -> None:
    """Export the moving average of the weights of a training checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a training run")
    parser.add_argument("folder", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    export(torch.load(args.checkpoint)["average"], args.folder)
    size = sum(p.stat().st_size for p in args.folder.iterdir())
    print(f"{args.folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
