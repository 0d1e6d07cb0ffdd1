"""Steps captured into CUDA graphs: a decode step is replayed as one launch.

`Cuda` wraps all uses of torch.cuda, so that tests can replace it. Nothing here has ever run on a GPU: tests on a CPU
cover which inputs are copied where; capture, replay, pinned copies and the state after a failed capture are not tested.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Runs before a capture: libraries initialise and allocate memory in them, which a capture can't contain.
WARM_UPS = 3
# Alignment of each input in the input buffer, in bytes: that of torch's allocator, and the most that kernels expect.
ALIGNMENT = 512


class Cuda:
    """The device, its capture stream, and the memory pool that all captured steps of a process share."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        """`size` bytes on the device."""
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Tensor:
        """`size` bytes of pinned host memory, from which copies to the device are asynchronous."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def on_host(self, leaf: Tensor) -> bool:
        """Whether an input must be copied to the device."""
        return leaf.device.type == "cpu"

    def event(self) -> Any:
        """An event: record() on the current stream; synchronize() returns at once if nothing was recorded."""
        return torch.cuda.Event()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run WARM_UPS times on the capture stream."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self._stream)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture a run; returns its replay and its output, which each replay overwrites.

        Raises RuntimeError if the run can't be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile, as NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


def _signature(leaf: Any) -> tuple | None:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else None


def _aligned(leaf: Tensor) -> int:
    """Bytes of a tensor, rounded up to ALIGNMENT."""
    return -(-leaf.numel() * leaf.element_size() // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
    """Consecutive views of `buffer` with the shapes and dtypes of `leaves`; None stays None."""
    views: list[Tensor | None] = []
    offset = 0
    for leaf in leaves:
        if leaf is None:
            views.append(None)
            continue
        size = leaf.numel() * leaf.element_size()
        views.append(buffer[offset : offset + size].view(leaf.dtype).view(leaf.shape))
        offset += _aligned(leaf)
    return views


class CapturedStep:
    """A step of one bucket as a CUDA graph: a call copies its first argument, replays, and returns the output.

    `run` is a loaded package or an uncompiled step. `inputs` are its arguments with a harmless `given`, on which the
    step runs WARM_UPS times. `given` is a tree of tensors and None, on the host or on the device; tensors on the host
    are copied together, from pinned memory. Pages, other arguments and the weights inside `run` are captured by
    address: calls must pass the same objects.

    A call waits only for the copy of the previous call, if that is still running. The output is valid until the next
    call of any step that shares `cuda`. If a step can't be captured, `say` gets a message and its calls run uncaptured.
    """

    def __init__(self, run: Callable, inputs: tuple, cuda: Cuda, say: Callable[[str], None]):
        self._cuda = cuda
        given, *self._fixed = inputs
        leaves, self._tree = pytree.tree_flatten(given)
        self._signatures = [_signature(leaf) for leaf in leaves]
        size = sum(_aligned(leaf) for leaf in leaves if leaf is not None)
        self._buffer, self._pinned, self._copied = cuda.buffer(size), cuda.pinned(size), cuda.event()
        self._static, self._staged = _views(self._buffer, leaves), _views(self._pinned, leaves)
        self._given = pytree.tree_unflatten(self._static, self._tree)
        self._run, self._output = lambda: run(self._given, *self._fixed), None
        self._copy(leaves)
        # An error here would occur without capture as well.
        cuda.warm_up(self._run)
        try:
            replay, self._output = cuda.capture(self._run)
            self._replay: Callable[[], None] | None = replay
        except RuntimeError as error:
            self._replay = None
            say(f"a step can't be captured in a CUDA graph, and runs without: {error}")

    @property
    def captured(self) -> bool:
        """Whether calls replay a CUDA graph."""
        return self._replay is not None

    def __call__(self, given: Any, *fixed: Any, fill: Callable[[Any], Any] | None = None) -> Any:
        """Return the step's output. Raises ValueError if an input differs from what the step was captured with.

        `fill`: gives the inputs with other ids_T, after they were copied (engine/feedback.py).
        """
        leaves, tree = pytree.tree_flatten(given)
        if tree != self._tree or [_signature(leaf) for leaf in leaves] != self._signatures:
            raise ValueError(self._mismatch(given))
        if len(fixed) != len(self._fixed) or not all(map(_same, fixed, self._fixed)):
            raise ValueError(
                "the pages are not those that the step was captured with: a CUDA graph holds their "
                "addresses. Capture the step again."
            )
        self._copy(leaves)
        if fill:
            self._given.ids_T.copy_(fill(self._given).ids_T)
        if self._replay is None:
            return self._run()
        self._replay()
        return self._output

    def _copy(self, leaves: list[Tensor | None]) -> None:
        present = [
            (static, staged, leaf)
            for static, staged, leaf in zip(self._static, self._staged, leaves)
            if leaf is not None and static is not None and staged is not None
        ]
        if not all(self._cuda.on_host(leaf) for _, _, leaf in present):
            for static, _, leaf in present:
                static.copy_(leaf, non_blocking=True)
            return
        self._copied.synchronize()
        for _, staged, leaf in present:
            staged.copy_(leaf)
        self._buffer.copy_(self._pinned, non_blocking=True)
        self._copied.record()

    def _mismatch(self, given: Any) -> str:
        paths, tree = pytree.tree_flatten_with_path(given)
        if tree != self._tree:
            return f"inputs of another form than the step's: {tree}, not {self._tree}. Use the inputs of its bucket."
        faults = [
            f"{pytree.keystr(path) or 'input'} is {_described(_signature(leaf))}, not {_described(signature)}"
            for (path, leaf), signature in zip(paths, self._signatures)
            if _signature(leaf) != signature
        ]
        return f"{'; '.join(faults)}: a captured step takes its bucket's shapes. Pad the inputs, or use another bucket."


def _described(signature: tuple | None) -> str:
    return "None" if signature is None else f"{signature[1]} {list(signature[0])}".removeprefix("torch.")


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same tensors."""
    if one is other:
        return True
    ours, theirs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs))
