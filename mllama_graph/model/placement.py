"""Memory for the tensors that every step reads: weights and pages, on the device that reads them."""

import ctypes
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

        On a host it uses huge pages if the system grants them: reads are 3 to 5 % faster than from pages of 4 KiB.
        """
        whole = torch.empty(size, dtype=dtype, device=self.filled_on)
        # A fake tensor (while tracing) has no memory.
        if whole.is_cpu and type(whole) is Tensor:
            _advise_huge_pages(whole)
        return whole

    def settle(self, filled: Tensor) -> Tensor:
        """Move a filled tensor from `allocate` to the device."""
        return filled.to(self.device)

    def zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on the device."""
        return self.settle(self.allocate(size, dtype).zero_())


def _advise_huge_pages(whole: Tensor) -> None:
    """Request huge pages for the page-aligned part of a tensor's memory. A refusal is harmless."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-whole.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = whole.data_ptr() + whole.numel() * whole.element_size() - start
    if length >= HUGE_PAGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
