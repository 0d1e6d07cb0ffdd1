"""Hugging Face's mllama, corrected to Meta's semantics: the oracle for tests of the engine.

transformers 5.23 differs from Meta's reference (`llama_models/llama3/multimodal/model.py`, package
llama-models 0.3.0) in two places. Both are corrected here by replacing the class of modules in the loaded
model only, so that transformers itself is unchanged for all other code in the process:

1. The projector reads the *input* of each vision layer in `intermediate_layers_indices`: Meta collects
   `out.append(x)` before `x = r(x)` (ImageTransformer.forward, model.py:312-321); HF collects outputs
   (MllamaVisionEncoder.forward).
2. A row that sees no image passes a cross layer unchanged: Meta multiplies the attention output
   (CrossAttention.forward, model.py:929) and the MLP output (CrossAttentionTransformerBlock.forward,
   model.py:998) by the row mask; HF multiplies only the MLP's, and its fully masked softmax is uniform
   over the image.

Where Meta's code defines nothing, HF's released behaviour counts: intermediate features follow the order
of the config's list, and tokens generated after several images keep the visibility of the last prompt row.
"""

from pathlib import Path

import torch
from PIL import Image
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama as hf
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)


class EncoderOfInputs(hf.MllamaVisionEncoder):
    """Correction 1: `hidden_states[i]` is the input of layer i, not its output."""

    def forward(self, hidden_states, attention_mask=None):
        output = super().forward(hidden_states, attention_mask)
        output.hidden_states = (hidden_states, *output.hidden_states[:-1])
        return output


class CrossLayerOfSeeingRows(hf.MllamaCrossAttentionDecoderLayer):
    """Correction 2: rows whose mask shows no image pass through the layer unchanged.

    Zeroed attention and MLP outputs leave `x + tanh(g) * 0 + tanh(g) * 0`, which is exactly x.
    """

    def forward(self, hidden_states, *args, full_text_row_masked_out_mask, **kwargs):
        output = super().forward(
            hidden_states, *args, full_text_row_masked_out_mask=full_text_row_masked_out_mask, **kwargs
        )
        sees_image = full_text_row_masked_out_mask[:, 0].bool()  # [1, T, 1]
        return torch.where(sees_image, output, hidden_states)


def correct(model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
    """Apply both corrections to this model and return it."""
    model.model.vision_model.transformer.__class__ = EncoderOfInputs
    for layer in model.model.language_model.layers:
        if isinstance(layer, hf.MllamaCrossAttentionDecoderLayer):
            layer.__class__ = CrossLayerOfSeeingRows
    return model


class Oracle:
    """One checkpoint in fp32, whatever its stored dtype, run one sequence at a time without a KV cache.

    Recomputing the prompt in each step is slow but avoids HF's cache: HF sizes its causal mask by
    cache layer 0, which is wrong where layer 0 is a cross-attention layer.
    """

    def __init__(self, folder: Path):
        model, info = MllamaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        faults = {kind: names for kind, names in info.items() if names}
        if faults:
            raise ValueError(f"{folder} does not match HF's model: {faults}")
        self.model = correct(model.eval())
        self.images = MllamaImageProcessorPil.from_pretrained(folder)
        self.image_token = model.config.image_token_index

    @torch.inference_mode()
    def logits(self, input_ids: list[int], images: list[Image.Image]) -> torch.Tensor:
        """Logits [T, V] after each prompt token, in fp32."""
        return self._forward(input_ids, *self._encode(input_ids, images))

    @torch.inference_mode()
    def greedy(
        self, input_ids: list[int], images: list[Image.Image], n: int, eos: set[int] | None
    ) -> tuple[list[int], list[float], list[float]]:
        """Up to `n` greedy tokens, ended by one of `eos`, which is included.

        Returns (token ids, log-probability of each, logit margin of each over the second best).
        """
        image_states, visible = self._encode(input_ids, images)
        ids, logprobs, margins = list(input_ids), [], []
        for _ in range(n):
            row = self._forward(ids, image_states, visible)[-1]
            best, second = row.topk(2).values.tolist()
            ids.append(int(row.argmax()))
            logprobs.append(float(row.double().log_softmax(-1)[ids[-1]]))
            margins.append(best - second)
            if eos is not None and ids[-1] in eos:
                break
        return ids[len(input_ids) :], logprobs, margins

    @torch.inference_mode()
    def top_logprobs(self, input_ids: list[int], token_ids: list[int], images: list[Image.Image]) -> torch.Tensor:
        """Log-probabilities [len(token_ids), V] for each of `token_ids`, given the prompt and the ids before it."""
        ids = input_ids + token_ids[:-1]
        return self._forward(ids, *self._encode(input_ids, images))[len(input_ids) - 1 :].log_softmax(-1)

    def _encode(self, input_ids, images) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Projected image features [images * tiles, patches, D] and the prompt rows' mask [1, T, images, tiles]."""
        count = input_ids.count(self.image_token)
        if count != len(images):
            raise ValueError(f"{count} image tokens for {len(images)} images")
        if not images:
            return None, None
        pixels = self.images(images=[images], return_tensors="pt")
        features = self.model.model.vision_model(
            pixels["pixel_values"], pixels["aspect_ratio_ids"], pixels["aspect_ratio_mask"]
        ).last_hidden_state
        visible = convert_sparse_cross_attention_mask_to_dense(
            [get_cross_attention_token_mask(input_ids, self.image_token)],
            pixels["num_tiles"],
            self.images.max_image_tiles,
            len(input_ids),
        )
        return self.model.model.multi_modal_projector(features).flatten(0, 2), torch.from_numpy(visible)

    def _forward(self, ids, image_states, visible) -> torch.Tensor:
        """Logits [T, V] of prompt and generated tokens; the latter see what the last prompt row sees."""
        if visible is not None:
            new_rows = len(ids) - visible.shape[1]
            visible = torch.cat([visible, visible[:, -1:].expand(-1, new_rows, -1, -1)], dim=1)
        return self.model(
            input_ids=torch.tensor([ids]),
            cross_attention_states=image_states,
            cross_attention_mask=visible,
            use_cache=False,
        ).logits[0]
