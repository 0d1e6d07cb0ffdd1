"""The keys of task=chat. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from mllama_graph.core.config import Run, TaskOptions
from mllama_graph.core.errors import UserError
from mllama_graph.inputs.image_sources import list_images


@dataclass
class ChatOptions(TaskOptions):
    """task=chat: a conversation in the terminal. `history`: a file of typed lines."""

    INTERACTIVE: ClassVar[bool] = True

    name: str = "chat"
    history: str | None = None

    def prepared(self, run: Run) -> Run:
        if run.requests is not None:
            raise UserError("task=chat reads messages from the terminal or from stdin. Leave requests= out.")
        return run

    def images_asked(self, run: Run) -> int:
        return len(list_images(run.image))
