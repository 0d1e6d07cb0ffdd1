"""Auxiliary losses of training: linear heads that are not exported, and losses on attention scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama_graph.tiny.labels import CLASSES, COLOR_IDS, DIGIT_SLOTS, IGNORE, PRESENCE, SLOTS
from mllama_graph.tiny.layers import Shape
from mllama_graph.tiny.samples import Batch
from mllama_graph.tiny.text import QueryKey
from mllama_graph.tiny.tiling import MAX_TILES, PATCHES

PATCH_SIZES = (len(CLASSES), len(COLOR_IDS) + 1, SLOTS + 1, SLOTS + 1)  # class, colour, ranks from left and top
SIDES = 4  # none, left, middle, right
ASKED_SIZES = (5, 3, 4, 4)  # count, side, ranks from left and top
PRESENCE_WEIGHT = 3.0  # most of its 47 targets are 0
READOUT_SIZES = (6, len(COLOR_IDS) + 1) * SLOTS + (11,) * DIGIT_SLOTS


class Heads(nn.Module):
    """Linear heads on the final vision states and on the states after two text layers, `taps`."""

    def __init__(self, s: Shape):
        super().__init__()
        self.width, self.taps = s.vision.width, (s.cross_layers[1], s.layers - 1)
        self.patch = nn.Linear(s.vision.width, sum(PATCH_SIZES))
        self.readout = nn.ModuleList([nn.Linear(s.width, sum(READOUT_SIZES)) for _ in self.taps])
        self.presence = nn.ModuleList([nn.Linear(s.width, PRESENCE) for _ in self.taps])
        self.side = nn.Linear(s.vision.width, SIDES)
        self.asked = nn.Linear(s.width, sum(ASKED_SIZES))

    def patch_loss(self, features: Tensor, batch: Batch) -> tuple[Tensor, list[float]]:
        """Loss, and accuracy per label (as PATCH_SIZES, then the side) over the patches that show something."""
        labels = batch.patch_labels.flatten(0, 2)
        real = labels[:, 0] >= 0
        labels = labels[real]
        states = features[:, :, 1:, : self.width].flatten(0, 2)[real]
        logits = torch.cat([self.patch(states), self.side(states)], -1).float()
        shown, losses, accuracy = labels[:, 0] > 0, [], []
        for i, part in enumerate(logits.split((*PATCH_SIZES, SIDES), -1)):
            weight = torch.ones(part.shape[1])
            weight[0] = 0.15  # background
            if (labels[:, i] >= 0).any():
                losses.append(F.cross_entropy(part, labels[:, i], weight, ignore_index=IGNORE))
            known = shown & (labels[:, i] > 0)
            accuracy.append((part[known].argmax(-1) == labels[known, i]).float().mean().item() if known.any() else 0.0)
        return torch.stack(losses).mean(), accuracy

    def readout_loss(self, states: list[Tensor], batch: Batch) -> tuple[Tensor, float]:
        """Loss over both taps, and the fraction of scenes that the last tap reads without an error."""
        total, right = torch.zeros(()), torch.ones(())
        for tap, readout, presence in zip(self.taps, self.readout, self.presence):
            x = states[tap][batch.packed.readout_rows]
            slots, present = (head(F.rms_norm(x, x.shape[-1:])).float() for head in (readout, presence))
            parts = list(zip(slots.split(READOUT_SIZES, -1), batch.readout_labels.T))
            presence_loss = F.binary_cross_entropy_with_logits(present, batch.presence)
            slot_loss = torch.stack([F.cross_entropy(p, y) for p, y in parts]).mean()
            total = total + PRESENCE_WEIGHT * presence_loss + slot_loss
            right = torch.stack([p.argmax(-1) == y for p, y in parts]).all(0).float().mean()
        return total, right.item()


def asked_loss(heads: Heads, states: list[Tensor], batch: Batch) -> Tensor:
    """Loss on count, side and ranks of the thing that a question names, read at its shape word."""
    single = batch.packed.asked[batch.packed.asked[:, 0] < batch.packed.text.single_end]
    if not len(single):
        return torch.zeros(())
    x = states[heads.taps[0]][single[:, 0]]
    logits = heads.asked(F.rms_norm(x, x.shape[-1:])).float().split(ASKED_SIZES, -1)
    parts = [F.cross_entropy(p, y, ignore_index=IGNORE) for p, y in zip(logits, single[:, 4:].T) if (y >= 0).any()]
    return torch.stack(parts).mean()


def comparing_loss(s: Shape, scores: dict[int, QueryKey], batch: Batch) -> tuple[Tensor, float]:
    """Loss that trains a self-attention head to tell whether the (first) image shows what a question names.

    The query heads of the first key head, in the layer after the second cross-attention layer, learn to attend from a
    shape word to the (first) image token if that image shows such a shape, else to the start of the sequence.
    Also returns the fraction of words for which they do.
    """
    if not len(batch.packed.asked):
        return torch.zeros(()), 0.0
    q, k = scores[s.cross_layers[1] + 1]
    heads = per_kv = s.heads // s.kv_heads
    row, start, image, present = batch.packed.asked[:, :4].T
    keys = start[:, None] + torch.arange(int((row - start).max()) + 1)
    later = keys > row[:, None]
    q, k = q[row, :heads].unflatten(1, (-1, per_kv)), k[keys.clamp_max(len(k) - 1), : heads // per_kv]
    score = torch.einsum("rkgd,rskd->rkgs", q, k) * q.shape[-1] ** -0.5
    logp = score.masked_fill(later[:, None, None], -1e9).log_softmax(-1)
    target = torch.where(present > 0, image, start) - start
    logp_target = logp.gather(-1, target[:, None, None, None].expand(*logp.shape[:3], 1))
    return -logp_target.mean(), (logp_target.exp() > 0.5).float().mean().item()


def pointing_loss(s: Shape, scores: dict[int, QueryKey], batch: Batch) -> tuple[Tensor, float]:
    """Loss that trains half of the heads of two cross-attention layers to attend to the batch's pointing targets.

    It is -log of the attention on the target patches. Also returns the mean attention on them in the second layer.
    """
    targets = batch.pointing
    losses, hit = [], 0.0
    padding = torch.arange(MAX_TILES * PATCHES) // PATCHES >= batch.tiles_I[targets.images][:, None]
    for layer in s.cross_layers[:2]:
        heads, per_kv = s.heads // 2, s.heads // s.kv_heads
        q = scores[layer].q[targets.rows, :heads].float()
        k = scores[layer].k[targets.images, : heads // per_kv].float()
        score = torch.einsum("rkgd,rksd->rkgs", q.unflatten(1, (-1, per_kv)), k) * q.shape[-1] ** -0.5
        logp = score.masked_fill(padding[:, None, None], -1e9).log_softmax(-1)
        logp_target = logp.masked_fill(~targets.patches[:, None, None], -1e9).logsumexp(-1)
        losses.append(-logp_target.mean())
        hit = logp_target.exp().mean().item()
    return torch.stack(losses).mean(), hit
