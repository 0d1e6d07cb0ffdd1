"""Training: resumed runs equal unbroken ones, and the training task exports a checkpoint."""

import json
from dataclasses import asdict

import pytest
import torch
from commands import run
from safetensors.torch import load_file

from mllama_graph.core.config import UserError
from mllama_graph.tiny import train
from mllama_graph.tiny.export import checkpoint_name
from mllama_graph.tiny.samples import Mix


def weights(trainer):
    """Every trained tensor that the next step depends on."""
    return [*trainer.model.state_dict().values(), *trainer.heads.state_dict().values(), *trainer.average.values()]


def test_a_resumed_run_has_the_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    # Small batches: at most two of each kind.
    for name in ("SEEING", "ANSWERING", "TALKING"):
        few = {kind: min(count, 2) for kind, count in asdict(getattr(train, name)).items()}
        monkeypatch.setattr(train, name, Mix(**few))
    # One step of dense pages, one of answers, two on precomputed features.
    args = train.parse(["--folder", str(tmp_path), "--steps", "4", "--talking", "0.5", "--world", "1", "--rank", "0"])
    unbroken, path = train.build(0), tmp_path / "checkpoint.pt"
    for step in range(args.steps):
        # The second and the last step are made by a process that was stopped before, too.
        stopped = train.build(1) if step in (1, 3) else None
        if stopped:
            train.save(unbroken, path)
            train.load(stopped, path)
            train.train_step(args, stopped)
        train.train_step(args, unbroken)
        if stopped:
            assert all(torch.equal(a, b) for a, b in zip(weights(unbroken), weights(stopped), strict=True)), step


def test_a_folder_resumes_only_a_run_with_the_same_options(tmp_path):
    train.record_options(train.parse(["--folder", str(tmp_path), "--steps", "4"]))
    train.record_options(train.parse(["--folder", str(tmp_path), "--steps", "4"]))
    with pytest.raises(UserError, match="'steps': 4"):
        train.record_options(train.parse(["--folder", str(tmp_path), "--steps", "5"]))


def test_the_training_task_exports_the_moving_average(tmp_path):
    done = run(tmp_path / "out", "task=train_tiny", "task.steps=1", f"task.folder={tmp_path / 'training'}")
    assert done.code == 0, done.err
    stored = load_file(tmp_path / "training" / "tiny" / "model.safetensors")
    average = torch.load(tmp_path / "training" / "checkpoint.pt")["average"]
    assert {checkpoint_name(name) for name in average} == set(stored)
    assert all(torch.equal(stored[checkpoint_name(name)], average[name].bfloat16()) for name in average)
    assert json.loads((tmp_path / "training" / "run.json").read_text())["steps"] == 1
