"""The training model: mllama in Meta's semantics, with the parameter names of transformers' model.

I images  C tiles per image  S patches per tile (with CLS)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllama_graph.tiny.layers import Shape
from mllama_graph.tiny.text import ImageStates, TextBatch, TextModel, TextOutput
from mllama_graph.tiny.tiling import PATCHES
from mllama_graph.tiny.tokenizer import VOCABULARY
from mllama_graph.tiny.vision import VisionModel


class MllamaModel(nn.Module):
    """Vision encoder, language model and the projection between them."""

    def __init__(self, s: Shape):
        super().__init__()
        self.vision_model, self.language_model = VisionModel(s.vision), TextModel(s)
        self.multi_modal_projector = nn.Linear(s.vision.out_width, s.width)


class Mllama(nn.Module):
    """The whole model; names of its parameters are those of MllamaForConditionalGeneration in transformers."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.model = MllamaModel(s)
        self.lm_head = nn.Linear(s.width, VOCABULARY, bias=False)

    def encode_images(self, tiles: Tensor, ratio_I: Tensor, tiles_I: Tensor) -> Tensor:
        """Vision features [I, C, S, vision_output]."""
        return self.model.vision_model(tiles, ratio_I, tiles_I)

    def forward_text(self, batch: TextBatch, features: Tensor | None, tiles_I: Tensor) -> TextOutput:
        """States of packed text whose images are the first of `features`; None hides the images."""
        if features is None:
            return self.model.language_model(batch, None)
        states = self.model.multi_modal_projector(features).flatten(1, 2)
        padding = (torch.arange(states.shape[1]) // PATCHES) >= tiles_I[:, None]
        mask = torch.zeros(padding.shape).masked_fill_(padding, torch.finfo(torch.float32).min)
        return self.model.language_model(batch, ImageStates(states, mask))
