"""Copies between the host and a device that neither waits for.

A copy from or to pinned memory takes its place in the device's queue. Others wait until the queue is empty.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor


def sent(given: Any, device: torch.device, without: Collection[str] = ()) -> Any:
    """A tree of named tuples, tensors and None on the device, except the fields named in `without`.

    Tensors of the host may be changed at once. Those that are on the device already stay the same.
    """
    if given is None or device.type == "cpu":
        return given
    if isinstance(given, Tensor):
        return given if given.device.type == device.type else given.pin_memory().to(device, non_blocking=True)
    fields = {name: sent(value, device, without) for name, value in given._asdict().items() if name not in without}
    return given._replace(**fields)


def fetched(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; the result waits for the copy, and gives it."""
    if x.device.type == "cpu":
        return lambda: x
    copy, done = x.to("cpu", non_blocking=True), getattr(torch, x.device.type).Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait
