"""Profiles an NPU with torch_npu. Never run on an NPU."""

import gzip
import json
from pathlib import Path
from typing import Any


def npu_profile(folder: Path, level: int, aic_metrics: str) -> Any:
    """torch_npu's profiler, which writes its own output to `folder`. `aic_metrics`: the AI core counters to record."""
    import torch_npu

    npu = torch_npu.profiler
    return npu.profile(
        activities=[npu.ProfilerActivity.CPU, npu.ProfilerActivity.NPU],
        on_trace_ready=npu.tensorboard_trace_handler(str(folder)),
        experimental_config=npu._ExperimentalConfig(
            profiler_level=getattr(npu.ProfilerLevel, f"Level{level}"), aic_metrics=getattr(npu.AiCMetrics, aic_metrics)
        ),
    )


def take_trace(folder: Path, path: Path) -> None:
    """Write torch_npu's trace to `path`, gzipped. Its own output is kept for MindStudio Insight."""
    found = next(folder.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json"))
    events = json.loads(found.read_text(encoding="utf8"))
    # Some versions write times as strings.
    for event in events:
        event |= {name: float(event[name]) for name in ("ts", "dur") if name in event}
    with gzip.open(path, "wt", encoding="utf8") as file:
        json.dump({"traceEvents": events}, file)
