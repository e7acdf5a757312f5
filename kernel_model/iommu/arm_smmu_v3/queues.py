"""The driver's ends of an SMMUv3's queues: commands that it sends, events and page requests that it takes.

Mirrors the queue half of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3. Left out: the lock-free insertion of many
processors, waiting by MSI or WFE (completion is seen in CONS, and the hardware is done when the store to PROD returns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fakedev.machine import Machine
from fakedev.smmuv3 import commands, regs
from kernel_model.errors import KernelBug
from kernel_model.page_alloc import PageAllocator

#: log2 of the bytes that a queue may have (Q_MAX_SZ_SHIFT with the arm64 defconfig).
Q_MAX_SZ_SHIFT = 20


class Queue:
    """A circular queue of `words` 64-bit words an entry in RAM, and the addresses of its two index registers."""

    def __init__(
        self, machine: Machine, pages: PageAllocator, lg2: int, words: int, prod_register: int, cons_register: int
    ) -> None:
        entry_lg2 = words.bit_length() + 2
        self.lg2 = min(lg2, Q_MAX_SZ_SHIFT - entry_lg2)
        self.base = pages.alloc(1 << self.lg2 + entry_lg2)
        self.prod = self.cons = 0
        self._words = machine.memory.words
        self._mmio = machine.mmio
        self._entry = words
        self._prod_register = prod_register
        self._cons_register = cons_register

    @property
    def q_base(self) -> int:
        """What the queue's BASE register gets."""
        return regs.Q_BASE_RWA | self.base & regs.Q_BASE_ADDR_MASK | regs.Q_BASE_LOG2SIZE.put(self.lg2)

    def _index(self, value: int) -> int:
        return (self.base >> 3) + (value & (1 << self.lg2) - 1) * self._entry

    def _next(self, value: int) -> int:
        return value + 1 & (2 << self.lg2) - 1


class CommandQueue(Queue):
    """What the driver tells the unit."""

    def __init__(self, machine: Machine, pages: PageAllocator, base: int, lg2: int) -> None:
        super().__init__(machine, pages, lg2, 2, base + regs.CMDQ_PROD, base + regs.CMDQ_CONS)

    def issue(self, batch: Sequence[tuple[int, int]], sync: bool = True) -> None:
        """arm_smmu_cmdq_issue_cmdlist(): queue commands, behind them a SYNC unless told not to.

        KernelBug: the unit did not take them all.
        """
        words = self._words
        for low, high in [*batch, commands.sync(commands.SIG_SEV)] if sync else batch:
            index = self._index(self.prod)
            words[index] = low
            words[index + 1] = high
            self.prod = self._next(self.prod)
            if (self.prod ^ self.cons) == 1 << self.lg2:
                self._ring()
        self._ring()

    def _ring(self) -> None:
        self._mmio.write(self._prod_register, 4, self.prod)
        self.cons = self._mmio.read(self._cons_register, 4) & (2 << self.lg2) - 1
        if self.cons != self.prod:
            raise KernelBug(f"the command queue stopped at {self.cons:#x}, PROD is {self.prod:#x}")

    def skip_err(self) -> str:
        """arm_smmu_cmdq_skip_err(): make a SYNC of a command that the unit cannot read; what went wrong, in words."""
        cons = self._mmio.read(self._cons_register, 4)
        error = regs.CMDQ_CONS_ERR.get(cons)
        if error == regs.CERROR_ILL:
            index = self._index(cons)
            text = f"CMDQ error: Illegal command {self._words[index]:#x} {self._words[index + 1]:#x}"
            self._words[index], self._words[index + 1] = commands.sync()
            return text
        return "CMDQ error: " + ("None", "", "Abort on command fetch", "ATC invalidate timeout")[error]


class OutputQueue(Queue):
    """What the unit tells the driver."""

    def drain(self, overflowed: Callable[[], None]) -> Iterator[list[int]]:
        """The records that are there, each taken when it is asked for, until there is none.

        `overflowed` is called each time that records turn out to be lost; all of it is acknowledged in the end only.
        """
        mask = (2 << self.lg2) - 1
        while True:
            while (self.prod ^ self.cons) & mask:
                index = self._index(self.cons)
                record: list[int] = self._words[index : index + self._entry].tolist()
                self.cons = self.cons & regs.Q_OVERFLOW_FLAG | self._next(self.cons & mask)
                self._mmio.write(self._cons_register, 4, self.cons)
                yield record
            prod = self._mmio.read(self._prod_register, 4)
            if (prod ^ self.prod) & regs.Q_OVERFLOW_FLAG:
                overflowed()
            self.prod = prod
            if not (prod ^ self.cons) & mask:
                break
        if (self.prod ^ self.cons) & regs.Q_OVERFLOW_FLAG:  # queue_sync_cons_ovf()
            self.cons = self.prod & regs.Q_OVERFLOW_FLAG | self.cons & mask
            self._mmio.write(self._cons_register, 4, self.cons)
