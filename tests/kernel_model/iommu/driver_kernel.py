"""As much of a kernel as the drivers of a machine's IOMMUs ask for."""

from types import SimpleNamespace

from kernel_model.irq import Interrupts
from kernel_model.page_alloc import PageAllocator
from kernel_model.vfs import FileSystem


def driver_kernel(box):
    """For `attach_drivers`: a kernel of 7.3 with the machine, its memory, its interrupts and its files."""
    return SimpleNamespace(
        machine=box, pages=PageAllocator(box.memory), interrupts=Interrupts(box), files=FileSystem(), release="7.3"
    )
