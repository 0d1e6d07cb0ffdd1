"""Small random mllama checkpoints in the released Hugging Face layout.

They differ only in the fields of a `Spec`; together `SPECS` cover the variants that a config.json allows.
Weights are scaled so that greedy text is varied, images change it, and every gate, norm, bias and
tile embedding matters: HF's own initialisation zeroes the gates, which would hide the vision tower from tests.

The names and shapes follow transformers 5.23 `models/mllama/modeling_mllama.py`; this file imports neither
transformers nor the engine, so that both are tested against it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizer_files import SPECIAL_TOKENS, write_json, write_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@dataclass(frozen=True)
class Spec:
    """One architecture and the way its checkpoint is written."""

    # text
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    layers: int
    cross_layers: list[int]
    # vision
    vision_hidden: int
    vision_heads: int
    vision_mlp: int
    vision_layers: int
    global_layers: int
    intermediate: list[int]
    tile_size: int
    patch_size: int
    max_tiles: int
    # files
    dtype: str = "float32"
    names: str = "new"  # "new" or "legacy"
    rope_style: str = "rope_parameters"  # or "rope_scaling", with rope_theta beside it
    rope_scaling: dict | None = field(default_factory=lambda: dict(LLAMA3_SCALING))
    rope_theta: float = 500000.0
    shards: int = 1
    text_vocab: int = 400  # byte-level entries and merges, without the special tokens
    eos: list[str] | str = field(default_factory=lambda: ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    template: str | None = "tokenizer_config"  # or "jinja" (a file of its own), or None
    tie_word_embeddings: bool = False  # mllama ignores it; the stored head must be used
    rms_norm_eps: float = 1e-5
    vision_norm_eps: float = 1e-5  # of the layers; layernorm_pre and layernorm_post keep 1e-5
    max_positions: int = 131072
    text_act: str = "silu"
    vision_act: str = "gelu"
    seed: int = 0

    @property
    def vocab(self) -> int:
        """Outputs of the head, and the id of <|image|>."""
        return self.text_vocab + len(SPECIAL_TOKENS)

    @property
    def aspect_ratios(self) -> list[list[int]]:
        """Every (height, width) in tiles, in the order that gives the aspect-ratio ids (from 1)."""
        sides = range(1, self.max_tiles + 1)
        return [[h, w] for h in sides for w in sides if h * w <= self.max_tiles]

    def special_id(self, token: str) -> int:
        return self.text_vocab + SPECIAL_TOKENS.index(token)

    @property
    def eos_ids(self) -> list[int]:
        return [self.special_id(token) for token in ([self.eos] if isinstance(self.eos, str) else self.eos)]

    @property
    def end_ids(self) -> set[int]:
        """The ids that end a text: `eos_ids`, and the ends of a turn and of a message that the tokenizer has."""
        return {*self.eos_ids, self.special_id("<|eot_id|>"), self.special_id("<|eom_id|>")}


# Patches per tile, CLS included: 17, 26, 37 or 50. A square grid never gives a multiple of 8, because
# n * n + 1 is 1, 2 or 5 modulo 8, so that the vision tower always has padding rows.
SPECS: dict[str, Spec] = {
    "base": Spec(
        hidden=128, heads=4, kv_heads=2, mlp=256, layers=5, cross_layers=[1, 3],
        vision_hidden=48, vision_heads=3, vision_mlp=96, vision_layers=4, global_layers=2, intermediate=[1, 3],
        tile_size=56, patch_size=8, max_tiles=4,
        names="legacy", rope_style="rope_scaling", seed=12,
    ),
    "cross_first": Spec(
        hidden=128, heads=8, kv_heads=8, mlp=192, layers=4, cross_layers=[0, 2],
        vision_hidden=64, vision_heads=8, vision_mlp=128, vision_layers=3, global_layers=1, intermediate=[0, 1, 2],
        tile_size=40, patch_size=8, max_tiles=2,
        dtype="bfloat16", shards=3, text_vocab=440, template="jinja", eos="<|eot_id|>", rms_norm_eps=1e-6, seed=11,
    ),
    "cross_last": Spec(
        hidden=128, heads=2, kv_heads=1, mlp=320, layers=5, cross_layers=[2, 4],
        vision_hidden=80, vision_heads=4, vision_mlp=160, vision_layers=2, global_layers=1, intermediate=[0],
        tile_size=84, patch_size=14, max_tiles=1,
        rope_style="rope_scaling", rope_scaling=None, rope_theta=10000.0, text_vocab=300, max_positions=2048, seed=3,
    ),
    "adjacent": Spec(
        hidden=144, heads=6, kv_heads=3, mlp=288, layers=6, cross_layers=[2, 3],
        vision_hidden=60, vision_heads=3, vision_mlp=120, vision_layers=4, global_layers=2, intermediate=[3, 0, 2],
        tile_size=32, patch_size=8, max_tiles=6,
        names="legacy", eos=["<|eot_id|>", "<|end_of_text|>"], text_vocab=480, vision_norm_eps=1e-3, seed=4,
    ),
    "half": Spec(
        hidden=256, heads=8, kv_heads=4, mlp=384, layers=5, cross_layers=[0, 1, 4],
        vision_hidden=64, vision_heads=4, vision_mlp=256, vision_layers=3, global_layers=3, intermediate=[0, 2],
        tile_size=56, patch_size=8, max_tiles=4,
        dtype="float16", tie_word_embeddings=True, text_vocab=600, rope_style="rope_scaling",
        rope_scaling=LLAMA3_SCALING | {"factor": 32.0, "original_max_position_embeddings": 128}, seed=19,
    ),
    "wide": Spec(
        hidden=256, heads=16, kv_heads=8, mlp=256, layers=8, cross_layers=[1, 4, 6],
        vision_hidden=96, vision_heads=4, vision_mlp=192, vision_layers=5, global_layers=2, intermediate=[4, 2, 0, 3],
        tile_size=40, patch_size=10, max_tiles=6,
        dtype="bfloat16", names="legacy", shards=2, text_vocab=560, rope_style="rope_scaling", seed=6,
    ),
    "no_template": Spec(
        hidden=192, heads=3, kv_heads=3, mlp=256, layers=3, cross_layers=[1],
        vision_hidden=72, vision_heads=3, vision_mlp=144, vision_layers=3, global_layers=1, intermediate=[2, 1],
        tile_size=60, patch_size=12, max_tiles=2,
        rope_theta=100000.0, rope_scaling={"rope_type": "default"}, template=None, text_vocab=350, seed=14,
    ),
}  # fmt: skip


def write_checkpoint(folder: Path, spec: Spec) -> None:
    """Write config, weights, tokenizer and image settings as a released checkpoint has them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model_config(spec))
    write_json(folder / "generation_config.json", generation_config(spec))
    write_json(folder / "preprocessor_config.json", image_config(spec))
    write_tokenizer(folder, spec.text_vocab, spec.template)
    write_weights(
        folder, {rename(name, spec.names): value for name, value in random_weights(spec).items()}, spec.shards
    )


def model_config(spec: Spec) -> dict:
    """config.json with the keys of Llama-3.2-11B-Vision-Instruct."""
    scaling = spec.rope_scaling
    if spec.rope_style == "rope_parameters":
        rope = {"rope_parameters": {"rope_theta": spec.rope_theta} | (scaling or {"rope_type": "default"})}
    else:
        rope = {"rope_scaling": scaling, "rope_theta": spec.rope_theta}
    dtype_key = "torch_dtype" if spec.names == "legacy" else "dtype"
    text = {
        "model_type": "mllama_text_model", "vocab_size": spec.vocab, "hidden_size": spec.hidden,
        "hidden_act": spec.text_act, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads, "intermediate_size": spec.mlp, "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_positions, "cross_attention_layers": spec.cross_layers, "dropout": 0,
        "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": spec.special_id("<|begin_of_text|>"), "eos_token_id": spec.eos_ids,
        "pad_token_id": spec.special_id("<|finetune_right_pad_id|>"), dtype_key: spec.dtype, **rope,
    }  # fmt: skip
    vision = {
        "model_type": "mllama_vision_model", "hidden_size": spec.vision_hidden, "hidden_act": spec.vision_act,
        "num_hidden_layers": spec.vision_layers, "num_global_layers": spec.global_layers,
        "attention_heads": spec.vision_heads, "num_channels": 3, "intermediate_size": spec.vision_mlp,
        "vision_output_dim": spec.vision_hidden * (1 + len(spec.intermediate)), "image_size": spec.tile_size,
        "patch_size": spec.patch_size, "norm_eps": spec.vision_norm_eps, "max_num_tiles": spec.max_tiles,
        "intermediate_layers_indices": spec.intermediate, "supported_aspect_ratios": spec.aspect_ratios,
        "initializer_range": 0.02, dtype_key: spec.dtype,
    }  # fmt: skip
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": spec.vocab,
        "tie_word_embeddings": spec.tie_word_embeddings,
        dtype_key: spec.dtype,
        "text_config": text,
        "vision_config": vision,
    }


def generation_config(spec: Spec) -> dict:
    """generation_config.json; sampling is on in the released one, and greedy stays the engine's default."""
    return {
        "bos_token_id": spec.special_id("<|begin_of_text|>"),
        "pad_token_id": spec.special_id("<|finetune_right_pad_id|>"),
        "eos_token_id": spec.eos_ids if isinstance(spec.eos, list) else spec.eos_ids[0],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }


def image_config(spec: Spec) -> dict:
    """preprocessor_config.json; CLIP's mean and deviation, bilinear (2), as released."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": spec.max_tiles,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": spec.tile_size, "width": spec.tile_size},
    }  # fmt: skip


def weight_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its new name; Linear weights are [out, in]."""
    D, E = spec.hidden, spec.vision_hidden
    kv = D // spec.heads * spec.kv_heads
    patches = (spec.tile_size // spec.patch_size) ** 2 + 1
    ratios = len(spec.aspect_ratios) + 1  # row 0 stands for "no image"
    text, vision = "model.language_model.", "model.vision_model."
    shapes = {
        "lm_head.weight": (spec.vocab, D),
        "model.multi_modal_projector.weight": (D, E * (1 + len(spec.intermediate))),
        "model.multi_modal_projector.bias": (D,),
        text + "embed_tokens.weight": (spec.vocab + 8, D),
        text + "norm.weight": (D,),
        vision + "class_embedding": (E,),
        vision + "patch_embedding.weight": (E, 3, spec.patch_size, spec.patch_size),
        vision + "gated_positional_embedding.embedding": (patches, E),
        vision + "gated_positional_embedding.gate": (1,),
        vision + "gated_positional_embedding.tile_embedding.weight": (ratios, spec.max_tiles * patches * E),
    }
    for place in ("pre", "post"):
        shapes[f"{vision}{place}_tile_positional_embedding.embedding.weight"] = (ratios, spec.max_tiles * E)
        shapes[f"{vision}{place}_tile_positional_embedding.gate"] = (1,)
        shapes |= {f"{vision}layernorm_{place}.{part}": (E,) for part in ("weight", "bias")}
    for layer in range(spec.layers):
        name = f"{text}layers.{layer}."
        attention = "cross_attn." if layer in spec.cross_layers else "self_attn."
        widths = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, D)}
        shapes |= {f"{name}{attention}{part}.weight": shape for part, shape in widths.items()}
        widths = {"gate_proj": (spec.mlp, D), "up_proj": (spec.mlp, D), "down_proj": (D, spec.mlp)}
        shapes |= {f"{name}mlp.{part}.weight": shape for part, shape in widths.items()}
        shapes |= {f"{name}{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if layer in spec.cross_layers:
            shapes |= {f"{name}cross_attn.{norm}.weight": (D // spec.heads,) for norm in ("q_norm", "k_norm")}
            shapes |= {f"{name}cross_attn_{part}_gate": (1,) for part in ("attn", "mlp")}
    for tower, layers in (("transformer", spec.vision_layers), ("global_transformer", spec.global_layers)):
        for layer in range(layers):
            name = f"{vision}{tower}.layers.{layer}."
            shapes |= {f"{name}self_attn.{part}_proj.weight": (E, E) for part in "qkvo"}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes |= {f"{name}{norm}.{part}": (E,) for part in ("weight", "bias")}
            shapes |= {f"{name}mlp.fc1.weight": (spec.vision_mlp, E), f"{name}mlp.fc1.bias": (spec.vision_mlp,)}
            shapes |= {f"{name}mlp.fc2.weight": (E, spec.vision_mlp), f"{name}mlp.fc2.bias": (E,)}
            if tower == "global_transformer":
                shapes |= {f"{name}gate_{part}": (1,) for part in ("attn", "ffn")}
    return shapes


def random_weights(spec: Spec) -> dict[str, torch.Tensor]:
    """Non-trivial values for `weight_shapes`, in the checkpoint's dtype."""
    generator = torch.Generator().manual_seed(spec.seed)
    return {
        name: random_tensor(name, shape, generator).to(DTYPES[spec.dtype])
        for name, shape in weight_shapes(spec).items()
    }


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One tensor; the scales keep activations near one and logits several units apart."""
    normal = torch.randn(shape, generator=generator)
    if "gate" in name and shape == (1,):
        return torch.sign(normal) * (0.6 + 0.3 * normal.abs())  # either sign, |tanh| above 0.5
    if "norm" in name and name.endswith("weight"):
        return (2.5 if "q_norm" in name else 1.0) + 0.2 * normal  # peaked attention to image patches
    if name.endswith("bias"):
        return 0.2 * normal
    if "embed_tokens" in name or "_embedding" in name and "patch" not in name:
        return normal
    fan_in = math.prod(shape[1:])
    # Peaked attention, patches that outweigh their positions, and a head with clear margins.
    gain = next((g for part, g in (("q_proj", 2.0), ("patch_embedding", 3.0), ("lm_head", 4.0)) if part in name), 1.0)
    return gain * normal / math.sqrt(fan_in)


def rename(name: str, style: str) -> str:
    """A new weight name in the given style; legacy ones are what transformers 4 wrote."""
    if style == "new":
        return name
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` files of about equal count with an index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    files = {
        name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file(
            {name: weights[name] for name in names if files[name] == file}, folder / file, metadata={"format": "pt"}
        )
    total = sum(value.numel() * value.element_size() for value in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
