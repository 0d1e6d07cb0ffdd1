"""task=train_tiny: train the tiny model from scratch and export it as a checkpoint folder."""

from pathlib import Path

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, write_result
from mllama_graph.plan.resolve import ResolvedTask
from mllama_graph.tasks.options import TrainTinyOptions


def main(run: ResolvedTask) -> None:
    """Train for task.steps steps in task.folder, or continue a run there; then export to its subfolder `tiny`."""
    import torch

    from mllama_graph.tiny import export, train

    options = run.options
    assert isinstance(options, TrainTinyOptions)
    folder = Path(options.folder).expanduser() if options.folder else run.output_dir / "training"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train.main(["--folder", str(folder), "--steps", str(options.steps), "--seed", str(run.seed)])
    except SystemExit as ended:
        if ended.code:
            raise UserError(f"training ended with exit code {ended.code}; run the same command to continue.") from ended
    export.export(torch.load(folder / "checkpoint.pt")["average"], folder / "tiny")
    write_result(run.output_dir, run.asked)
    Progress().say(f"exported to {folder / 'tiny'}; try weights={folder / 'tiny'}")
