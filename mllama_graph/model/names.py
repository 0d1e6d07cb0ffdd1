"""The names that a weight has had in Hugging Face checkpoints, adapters and MLX conversions."""

# Each name that begins with the left side is known in the table by the right side: the legacy name, which transformers
# 4.45 to 4.51 used and released checkpoints have.
RENAMES = (
    # transformers >= 4.52
    ("model.language_model.", "language_model.model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    # The language model saved by itself (MllamaForCausalLM), and its adapters.
    ("model.layers.", "language_model.model.layers."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    # MLX
    ("vision_tower.", "vision_model."),
)
# Modules that training wraps around a model: torch.compile, and data parallel training.
WRAPPERS = ("_orig_mod.", "module.")


def legacy_name(name: str) -> str:
    """The legacy form of a tensor's or module's name."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    for other, legacy in RENAMES:
        if name.startswith(other):
            return legacy + name[len(other) :]
    return name
