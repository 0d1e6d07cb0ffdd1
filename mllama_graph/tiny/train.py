"""Train the tiny model: one or more one-thread processes, resumable, progress on screen and in curve.jsonl.

First the vision tower and the cross-attention learn to read scenes (dense pages and the read-out head), then the whole
model learns to answer, then the vision tower rests and the text alone goes on over features seen ahead. The learning
rate falls linearly at the end. Start it with `python -m mllama_graph.tiny.train --folder runs/NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .heads import Heads, asked_loss, comparing_loss, pointing_loss
from .initial import start
from .model import Mllama, Shape
from .optimizer import Muon
from .pool import Pool
from .samples import IGNORE, Batch, Mix, training_batch

SEEING = Mix(pages=14, readouts=7, scenes=0, questions=0, pairs=0, talks=0)
ANSWERING = Mix(pages=2, readouts=0, scenes=11, questions=7, pairs=4, talks=2)
# At the end the vision tower rests: more steps for the text.
TALKING = Mix(pages=0, readouts=0, scenes=14, questions=7, pairs=2, talks=1)
POOL = (900, 150)  # single scenes and pairs of scenes seen ahead
MUON_RATE, ADAM_RATE = 0.016, 1.5e-3
# Queries and keys of the local vision layers start as neighbour heads; at the full rate 300 steps wash that out.
NEIGHBOUR_RATE = 0.1 * MUON_RATE
# The answer loss is a mean over tokens of which one in ten decides anything.
ANSWER_WEIGHT, PATCH_WEIGHT, READOUT_WEIGHT, POINTING_WEIGHT, ASKED_WEIGHT = 10.0, 2.0, 0.5, 0.4, 0.7
WARM_UP, FLOOR = 80, 0.01
CLIP = 1.0
AVERAGE_KEEP = 0.98  # of the moving average: about 50 steps; 500 lagged far behind in a run this short


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    elapsed: float = 0.0  # training seconds, over all restarts
    images: int = 0
    questions: int = 0


@dataclass
class Trainer:
    """Model, heads, optimisers and the moving average of the weights."""

    model: Mllama
    heads: Heads
    optimizers: list[torch.optim.Optimizer]
    base_rates: list[list[float]]
    average: dict[str, torch.Tensor]
    progress: Progress = field(default_factory=Progress)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in (*self.model.parameters(), *self.heads.parameters()) if p.requires_grad]


def build(seed: int) -> Trainer:
    """A fresh model with its optimisers."""
    model = Mllama(Shape())
    start(model, seed)
    heads = Heads(model.s)
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers." in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in chosen]
    adam = torch.optim.AdamW(
        [
            dict(params=[p for p in rest if p.dim() > 1], weight_decay=0.02),
            dict(params=[p for p in rest if p.dim() <= 1], lr=3 * ADAM_RATE, weight_decay=0.0),
        ],
        lr=ADAM_RATE, betas=(0.9, 0.98), fused=True,
    )
    local = {id(p) for a in model.model.vision_model.transformer.layers for p in (a.self_attn.q_proj.weight, a.self_attn.k_proj.weight)}
    fast, slow = ([p for p in hidden if (id(p) in local) == chosen] for chosen in (False, True))
    muon = Muon([dict(params=fast), dict(params=slow, lr=NEIGHBOUR_RATE, weight_decay=0.0)], MUON_RATE, 0.95, 0.02)
    optimizers = [adam, muon]
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return Trainer(model, heads, optimizers, [[g["lr"] for g in o.param_groups] for o in optimizers], average)


def freeze_vision(trainer: Trainer) -> None:
    """Settle the vision tower at its moving average: steps that train the text alone cost half."""
    vision = trainer.model.model.vision_model
    vision.load_state_dict({k.removeprefix("model.vision_model."): v for k, v in trainer.average.items() if "vision_model" in k})
    vision.requires_grad_(False)
    trainer.heads.patch.requires_grad_(False)
    trainer.heads.side.requires_grad_(False)


def losses(trainer: Trainer, batch: Batch, features: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, float]]:
    """The training loss and the figures to show; given features stand for the pictures."""
    with torch.autocast("cpu", torch.bfloat16):
        patch, accuracy = torch.zeros(()), [0.0] * 5
        if features is None:
            features = trainer.model.see(batch.tiles, batch.ratio_I, batch.tiles_I)
            patch, accuracy = trainer.heads.patch_loss(features, batch)
        last, states = trainer.model.read(batch.text, features, batch.tiles_I)
        readout, read_right = trainer.heads.readout_loss(states, batch)
        pointing = comparing = asked = torch.zeros(())
        hit = compared = 0.0
        if len(batch.named_rows):
            with torch.autocast("cpu", enabled=False):
                pointing, hit = pointing_loss(trainer.model, batch)
                comparing, compared = comparing_loss(trainer.model, batch)
                asked = asked_loss(trainer.heads, states, batch)
        rows = batch.targets_T != IGNORE
        answer = torch.zeros(())
        if rows.any():
            answer = F.cross_entropy(trainer.model.lm_head(last[rows]).float(), batch.targets_T[rows])
    figures = dict(answer=answer.item(), patch=patch.item(), readout=readout.item(), read_right=read_right, pointing=pointing.item(), hit=hit,
                   comparing=comparing.item(), compared=compared, asked=asked.item())
    figures |= dict(zip(("p_class", "p_color", "p_left", "p_top", "p_side"), accuracy))
    guides = POINTING_WEIGHT * (pointing + comparing) + ASKED_WEIGHT * asked
    return ANSWER_WEIGHT * answer + PATCH_WEIGHT * patch + READOUT_WEIGHT * readout + guides, figures


def synchronise(trainer: Trainer, elapsed: float, rank: int, world: int) -> float:
    """Average the gradients over the processes; every process gets process 0's clock."""
    for p in trainer.parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world == 1:
        return elapsed
    clock = torch.tensor([elapsed * world if rank == 0 else 0.0])
    flat = torch.cat([p.grad.flatten() for p in trainer.parameters] + [clock])
    dist.all_reduce(flat)
    flat /= world
    for p, g in zip(trainer.parameters, flat[:-1].split([p.numel() for p in trainer.parameters])):
        p.grad.copy_(g.view_as(p))
    return float(flat[-1])


def rate_factor(step: int, done: float, decay: float) -> float:
    """Warm-up, constant, then linear to FLOOR over the last `decay` of the run."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, max(FLOOR, (1 - done) / decay))


def update(trainer: Trainer, factor: float) -> float:
    """One optimiser step and one step of the moving average; returns the gradient norm."""
    norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, CLIP)
    for optimizer, rates in zip(trainer.optimizers, trainer.base_rates):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    keep = min(AVERAGE_KEEP, 1 - 1 / (1 + 0.1 * trainer.progress.step))
    with torch.no_grad():
        for k, v in trainer.model.state_dict().items():
            trainer.average[k].lerp_(v, 1 - keep)
    return float(norm)


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint; a kill never leaves half a file."""
    state = dict(
        model=trainer.model.state_dict(), heads=trainer.heads.state_dict(), average=trainer.average,
        optimizers=[o.state_dict() for o in trainer.optimizers], progress=vars(trainer.progress),
    )
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(trainer: Trainer, path: Path) -> None:
    """Continue from a checkpoint."""
    state = torch.load(path)
    trainer.model.load_state_dict(state["model"])
    trainer.heads.load_state_dict(state["heads"])
    trainer.average = state["average"]
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    trainer.progress = Progress(**state["progress"])


def finished_part(args: argparse.Namespace, progress: Progress) -> float:
    """Fraction of the run that is done, by steps or else by the clock."""
    return progress.step / args.steps if args.steps else progress.elapsed / (60 * args.minutes)


def report(args: argparse.Namespace, trainer: Trainer, recent: list[dict[str, float]], factor: float, speed: float) -> None:
    """One line on screen, one in the curve."""
    p = trainer.progress
    means = {k: round(sum(r[k] for r in recent) / len(recent), 4) for k in recent[0]}
    done = finished_part(args, p)
    left = p.elapsed / done * (1 - done) / 60
    line = dict(minutes=round(p.elapsed / 60, 2), step=p.step, images=p.images, questions=p.questions,
                images_per_s=round(speed, 1), rate=round(factor, 3), minutes_left=round(left, 1), **means)
    with open(args.folder / "curve.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    print(" ".join(f"{k} {v}" for k, v in line.items()), flush=True)


def train(args: argparse.Namespace) -> None:
    """Run one process of the training until it is finished."""
    torch.set_num_threads(1)
    if args.world > 1:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        dist.init_process_group("gloo", rank=args.rank, world_size=args.world)
    trainer, path = build(args.seed), args.folder / "checkpoint.pt"
    if path.exists():
        load(trainer, path)
    p, recent, before, shown, saved = trainer.progress, [], time.time(), time.time(), time.time()
    images_shown, pool = p.images, None
    while (done := finished_part(args, p)) < 1:
        rng = random.Random(f"train {args.seed} {args.rank} {p.step}")
        features = None
        if done >= args.talking:
            if pool is None:
                freeze_vision(trainer)
                pool = Pool(trainer.model, *POOL, rng)
            batch, features = pool.batch(TALKING, rng)
        else:
            batch = training_batch(SEEING if done < args.seeing else ANSWERING, rng)
        loss, figures = losses(trainer, batch, features)
        loss.backward()
        now = time.time()
        p.elapsed = synchronise(trainer, p.elapsed + now - before, args.rank, args.world)
        before = now
        factor = rate_factor(p.step, done, args.decay)
        figures["norm"] = update(trainer, factor)
        p.step += 1
        p.images += len(batch.tiles_I) * args.world
        p.questions += len(batch.spans) * args.world
        recent.append(figures)
        if args.rank == 0 and time.time() - shown > 20:
            report(args, trainer, recent, factor, (p.images - images_shown) / (time.time() - shown))
            recent, shown, images_shown = [], time.time(), p.images
        if args.rank == 0 and time.time() - saved > 60:
            save(trainer, path)
            saved = time.time()
    if args.rank == 0:
        save(trainer, path)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoint and curve; an existing run is continued")
    parser.add_argument("--minutes", type=float, default=100.0, help="length of the run by the clock")
    parser.add_argument("--steps", type=int, default=0, help="length of the run in steps: reproducible, wins over --minutes")
    parser.add_argument("--seeing", type=float, default=0.15, help="part of the run before the first question")
    parser.add_argument("--decay", type=float, default=0.3, help="part of the run in which the learning rate falls")
    parser.add_argument("--talking", type=float, default=0.75, help="part of the run after which the vision tower is frozen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--rank", type=int, default=-1, help="set by the parent process")
    parser.add_argument("--port", type=int, default=29511)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Start one process for each rank and wait, or be one of them."""
    args = parse(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.rank >= 0:
        return train(args)
    environment = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    command = [sys.executable, "-m", "mllama_graph.tiny.train", *argv]
    workers = [subprocess.Popen([*command, "--rank", str(r)], env=environment) for r in range(args.world)]
    sys.exit(max(abs(w.wait()) for w in workers))


if __name__ == "__main__":
    main(sys.argv[1:])
