"""Memory for the tensors that every step reads: weights and pages, on the device that reads them."""

import contextlib
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

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
        a page is first written in a third of the time.
        """
        whole = torch.empty(size, dtype=dtype, device=self.filled_on)
        # A fake tensor (while tracing) has no memory.
        held = whole.is_cpu and type(whole) is Tensor
        if held and whole.nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            return _huge_pages(whole.nbytes).view(dtype).view(size)
        return whole

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
