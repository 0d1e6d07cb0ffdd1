"""Train the tiny model in one or more single-threaded processes: `python -m mllama_graph.tiny.train --folder FOLDER`.

Training has three stages. In `seeing`, the vision encoder and cross-attention learn to read scenes from dense pages and
the readout head. In `answering`, the whole model learns to answer questions. In `talking`, the vision encoder is frozen
and the language model trains on precomputed features. The learning rate of the vision encoder falls linearly before it
is frozen, that of the language model before the end. A run can be resumed: a step depends on nothing but the state of
the run, the seed and the number of the step. Progress goes to stdout and to curve.jsonl.
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
from mllama_graph.tiny.initial import initialise
from mllama_graph.tiny.labels import IGNORE, digit_tokens
from mllama_graph.tiny.layers import Shape
from mllama_graph.tiny.model import Mllama
from mllama_graph.tiny.pool import Pool
from mllama_graph.tiny.samples import Batch, Mix, random_batch

SEEING = Mix(pages=14, readouts=7, scenes=0, questions=0, pairs=0, talks=0)
ANSWERING = Mix(pages=5, readouts=0, scenes=11, questions=7, pairs=4, talks=2)
TALKING = Mix(pages=0, readouts=0, scenes=14, questions=7, pairs=2, talks=1)
POOL = (900, 150)  # at most: single scenes and pairs of scenes with precomputed features
# Peak learning rate and weight decay by kind of parameter. Query and key weights of the local vision layers are
# initialised to attend to a neighbouring patch; at the rate of the other hidden weights they lose it within 300 steps.
RATES = {"hidden": (0.016, 0.02), "neighbour": (0.0016, 0.0), "table": (1.5e-3, 0.02), "vector": (4.5e-3, 0.0)}
# The answer loss is a mean over tokens, of which only one in ten decides whether an answer is right.
ANSWER_WEIGHT, DIGIT_WEIGHT = 10.0, 4.0  # DIGIT_WEIGHT: of a digit relative to any other token
PATCH_WEIGHT, READOUT_WEIGHT, POINTING_WEIGHT, ASKED_WEIGHT = 2.0, 0.5, 0.4, 0.7
WARM_UP, FLOOR = 80, 0.01  # of the learning rate: steps, fraction of the peak
CLIP = 1.0  # gradient norm
AVERAGE_DECAY = 0.98  # of the moving average of the weights, over about 50 steps; 500 lag too far behind


@dataclass
class Progress:
    """Progress of a run, saved with every checkpoint."""

    step: int = 0
    elapsed: float = 0.0  # seconds, without the time between restarts
    cpu: float = 0.0  # CPU seconds of process 0
    images: int = 0
    questions: int = 0


@dataclass
class Trainer:
    """The state of a run: model, auxiliary heads, optimizers and the moving average of the weights."""

    model: Mllama
    heads: Heads
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, torch.Tensor]
    token_weights: torch.Tensor
    progress: Progress = field(default_factory=Progress)
    pool: Pool | None = None  # built at the first step of `talking`

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are not frozen."""
        return [p for p in (*self.model.parameters(), *self.heads.parameters()) if p.requires_grad]


def optimizer_kind(name: str, p: torch.nn.Parameter) -> str:
    """The row of RATES for a parameter: the 2-D weights of layers go to Muon, all others to AdamW."""
    if p.dim() != 2 or "layers." not in name:
        return "vector" if p.dim() == 1 else "table"
    neighbour = "vision_model.transformer" in name and ("q_proj" in name or "k_proj" in name)
    return "neighbour" if neighbour else "hidden"


def build(seed: int) -> Trainer:
    """A new model with its optimizers; each parameter group has its `peak` rate and a flag `vision`."""
    model = Mllama(Shape())
    initialise(model, seed)
    heads = Heads(model.s)
    parameters: dict[tuple[str, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, p in (*model.named_parameters(), *heads.named_parameters()):
        vision = name.startswith(("model.vision_model", "patch", "side"))
        parameters[optimizer_kind(name, p), vision].append(p)

    def groups(*kinds: str) -> list[dict[str, Any]]:
        return [
            dict(params=params, lr=RATES[kind][0], peak=RATES[kind][0], weight_decay=RATES[kind][1], vision=vision)
            for (kind, vision), params in parameters.items()
            if kind in kinds
        ]

    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups("table", "vector"), betas=(0.9, 0.98), fused=True),
        # "original" multiplies the rate by sqrt(max(1, rows / columns)).
        torch.optim.Muon(groups("hidden", "neighbour"), momentum=0.95, ns_steps=5, adjust_lr_fn="original"),
    ]
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    token_weights = torch.ones(model.lm_head.out_features)
    token_weights[list(digit_tokens())] = DIGIT_WEIGHT
    return Trainer(model, heads, optimizers, average, token_weights)


def freeze_vision(trainer: Trainer) -> None:
    """Set the vision encoder to its moving average and freeze it."""
    vision = trainer.model.model.vision_model
    prefix = "model.vision_model."
    vision.load_state_dict({k.removeprefix(prefix): v for k, v in trainer.average.items() if k.startswith(prefix)})
    vision.requires_grad_(False)
    trainer.heads.patch.requires_grad_(False)
    trainer.heads.side.requires_grad_(False)


def losses(trainer: Trainer, batch: Batch, features: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, float]]:
    """The training loss and the figures of the curve; `features`, if given, replace the vision encoder's output."""
    model, heads, s = trainer.model, trainer.heads, trainer.model.s
    zero = torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16):
        patch, accuracy = zero, [0.0] * 5
        if features is None:
            features = model.encode_images(batch.tiles, batch.ratio_I, batch.tiles_I)
            patch, accuracy = heads.patch_loss(features, batch)
        out = model.forward_text(batch.packed.text, features, batch.tiles_I)
        readout, read_right = heads.readout_loss(out.states, batch)
        pointing, hit, comparing, compared, asked = zero, 0.0, zero, 0.0, zero
        if len(batch.pointing.rows):
            with torch.autocast("cpu", enabled=False):
                pointing, hit = pointing_loss(s, out.scores, batch)
                comparing, compared = comparing_loss(s, out.scores, batch)
                asked = asked_loss(heads, out.states, batch)
        targets = batch.packed.targets_T
        rows = targets != IGNORE
        answer = zero
        if rows.any():
            answer = F.cross_entropy(model.lm_head(out.last[rows]).float(), targets[rows], trainer.token_weights)
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
        **dict(zip(("p_class", "p_color", "p_left", "p_top", "p_side"), accuracy)),
    )
    auxiliary = POINTING_WEIGHT * (pointing + comparing) + ASKED_WEIGHT * asked
    return ANSWER_WEIGHT * answer + PATCH_WEIGHT * patch + READOUT_WEIGHT * readout + auxiliary, figures


def all_reduce_gradients(trainer: Trainer, world: int) -> None:
    """Average the gradients over the processes; parameters without one get zeros."""
    gradients = []
    for p in trainer.parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    if world == 1:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def rate_factor(step: int, left: float, decay: float) -> float:
    """Linear warm-up, constant, then linear to FLOOR over the last `decay` of the run, of which `left` remains."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, max(FLOOR, left / decay))


def update(trainer: Trainer, vision_factor: float, text_factor: float) -> float:
    """Step the optimizers and the moving average. Returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, CLIP)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (vision_factor if group["vision"] else text_factor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    keep = min(AVERAGE_DECAY, 1 - 1 / (1 + 0.1 * trainer.progress.step))
    with torch.no_grad():
        for k, v in trainer.model.state_dict().items():
            trainer.average[k].lerp_(v, 1 - keep)
    return float(norm)


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint atomically."""
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
    """Load a checkpoint that `save` wrote."""
    state = torch.load(path)
    trainer.model.load_state_dict(state["model"])
    trainer.heads.load_state_dict(state["heads"])
    trainer.average = state["average"]
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    trainer.progress = Progress(**state["progress"])


def train_step(args: argparse.Namespace, trainer: Trainer) -> dict[str, float]:
    """One training step. Its batch and learning rates depend only on the options and the number of the step."""
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
        batch = random_batch(SEEING if done < args.seeing else ANSWERING, rng)
    loss, figures = losses(trainer, batch, features)
    loss.backward()
    all_reduce_gradients(trainer, args.world)
    vision, text = (rate_factor(p.step, end - done, args.decay) for end in (args.talking, 1.0))
    figures |= dict(norm=update(trainer, vision, text), vision_rate=vision, rate=text)
    p.step += 1
    p.images += len(batch.tiles_I) * args.world
    p.questions += len(batch.packed.spans) * args.world
    return figures


def report(args: argparse.Namespace, trainer: Trainer, recent: list[dict[str, float]], seconds: float) -> None:
    """Print a line and append one to curve.jsonl; `recent` has the figures of the steps of the last `seconds`."""
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
    """Run one process until training is finished."""
    torch.set_num_threads(1)
    if args.world > 1:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        dist.init_process_group("gloo", rank=args.rank, world_size=args.world)
    trainer, path = build(args.seed), args.folder / "checkpoint.pt"
    if path.exists():
        load(trainer, path)
    p, shown, saved = trainer.progress, time.time(), time.time()
    recent: list[dict[str, float]] = []
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
    parser.add_argument("--folder", type=Path, required=True, help="folder of the run; an existing run is resumed")
    parser.add_argument("--steps", type=int, default=8000, help="training steps")
    parser.add_argument("--seeing", type=float, default=0.15, help="end of the first stage as a fraction of the run")
    parser.add_argument("--decay", type=float, default=0.3, help="fraction of the run in which a learning rate falls")
    parser.add_argument("--talking", type=float, default=0.75, help="start of the last stage as a fraction of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=2, help="number of single-threaded processes")
    parser.add_argument("--rank", type=int, default=-1, help="set by the parent process")
    parser.add_argument("--port", type=int, default=0, help="set by the parent process")
    return parser.parse_args(argv)


def record_options(args: argparse.Namespace) -> None:
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
    """Start one process per rank and wait for them; with --rank, run that rank."""
    args = parse(argv)
    if args.rank >= 0:
        return train(args)
    record_options(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    command = [sys.executable, "-m", "mllama_graph.tiny.train", *argv, "--port", str(port)]
    workers = [subprocess.Popen([*command, "--rank", str(r)], env=environment) for r in range(args.world)]
    sys.exit(max(abs(w.wait()) for w in workers))


if __name__ == "__main__":
    main(sys.argv[1:])
