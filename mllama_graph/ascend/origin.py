"""Which line of the model an operation comes from, read from the stack trace that Dynamo keeps for it."""

import re
from pathlib import Path

import torch
import torch_npu

PACKAGE = Path(__file__).parents[1]
_TORCH = (Path(torch.__file__).parent, Path(torch_npu.__file__).parent)
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)\n\s*(.*)')


def origin(trace: str) -> str:
    """The innermost line of the model in a stack trace with its source, then the innermost line that it calls."""
    frames = [
        match.groups()
        for match in _FRAME.finditer(trace)
        if not any(folder in Path(match[1]).parents for folder in _TORCH)
    ]
    model = [frame for frame in frames if PACKAGE / "model" in Path(frame[0]).parents]
    if not model:
        return " <- ".join(_place(frame) for frame in frames[-1:]) or "no line is known"
    called = "" if frames[-1] == model[-1] else f" <- {_place(frames[-1])}"
    return f"{_place(model[-1])}: {model[-1][3]}{called}"


def _place(frame: tuple[str, ...]) -> str:
    path, line, function, _ = frame
    inside = PACKAGE.parent in Path(path).parents
    return f"{Path(path).relative_to(PACKAGE.parent) if inside else Path(path).name}:{line} in {function}"
