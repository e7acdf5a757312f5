"""Where the pages of clients lie in the physical address space.

Such pages are ordinary memory of ordinary processes, so the model chooses their physical addresses. It takes the
machine's address space in halves. The lower one is cut into *places*: whole, aligned pieces of a client's address space
lie in one each, so that pages next to each other stay next to each other and IOMMU pages of up to 1 GiB can be used.
The upper one has 1,024 windows of the same size, for files that are shared (`kernel_model/shared_files.py`).

With 52 bits a place holds a whole address space. An SMMU has 44 or 48 bits of output: there are 256 places then, of
32 or 512 GiB, and a client has one for each piece of its memory that a device reaches.
"""

from __future__ import annotations

import errno

from fakedev.memory import ADDRESS_BITS, PhysicalMemory
from kernel_model.errors import KernelError
from kernel_model.process import TASK_BITS

#: Windows of shared files, as log2.
_FILES_LG2 = 10
#: Places of a narrow address space, as log2.
_PLACES_LG2 = 8
#: Fewer bits leave no room above RAM and registers.
LEAST_BITS = 36


class Placement:
    """The places of one machine. ValueError: fewer than 36 bits of address."""

    def __init__(self, memory: PhysicalMemory) -> None:
        bits = memory.address_bits
        if bits < LEAST_BITS:
            raise ValueError(f"{bits} bits of physical address: the kernel model needs {LEAST_BITS}")
        self.place_lg2 = min(TASK_BITS, bits - 1 - _PLACES_LG2) if bits < ADDRESS_BITS else TASK_BITS
        #: Below it are RAM and the registers of devices, on an Arm board up to 1 TiB.
        floor = max(1 << self.place_lg2, 1 << 40 if bits > 41 else 1 << 32)
        self.first_file = 1 << bits - 1
        self.file_size = self.first_file >> _FILES_LG2
        self.files = 1 << _FILES_LG2
        self._free = list(range(self.first_file - (1 << self.place_lg2), floor - 1, -1 << self.place_lg2))

    def take(self) -> int:
        """A free place. ENOMEM: a limit of the model."""
        if not self._free:
            raise KernelError(errno.ENOMEM, "the model has no room for more memory of clients")
        return self._free.pop()

    def give(self, place: int) -> None:
        self._free.append(place)
