"""The keys of task=quantize. No torch."""

from dataclasses import dataclass
from pathlib import Path

from mllama_graph.core.config import QUANTS, Run, TaskOptions, one_of
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.inputs.request_file import most_images, read_lines

# The value of weights= for shapes without values.
SHAPES_ONLY = "meta"
# Values of task.rounding: to the nearest code, scales by squared error; or with error feedback.
MSE, GPTQ = "mse", "gptq"
CALIBRATION = "task.calibration"


@dataclass
class QuantizeOptions(TaskOptions):
    """task=quantize: write the checkpoint that quant= gives to `folder`.

    `rounding`: MSE or GPTQ. `calibration`: the requests file that GPTQ's Hessians are gathered from.
    """

    name: str = "quantize"
    folder: str | None = None
    rounding: str = MSE
    calibration: str | None = None

    def check(self) -> None:
        one_of("task.rounding", self.rounding, (MSE, GPTQ))
        if (self.rounding == GPTQ) != (self.calibration is not None):
            raise UserError(
                "task.rounding=gptq and task.calibration=FILE.jsonl, requests like those that the model will get, "
                "belong together. Give both or neither."
            )

    def needs(self, device: Device) -> str:
        """RANKS where requests are served."""
        return self.RANKS if self.rounding == GPTQ else self.MODEL

    def images_asked(self, run: Run) -> int:
        if self.calibration is None:
            return 0
        path = Path(self.calibration).expanduser()
        return most_images(read_lines(path, CALIBRATION), path.parent)

    def prepared(self, run: Run) -> Run:
        """Refuse what would be noticed only after the checkpoint was read."""
        if self.folder is None:
            raise UserError("task=quantize needs a folder for the checkpoint: task.folder=OUT.")
        if run.quant == "none":
            raise UserError(f"task=quantize needs a format: quant= one of {', '.join(QUANTS[1:])}.")
        if "embedding" in run.quant_parts:
            raise UserError(
                "task=quantize writes the embedding as it is: engines read a quantised one from few formats. Leave "
                "embedding out of quant_parts=; quant= of a run can hold it in int8."
            )
        if self.rounding == GPTQ and (run.quant not in ("w4a16", "w4a8") or "vision" in run.quant_parts or run.tp > 1):
            raise UserError(
                "task.rounding=gptq is for quant=w4a16 and w4a8 at tp=1, without the vision tower: codes of 8 bits "
                "lose almost nothing. Leave it out."
            )
        if self.calibration is not None:
            next(read_lines(Path(self.calibration).expanduser(), CALIBRATION))
        if run.weights == SHAPES_ONLY:
            raise UserError(f"weights={SHAPES_ONLY} has no values to quantise. Use a checkpoint, or weights=random.")
        folder = Path(self.folder).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"task.folder={folder} exists and is not an empty folder. Choose another, or delete it.")
        return run
