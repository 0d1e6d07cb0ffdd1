"""task=train_tiny: train the tiny model from nothing and export it as a checkpoint folder."""

from dataclasses import asdict
from pathlib import Path

from mllama_graph.core.config import Run, UserError
from mllama_graph.core.report import Progress, write_result


def main(run: Run) -> None:
    """Train for task.steps steps in task.folder, or go on with what is there; then export to its folder `tiny`."""
    import torch

    from mllama_graph.tiny import export, train

    folder = Path(run.task.folder).expanduser() if run.task.folder else Path(run.output_dir) / "training"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train.main(["--folder", str(folder), "--steps", str(run.task.steps), "--seed", str(run.seed)])
    except SystemExit as ended:
        if ended.code:
            raise UserError(f"training ended with exit code {ended.code}; run the same command to go on.") from ended
    export.export(torch.load(folder / "checkpoint.pt")["average"], folder / "tiny")
    write_result(Path(run.output_dir), asdict(run))
    Progress().say(f"exported to {folder / 'tiny'}; try weights={folder / 'tiny'}")
