"""Memory for the tensors that every step reads: weights and pages, on the device that reads them."""

import contextlib
import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from mllama_graph.core.errors import UserError

HUGE_PAGE = 1 << 21


@dataclass(frozen=True)
class Placement:
    """Devices of tensors: values are written on `filled_on` and then moved to `device`, if those differ.

    They differ for a device that can't run kernels outside of compiled graphs.
    """

    device: torch.device
    filled_on: torch.device

    @staticmethod
    def at(device: torch.device) -> "Placement":
        """A placement whose values are written on `device` itself."""
        return Placement(device, device)

    def allocate(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory to be filled with values.

        On a host it uses huge pages if the system grants them: reads are faster than from pages of 4 KiB, and
        a page is first written in a third of the time. Raises UserError where the host refuses the memory.
        """
        try:
            whole = torch.empty(size, dtype=dtype, device=self.filled_on)
            # A fake tensor (while tracing) has no memory.
            held, needed = whole.is_cpu and type(whole) is Tensor, whole.nbytes
            if held and needed >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
                del whole
                return _huge_pages(needed).view(dtype).view(size)
            return whole
        except (OSError, RuntimeError) as error:
            # As torch and the system say it of a host's memory.
            if "allocate memory" not in str(error):
                raise
            needed = math.prod(size) * dtype.itemsize
            raise UserError(
                f"{needed / 1e6:.0f} MB for a weight or for K/V pages are refused by the system, which limits the "
                "memory of this process. Raise the limit (ulimit -v), or lower batch, max_input_length or max_images."
            ) from error

    def settle(self, filled: Tensor) -> Tensor:
        """Move a filled tensor from `allocate` to the device."""
        return filled.to(self.device)

    def zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on the device."""
        return self.settle(self.allocate(size, dtype).zero_())


def _huge_pages(size: int) -> Tensor:
    """New memory of `size` bytes, aligned to huge pages, and in huge pages except for the end that does not fill one.

    Memory from torch would not do: parts of it may have been used and freed before, and pages of 4 KiB that exist stay
    as they are when huge pages are requested. The system may refuse huge pages; that costs only speed.
    """
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
