"""Throwaway heads that exist in training only: what each patch shows, and what the image token has read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama_graph.tiny.model import Mllama, Shape
from mllama_graph.tiny.samples import CLASSES, COLOR_IDS, DIGIT_SLOTS, IGNORE, PRESENCE, SLOTS, Batch
from mllama_graph.tiny.tiling import MAX_TILES, PATCHES

PATCH_SIZES = (len(CLASSES), len(COLOR_IDS) + 1, SLOTS + 1, SLOTS + 1)  # class, colour, rank from left, from top
SIDES = 4  # none, left, middle, right
ASKED_SIZES = (5, 3, 4, 4)  # of a shape word in a question: count, side, rank from the left, from the top
PRESENCE_WEIGHT = 3.0  # most of its 47 targets are easy zeros
READOUT_SIZES = (6, len(COLOR_IDS) + 1) * SLOTS + (11,) * DIGIT_SLOTS


class Heads(nn.Module):
    """Linear heads on the last vision state and on two states of the first image token."""

    def __init__(self, s: Shape):
        super().__init__()
        self.width, self.taps = s.vision.width, (s.cross_layers[1], s.layers - 1)
        self.patch = nn.Linear(s.vision.width, sum(PATCH_SIZES))
        self.readout = nn.ModuleList([nn.Linear(s.width, sum(READOUT_SIZES)) for _ in self.taps])
        self.presence = nn.ModuleList([nn.Linear(s.width, PRESENCE) for _ in self.taps])
        self.side = nn.Linear(s.vision.width, SIDES)
        self.asked = nn.Linear(s.width, sum(ASKED_SIZES))

    def patch_loss(self, features: Tensor, batch: Batch) -> tuple[Tensor, list[float]]:
        """Loss, and accuracy on drawn patches for class, colour and the two ranks."""
        labels = batch.patch_labels.flatten(0, 2)  # five columns: as PATCH_SIZES, then the side
        real = labels[:, 0] >= 0
        labels = labels[real]
        states = features[:, :, 1:, : self.width].flatten(0, 2)[real]
        logits = torch.cat([self.patch(states), self.side(states)], -1).float()
        drawn, losses, accuracy = labels[:, 0] > 0, [], []
        for i, part in enumerate(logits.split((*PATCH_SIZES, SIDES), -1)):
            weight = torch.ones(part.shape[1])
            weight[0] = 0.15
            if (labels[:, i] >= 0).any():
                losses.append(F.cross_entropy(part, labels[:, i], weight, ignore_index=IGNORE))
            known = drawn & (labels[:, i] > 0)
            accuracy.append((part[known].argmax(-1) == labels[known, i]).float().mean().item() if known.any() else 0.0)
        return torch.stack(losses).mean(), accuracy

    def readout_loss(self, states: list[Tensor], batch: Batch) -> tuple[Tensor, float]:
        """Loss over both taps, and how often the last tap names the whole scene."""
        total, right = torch.zeros(()), torch.ones(())
        for tap, readout, presence in zip(self.taps, self.readout, self.presence):
            x = states[tap][batch.readout_rows]
            named, there = (head(F.rms_norm(x, x.shape[-1:])).float() for head in (readout, presence))
            parts = list(zip(named.split(READOUT_SIZES, -1), batch.readout_labels.T))
            present = F.binary_cross_entropy_with_logits(there, batch.presence)
            total = total + PRESENCE_WEIGHT * present + torch.stack([F.cross_entropy(p, y) for p, y in parts]).mean()
            right = torch.stack([p.argmax(-1) == y for p, y in parts]).all(0).float().mean()
        return total, right.item()


def asked_loss(heads: Heads, states: list[Tensor], batch: Batch) -> Tensor:
    """Count, side and ranks of the thing that a question names, read at its shape word."""
    single = batch.asked[batch.asked[:, 0] < batch.single_end]
    if not len(single):
        return torch.zeros(())
    x = states[heads.taps[0]][single[:, 0]]
    logits = heads.asked(F.rms_norm(x, x.shape[-1:])).float().split(ASKED_SIZES, -1)
    parts = [F.cross_entropy(p, y, ignore_index=IGNORE) for p, y in zip(logits, single[:, 4:].T) if (y >= 0).any()]
    return torch.stack(parts).mean()


def comparing_loss(model: Mllama, batch: Batch) -> tuple[Tensor, float]:
    """The first key head of a late self-attention layer point from a question's shape word to the (first) image token
    where that image holds the thing, else to the start of the sequence; also returns how often they do."""
    if not len(batch.asked):
        return torch.zeros(()), 0.0
    layer = model.model.language_model.layers[model.s.cross_layers[1] + 1]
    q, k = layer.trace
    heads = per_kv = model.s.heads // model.s.kv_heads
    row, start, image, present = batch.asked[:, :4].T
    keys = start[:, None] + torch.arange(int((row - start).max()) + 1)
    later = keys > row[:, None]
    q, k = q[row, :heads].unflatten(1, (-1, per_kv)), k[keys.clamp_max(len(k) - 1), : heads // per_kv]
    score = torch.einsum("rkgd,rskd->rkgs", q, k) * q.shape[-1] ** -0.5
    logp = score.masked_fill(later[:, None, None], -1e9).log_softmax(-1)
    wanted = torch.where(present > 0, image, start) - start
    meant = logp.gather(-1, wanted[:, None, None, None].expand(*logp.shape[:3], 1))
    return -meant.mean(), (meant.exp() > 0.5).float().mean().item()


def pointing_loss(model: Mllama, batch: Batch) -> tuple[Tensor, float]:
    """Half of the cross-attention heads of two layers learn to look at what a shape word means.

    Loss is -log of the attention on the meant patches; also returns the mean attention there in the second layer.
    """
    losses, hit = [], 0.0
    padding = torch.arange(MAX_TILES * PATCHES) // PATCHES >= batch.tiles_I[batch.named_group][:, None]
    for index in model.s.cross_layers[:2]:
        q, k = model.model.language_model.layers[index].trace
        heads, per_kv = model.s.heads // 2, model.s.heads // model.s.kv_heads
        q, k = q[batch.named_rows, :heads].float(), k[batch.named_group, : heads // per_kv].float()
        score = torch.einsum("rkgd,rksd->rkgs", q.unflatten(1, (-1, per_kv)), k) * q.shape[-1] ** -0.5
        logp = score.masked_fill(padding[:, None, None], -1e9).log_softmax(-1)
        meant = logp.masked_fill(~batch.named_target[:, None, None], -1e9).logsumexp(-1)
        losses.append(-meant.mean())
        hit = meant.exp().mean().item()
    return torch.stack(losses).mean(), hit
