"""Train the tiny model: one or more one-thread processes, resumable, progress on screen and in curve.jsonl.

First the vision tower and the cross-attention learn to read scenes (dense pages and the read-out head), then the whole
model learns to answer, then the vision tower rests and the text alone goes on over features seen ahead. The learning
rate falls linearly before the vision tower rests, and before the end for the text. What a step does depends on the
seed and its number alone. Start it with `python -m mllama_graph.tiny.train --folder runs/NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import write_json
from mllama_graph.tiny.heads import Heads, asked_loss, comparing_loss, pointing_loss
from mllama_graph.tiny.initial import start
from mllama_graph.tiny.model import Mllama, Shape
from mllama_graph.tiny.pool import Pool
from mllama_graph.tiny.samples import IGNORE, Batch, Mix, digit_tokens, training_batch

SEEING = Mix(pages=14, readouts=7, scenes=0, questions=0, pairs=0, talks=0)
ANSWERING = Mix(pages=5, readouts=0, scenes=11, questions=7, pairs=4, talks=2)
# At the end the vision tower rests: more steps for the text.
TALKING = Mix(pages=0, readouts=0, scenes=14, questions=7, pairs=2, talks=1)
POOL = (900, 150)  # at the most: single scenes and pairs of scenes seen ahead
# Peak learning rate and weight decay by kind of parameter. Query and key weights of the local vision layers are
# initialized to attend to a neighboring patch; at the rate of the other hidden weights they lose that within 300 steps.
RATES = {"hidden": (0.016, 0.02), "neighbor": (0.0016, 0.0), "table": (1.5e-3, 0.02), "vector": (4.5e-3, 0.0)}
# The answer loss is a mean over tokens of which one in ten decides anything.
ANSWER_WEIGHT, DIGIT_WEIGHT = 10.0, 4.0  # the second: of a digit beside any other token
PATCH_WEIGHT, READOUT_WEIGHT, POINTING_WEIGHT, ASKED_WEIGHT = 2.0, 0.5, 0.4, 0.7
WARM_UP, FLOOR = 80, 0.01
CLIP = 1.0
AVERAGE_KEEP = 0.98  # of the moving average: about 50 steps; 500 lagged far behind in a run this short


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    elapsed: float = 0.0  # seconds, over all restarts
    cpu: float = 0.0  # processor seconds of process 0
    images: int = 0
    questions: int = 0


@dataclass
class Trainer:
    """Model, heads, optimisers and the moving average of the weights."""

    model: Mllama
    heads: Heads
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, torch.Tensor]
    token_weights: torch.Tensor
    progress: Progress = field(default_factory=Progress)
    pool: Pool | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is still being trained."""
        return [p for p in (*self.model.parameters(), *self.heads.parameters()) if p.requires_grad]


def optimizer_kind(name: str, p: torch.nn.Parameter) -> str:
    """The row of RATES for a parameter: the 2-D weights of layers go to Muon, all others to AdamW."""
    if p.dim() != 2 or "layers." not in name:
        return "vector" if p.dim() == 1 else "table"
    neighbor = "vision_model.transformer" in name and ("q_proj" in name or "k_proj" in name)
    return "neighbor" if neighbor else "hidden"


def build(seed: int) -> Trainer:
    """A new model with its optimizers; each parameter group has its peak rate `full` and a flag `vision`."""
    model = Mllama(Shape())
    start(model, seed)
    heads = Heads(model.s)
    parameters: dict[tuple[str, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, p in (*model.named_parameters(), *heads.named_parameters()):
        vision = name.startswith(("model.vision_model", "patch", "side"))
        parameters[optimizer_kind(name, p), vision].append(p)

    def groups(*kinds: str) -> list[dict[str, Any]]:
        return [
            dict(params=params, lr=RATES[kind][0], full=RATES[kind][0], weight_decay=RATES[kind][1], vision=vision)
            for (kind, vision), params in parameters.items()
            if kind in kinds
        ]

    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups("table", "vector"), betas=(0.9, 0.98), fused=True),
        # "original" multiplies the rate by sqrt(max(1, rows / columns)).
        torch.optim.Muon(groups("hidden", "neighbor"), momentum=0.95, ns_steps=5, adjust_lr_fn="original"),
    ]
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    token_weights = torch.ones(model.lm_head.out_features)
    token_weights[list(digit_tokens())] = DIGIT_WEIGHT
    return Trainer(model, heads, optimizers, average, token_weights)


def freeze_vision(trainer: Trainer) -> None:
    """Settle the vision tower at its moving average: steps that train the text alone cost half."""
    vision = trainer.model.model.vision_model
    settled = {k.removeprefix("model.vision_model."): v for k, v in trainer.average.items() if "vision_model" in k}
    vision.load_state_dict(settled)
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
            logits = trainer.model.lm_head(last[rows]).float()
            answer = F.cross_entropy(logits, batch.targets_T[rows], trainer.token_weights)
    figures = dict(
        answer=answer.item(),
        patch=patch.item(),
        readout=readout.item(),
        read_right=read_right,
        pointing=pointing.item(),
        hit=hit,
        comparing=comparing.item(),
        compared=compared,
        asked=asked.item(),
    )
    figures |= dict(zip(("p_class", "p_color", "p_left", "p_top", "p_side"), accuracy))
    guides = POINTING_WEIGHT * (pointing + comparing) + ASKED_WEIGHT * asked
    return ANSWER_WEIGHT * answer + PATCH_WEIGHT * patch + READOUT_WEIGHT * readout + guides, figures


def synchronise(trainer: Trainer, world: int) -> None:
    """Average the gradients over the processes."""
    for p in trainer.parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in trainer.parameters])
    dist.all_reduce(flat)
    flat /= world
    for p, g in zip(trainer.parameters, flat.split([p.numel() for p in trainer.parameters])):
        p.grad.copy_(g.view_as(p))


def rate_factor(step: int, left: float, decay: float) -> float:
    """Warm-up, constant, then linear to FLOOR while what is `left` of the run falls from `decay` to nothing."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, max(FLOOR, left / decay))


def update(trainer: Trainer, vision_factor: float, text_factor: float) -> float:
    """One optimiser step and one step of the moving average; returns the gradient norm."""
    norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, CLIP)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * (vision_factor if group["vision"] else text_factor)
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
        model=trainer.model.state_dict(),
        heads=trainer.heads.state_dict(),
        average=trainer.average,
        optimizers=[o.state_dict() for o in trainer.optimizers],
        progress=vars(trainer.progress),
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


def train_step(args: argparse.Namespace, trainer: Trainer) -> dict[str, float]:
    """One step: what it draws and at what rate depends on args.seed, args.rank and the step's number alone."""
    p = trainer.progress
    rng, done = random.Random(f"train {args.seed} {args.rank} {p.step}"), p.step / args.steps
    features = None
    if done >= args.talking:
        if trainer.pool is None:
            freeze_vision(trainer)
            singles, pairs = (min(n, max(TALKING.scenes, args.steps // 8)) for n in POOL)
            trainer.pool = Pool(trainer.model, f"pool {args.seed} {args.rank}", singles, pairs, p.step)
        batch, features = trainer.pool.batch(TALKING, p.step, rng)
    else:
        batch = training_batch(SEEING if done < args.seeing else ANSWERING, rng)
    loss, figures = losses(trainer, batch, features)
    loss.backward()
    synchronise(trainer, args.world)
    factors = [rate_factor(p.step, end - done, args.decay) for end in (args.talking, 1.0)]
    figures |= dict(norm=update(trainer, *factors), vision_rate=factors[0], rate=factors[1])
    p.step += 1
    p.images += len(batch.tiles_I) * args.world
    p.questions += len(batch.spans) * args.world
    return figures


def report(args: argparse.Namespace, trainer: Trainer, recent: list[dict[str, float]], seconds: float) -> None:
    """One line on screen, one in the curve; `recent` are the steps of the last `seconds`."""
    p = trainer.progress
    means = {k: round(sum(r[k] for r in recent) / len(recent), 4) for k in recent[0]}
    left = seconds / len(recent) * (args.steps - p.step) / 60
    line = dict(
        step=p.step,
        steps=args.steps,
        minutes=round(p.elapsed / 60, 2),
        minutes_left=round(left, 1),
        cpu_minutes=round(p.cpu / 60, 2),
        images=p.images,
        questions=p.questions,
        **means,
    )
    with open(args.folder / "curve.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    print(
        f"step {p.step} of {args.steps}, {p.elapsed / 60:.1f} min, about {left:.0f} min left, "
        f"patch accuracy {means['p_class']:.2f}, answer loss {means['answer']:.3f}",
        flush=True,
    )


def train(args: argparse.Namespace) -> None:
    """Run one process of the training until it is finished."""
    torch.set_num_threads(1)
    if args.world > 1:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        dist.init_process_group("gloo", rank=args.rank, world_size=args.world)
    trainer, path = build(args.seed), args.folder / "checkpoint.pt"
    if path.exists():
        load(trainer, path)
    p, recent, shown, saved = trainer.progress, [], time.time(), time.time()
    began, began_cpu = time.time() - p.elapsed, time.process_time() - p.cpu
    while p.step < args.steps:
        recent.append(train_step(args, trainer))
        now = time.time()
        p.elapsed, p.cpu = now - began, time.process_time() - began_cpu
        if args.rank == 0 and now - shown > 20:
            report(args, trainer, recent, now - shown)
            recent, shown = [], now
        if args.rank == 0 and now - saved > 60:
            save(trainer, path)
            saved = now
    if args.rank == 0:
        save(trainer, path)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoint and curve; an existing run is continued")
    parser.add_argument("--steps", type=int, default=8000, help="length of the run")
    parser.add_argument("--seeing", type=float, default=0.15, help="part of the run before the first question")
    parser.add_argument("--decay", type=float, default=0.3, help="part of the run in which the learning rate falls")
    parser.add_argument("--talking", type=float, default=0.75, help="part of the run before the vision tower rests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--rank", type=int, default=-1, help="set by the parent process")
    parser.add_argument("--port", type=int, default=0, help="set by the parent process")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> None:
    """Write the options of the run to run.json.

    Raises UserError if the folder holds a run with other options.
    """
    wanted = {name: getattr(args, name) for name in ("steps", "seeing", "decay", "talking", "seed", "world")}
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "run.json"
    if path.exists() and (found := json.loads(path.read_text())) != wanted:
        raise UserError(
            f"{args.folder} holds a run with {found}, not {wanted}; give the same values or another folder."
        )
    write_json(path, wanted)


def main(argv: list[str]) -> None:
    """Start one process for each rank and wait, or be one of them."""
    args = parse(argv)
    if args.rank >= 0:
        return train(args)
    settle(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    command = [sys.executable, "-m", "mllama_graph.tiny.train", *argv, "--port", str(port)]
    workers = [subprocess.Popen([*command, "--rank", str(r)], env=environment) for r in range(args.world)]
    sys.exit(max(abs(w.wait()) for w in workers))


if __name__ == "__main__":
    main(sys.argv[1:])
