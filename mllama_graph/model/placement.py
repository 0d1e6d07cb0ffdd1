"""Memory for what every step reads from begin to end: weights and pages, on the device that reads them."""

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


@dataclass(frozen=True)
class Placement:
    """Where tensors live. Values are written on `filled_on` and then moved to `device`, where those differ.

    They differ for devices that can't run a kernel outside of a compiled graph.
    """

    device: torch.device
    filled_on: torch.device

    @staticmethod
    def at(device: torch.device) -> "Placement":
        """Values are written where they stay."""
        return Placement(device, device)

    def allocate(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory to write values to.

        On a host it is in huge pages where the system grants them: reads are 3 to 5 % faster than from pages of 4 KiB.
        """
        whole = torch.empty(size, dtype=dtype, device=self.filled_on)
        # A fake tensor of a trace has no memory.
        if whole.is_cpu and type(whole) is Tensor:
            _advise_huge_pages(whole)
        return whole

    def settle(self, filled: Tensor) -> Tensor:
        """What `allocate` gave, with its values, on the device."""
        return filled.to(self.device)

    def zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on the device."""
        return self.settle(self.allocate(size, dtype).zero_())


def _advise_huge_pages(whole: Tensor) -> None:
    """Ask for huge pages in the part of a tensor's memory that is made of whole pages. A refusal costs nothing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-whole.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = whole.data_ptr() + whole.numel() * whole.element_size() - start
    if length >= HUGE_PAGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
