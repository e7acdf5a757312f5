"""The configuration space that a VFIO client sees.

Mirrors drivers/vfio/pci/vfio_pci_config.c: a map of which capability owns each byte, and for each capability two masks:
bits that are virtual (kept in `vconfig`, never read from the function) and bits that may be written. What no capability
owns goes to the function as it is. BARs are wholly virtual, so probing them moves nothing; the command register passes
through except for Interrupt Disable; MSI is virtual, because the kernel programs the real message.

Left out: capabilities that no function of the model's machines has (power management, VPD, AF, MSI-X, and of the
extended ones all but ATS, PRI, PASID and ACS): meeting one is a KernelBug. Also virtual functions, expansion ROMs,
recovery from backdoor resets.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.pci import (
    PCI_BASE_ADDRESS_0,
    PCI_CACHE_LINE_SIZE,
    PCI_CAP_ID_MSI,
    PCI_CAPABILITY_LIST,
    PCI_COMMAND,
    PCI_COMMAND_INTX_DISABLE,
    PCI_COMMAND_IO,
    PCI_COMMAND_MEMORY,
    PCI_DEVICE_ID,
    PCI_EXT_CAP_START,
    PCI_INTERRUPT_LINE,
    PCI_INTERRUPT_PIN,
    PCI_MSI_ADDRESS_HI,
    PCI_MSI_ADDRESS_LO,
    PCI_MSI_FLAGS,
    PCI_MSI_FLAGS_64BIT,
    PCI_MSI_FLAGS_ENABLE,
    PCI_MSI_FLAGS_QSIZE,
    PCI_STATUS,
    PCI_STATUS_CAP_LIST,
    PCI_VENDOR_ID,
)
from fakedev.pcie import (
    PCI_CAP_ID_EXP,
    PCI_EXP_DEVCAP,
    PCI_EXP_DEVCAP_FLR,
    PCI_EXP_DEVCTL,
    PCI_EXP_DEVCTL_BCR_FLR,
    PCI_EXP_TYPE_RC_END,
    PCI_EXT_CAP_ID_ACS,
    PCI_EXT_CAP_ID_ATS,
    PCI_EXT_CAP_ID_PASID,
    PCI_EXT_CAP_ID_PRI,
)
from kernel_model.errors import KernelBug, KernelError
from uapi.vfio import VFIO_PCI_MSI_IRQ_INDEX

if TYPE_CHECKING:
    from kernel_model.vfio.pci import VfioPciDevice

_HEADER_SIZE = 0x40
_PCI_LATENCY_TIMER, _PCI_BIST, _PCI_BASE_ADDRESS_5, _PCI_ROM_ADDRESS = 0x0D, 0x0F, 0x24, 0x30
_PCI_CAP_LIST_NEXT = 1
_PCI_MSI_DATA_64, _PCI_MSI_DATA_32 = 12, 8
_PCI_CAP_ID_NULL = 0
_PCI_EXP_DEVCTL2 = 0x28
_DEVCTL_PAYLOAD, _DEVCTL_PHANTOM, _DEVCTL_READRQ, _DEVCTL2_ARI = 0x00E0, 0x0200, 0x7000, 0x0020
#: Lengths of extended capabilities (`pci_ext_cap_length`); 0: clients do not see it.
_EXTENDED = {PCI_EXT_CAP_ID_ACS: 8, PCI_EXT_CAP_ID_ATS: 8, PCI_EXT_CAP_ID_PRI: 16, PCI_EXT_CAP_ID_PASID: 0}
#: Ids in the map for bytes that no capability owns, and for the header itself.
_BASIC, _INVALID = 0, 0xFF

#: (position, width, permission, offset in the capability) -> value; the same with the value to write.
ReadFn = Callable[[int, int, "PermBits", int], int]
WriteFn = Callable[[int, int, "PermBits", int, int], None]


class PermBits:
    """`struct perm_bits`: which bits of a capability are virtual, which may be written, and who does it."""

    def __init__(self, size: int, read: ReadFn, write: WriteFn) -> None:
        size = -(-size // 4) * 4
        self.virt = bytearray(size)
        self.write_mask = bytearray(size)
        self.read = read
        self.write = write

    def set(self, offset: int, width: int, virt: int, write: int) -> None:
        self.virt[offset : offset + width] = virt.to_bytes(width, "little")
        self.write_mask[offset : offset + width] = write.to_bytes(width, "little")


def _is_bar(offset: int) -> bool:
    return PCI_BASE_ADDRESS_0 <= offset < _PCI_BASE_ADDRESS_5 + 4 or _PCI_ROM_ADDRESS <= offset < _PCI_ROM_ADDRESS + 4


class VirtualConfig:
    """The virtual configuration space of one open device."""

    def __init__(self, device: VfioPciDevice) -> None:
        """vfio_config_init(): fill it from the function."""
        self._device = device
        self._function = device.function
        size = self._function.config_size
        self.vconfig = bytearray(size)
        self._map = bytearray(_HEADER_SIZE) + bytes([_INVALID]) * (size - _HEADER_SIZE)
        self.vconfig[:_HEADER_SIZE] = self._function.config[:_HEADER_SIZE]
        self._bars_are_dirty = True
        self._perms = {_BASIC: self._basic_perms()}
        #: Every extended capability can be read as it is, but for its header, and written nowhere.
        self._extended = PermBits(0, self._extended_read, lambda *_: None)
        self._find_capabilities()

    # -- what a client does ------------------------------------------------------------------------------------------

    def read(self, position: int, count: int) -> bytes:
        """vfio_pci_config_rw() for reading. EFAULT: any byte beyond the end; then nothing is returned."""
        data = bytearray()
        for at, width, cap, offset in self._accesses(position, count):
            perm = self._perm(at, cap)
            value = perm.read(at, width, perm, offset) if perm is not None else self._function.config_read(at, width)
            data += value.to_bytes(width, "little")
        return bytes(data)

    def write(self, position: int, data: bytes | bytearray | memoryview) -> int:
        """vfio_pci_config_rw() for writing. EFAULT: any byte beyond the end; what came before has been written."""
        for at, width, cap, offset in self._accesses(position, len(data)):
            value = int.from_bytes(data[at - position : at - position + width], "little")
            perm = self._perm(at, cap)
            if perm is not None:
                perm.write(at, width, perm, offset, value)
            else:
                self._function.config_write(at, width, value)
        return len(data)

    def _perm(self, at: int, cap: int) -> PermBits | None:
        if at < PCI_EXT_CAP_START:
            return self._perms.get(cap)
        return None if cap == _INVALID else self._extended

    def _accesses(self, position: int, count: int) -> list[tuple[int, int, int, int]]:
        """Chop into aligned accesses within one capability: (position, width, capability, offset in it)."""
        found = []
        end = position + count
        if end > len(self._map):
            # The first access is tested against the whole rest of the range, so nothing is done at all.
            raise KernelError(errno.EFAULT, f"{position:#x}+{count:#x} leaves the configuration space")
        while position < end:
            cap = self._map[position]
            room = 1
            while (position + room) % 4 and self._map[position + room] == cap:
                room += 1
            room = min(room, end - position)
            width = 4 if room >= 4 and not position % 4 else 2 if room >= 2 and not position % 2 else 1
            start = position
            if cap == _BASIC:
                start = 0
            elif cap != _INVALID:
                while start - 1 >= _HEADER_SIZE and self._map[start - 1] == cap:
                    start -= 1
            found.append((position, width, cap, position - start))
            position += width
        return found

    @property
    def memory_enabled(self) -> bool:
        """__vfio_pci_memory_enabled(): what the client's command register says."""
        return bool(self.vconfig[PCI_COMMAND] & PCI_COMMAND_MEMORY)

    # -- capabilities ------------------------------------------------------------------------------------------------

    def _find_capabilities(self) -> None:
        """vfio_cap_init(): own the bytes of each known capability, take the others out of the chain."""
        config = self._function.config
        if not config[PCI_STATUS] & PCI_STATUS_CAP_LIST:
            return
        at, link, kept = config[PCI_CAPABILITY_LIST], PCI_CAPABILITY_LIST, 0
        while at:
            cap, following = config[at], config[at + _PCI_CAP_LIST_NEXT]
            if cap == PCI_CAP_ID_MSI:
                perm = self._msi_perms(at)
                self._perms[cap] = perm
                length = self._msi_length(at)
                self._map[at : at + length] = bytes([cap]) * length
                self.vconfig[at : at + length] = config[at : at + length]
                link, kept = at + _PCI_CAP_LIST_NEXT, kept + 1
            elif cap == PCI_CAP_ID_EXP:
                self._perms[cap] = self._express_perms()
                length = 0x2C if self._function.express_type == PCI_EXP_TYPE_RC_END else 0x34
                self._map[at : at + length] = bytes([cap]) * length
                self.vconfig[at : at + length] = config[at : at + length]
                link, kept = at + _PCI_CAP_LIST_NEXT, kept + 1
                self._find_extended_capabilities()
            elif cap == _PCI_CAP_ID_NULL:
                self.vconfig[link] = following
            else:
                raise KernelBug(f"capability {cap:#x} at {at:#x} is not modelled")
            at = following
        if not kept:
            self.vconfig[PCI_STATUS] &= ~PCI_STATUS_CAP_LIST

    def _find_extended_capabilities(self) -> None:
        """vfio_ecap_init(): take those that clients do not see out of the chain."""
        function, at, before, kept = self._function, PCI_EXT_CAP_START, 0, 0
        if function.config_size <= PCI_EXT_CAP_START or not function.config_read(at, 4):
            return
        while at:
            header = function.config_read(at, 4)
            cap, following = header & 0xFFFF, header >> 20
            if cap not in _EXTENDED:
                raise KernelBug(f"extended capability {cap:#x} at {at:#x} is not modelled")
            length = _EXTENDED[cap]
            if not length and before:
                link = int.from_bytes(self.vconfig[before : before + 4], "little") & 0xFFFFF | following << 20
                self.vconfig[before : before + 4] = link.to_bytes(4, "little")
            else:
                # The first cannot be taken out: it stays, without a name.
                self._map[at : at + (length or 4)] = bytes([cap]) * (length or 4)
                self.vconfig[at : at + 4] = (header if length else following << 20).to_bytes(4, "little")
                before, kept = at, kept + bool(length)
            at = following
        if not kept:
            self.vconfig[PCI_EXT_CAP_START : PCI_EXT_CAP_START + 4] = bytes(4)

    def _extended_read(self, at: int, width: int, _perm: PermBits, offset: int) -> int:
        """vfio_direct_config_read()."""
        if offset < 4:
            return int.from_bytes(self.vconfig[at : at + width], "little")
        return self._function.config_read(at, width)

    def _express_perms(self) -> PermBits:
        """init_pci_cap_exp_perm()."""
        perm = PermBits(0x34, self._default_read, self._express_write)
        perm.set(_PCI_CAP_LIST_NEXT, 1, 0xFF, 0)
        virt = PCI_EXP_DEVCTL_BCR_FLR | _DEVCTL_PAYLOAD | _DEVCTL_READRQ
        perm.set(PCI_EXP_DEVCTL, 2, virt, 0xFFFF & ~_DEVCTL_PHANTOM)
        perm.set(_PCI_EXP_DEVCTL2, 2, 0, 0xFFFF & ~_DEVCTL2_ARI)
        return perm

    def _express_write(self, at: int, width: int, perm: PermBits, offset: int, value: int) -> None:
        """vfio_exp_config_write(): a function level reset is the kernel's; the read request size goes through."""
        start = at - offset + PCI_EXP_DEVCTL
        before = int.from_bytes(self.vconfig[start : start + 2], "little")
        self._default_write(at, width, perm, offset, value)
        control = int.from_bytes(self.vconfig[start : start + 2], "little")
        if control & PCI_EXP_DEVCTL_BCR_FLR:
            control &= ~PCI_EXP_DEVCTL_BCR_FLR
            self.vconfig[start : start + 2] = control.to_bytes(2, "little")
            if self._function.config_read(at - offset + PCI_EXP_DEVCAP, 4) & PCI_EXP_DEVCAP_FLR:
                self._device.try_reset_function()
        if (before ^ control) & _DEVCTL_READRQ and control >> 12 & 7 <= 5:
            real = self._function.config_read(start, 2) & ~_DEVCTL_READRQ
            self._function.config_write(start, 2, real | control & _DEVCTL_READRQ)

    def _basic_perms(self) -> PermBits:
        """init_pci_cap_basic_perm()."""
        perm = PermBits(_HEADER_SIZE, self._basic_read, self._basic_write)
        perm.set(PCI_VENDOR_ID, 2, 0xFFFF, 0)
        perm.set(PCI_DEVICE_ID, 2, 0xFFFF, 0)
        perm.set(PCI_COMMAND, 2, PCI_COMMAND_INTX_DISABLE, 0xFFFF)
        perm.set(PCI_STATUS, 2, PCI_STATUS_CAP_LIST, 0)
        for offset in (PCI_CACHE_LINE_SIZE, _PCI_LATENCY_TIMER, _PCI_BIST):
            perm.set(offset, 1, 0, 0xFF)
        for offset in (*range(PCI_BASE_ADDRESS_0, _PCI_BASE_ADDRESS_5 + 4, 4), _PCI_ROM_ADDRESS):
            perm.set(offset, 4, 0xFFFFFFFF, 0xFFFFFFFF)
        perm.set(PCI_CAPABILITY_LIST, 1, 0xFF, 0)
        perm.set(PCI_INTERRUPT_LINE, 1, 0xFF, 0xFF)
        perm.set(PCI_INTERRUPT_PIN, 1, 0xFF, 0)
        return perm

    def _msi_length(self, at: int) -> int:
        return 14 if self._function.config[at + PCI_MSI_FLAGS] & PCI_MSI_FLAGS_64BIT else 10

    def _msi_perms(self, at: int) -> PermBits:
        """init_pci_cap_msi_perm()."""
        perm = PermBits(self._msi_length(at), self._default_read, self._msi_write)
        perm.set(_PCI_CAP_LIST_NEXT, 1, 0xFF, 0)
        perm.set(PCI_MSI_FLAGS, 1, 0xFF, 0xFF)
        perm.set(PCI_MSI_ADDRESS_LO, 4, 0xFFFFFFFF, 0xFFFFFFFF)
        if self._function.config[at + PCI_MSI_FLAGS] & PCI_MSI_FLAGS_64BIT:
            perm.set(PCI_MSI_ADDRESS_HI, 4, 0xFFFFFFFF, 0xFFFFFFFF)
            perm.set(_PCI_MSI_DATA_64, 2, 0xFFFF, 0xFFFF)
        else:
            perm.set(_PCI_MSI_DATA_32, 2, 0xFFFF, 0xFFFF)
        return perm

    # -- reading and writing one access ------------------------------------------------------------------------------

    def _default_read(self, at: int, width: int, perm: PermBits, offset: int) -> int:
        """vfio_default_config_read(): virtual bits from `vconfig`, the others from the function."""
        virt = int.from_bytes(perm.virt[offset : offset + width], "little")
        value = int.from_bytes(self.vconfig[at : at + width], "little")
        if virt != (1 << 8 * width) - 1:
            value = self._function.config_read(at, width) & ~virt | value & virt
        return value

    def _default_write(self, at: int, width: int, perm: PermBits, offset: int, value: int) -> None:
        """vfio_default_config_write(): writable bits, to `vconfig` or to the function."""
        write = int.from_bytes(perm.write_mask[offset : offset + width], "little")
        virt = int.from_bytes(perm.virt[offset : offset + width], "little")
        kept = write & virt
        if kept:
            old = int.from_bytes(self.vconfig[at : at + width], "little")
            self.vconfig[at : at + width] = (old & ~kept | value & kept).to_bytes(width, "little")
        through = write & ~virt
        if through:
            old = self._function.config_read(at, width)
            self._function.config_write(at, width, old & ~through | value & through)

    def _basic_read(self, at: int, width: int, perm: PermBits, offset: int) -> int:
        if _is_bar(offset):
            self._fix_bars()
        return self._default_read(at, width, perm, offset)

    def _basic_write(self, at: int, width: int, perm: PermBits, offset: int, value: int) -> None:
        """vfio_basic_config_write()."""
        self._default_write(at, width, perm, offset, value)
        if offset == PCI_COMMAND:
            # What the client believes of these two bits; its accesses to BARs go by it.
            mask = PCI_COMMAND_MEMORY | PCI_COMMAND_IO
            self.vconfig[PCI_COMMAND] = self.vconfig[PCI_COMMAND] & ~mask | value & mask
        if PCI_COMMAND <= offset <= PCI_COMMAND + 1:
            self._follow_intx_disable()
        if _is_bar(offset):
            self._bars_are_dirty = True

    def _follow_intx_disable(self) -> None:
        interrupts = self._device.interrupts
        disabled = bool(self.vconfig[PCI_COMMAND + 1] & PCI_COMMAND_INTX_DISABLE >> 8)
        if disabled and not interrupts.virq_disabled:
            interrupts.virq_disabled = True
            interrupts.intx_mask()
        elif not disabled and interrupts.virq_disabled:
            interrupts.virq_disabled = False
            interrupts.intx_unmask()

    def _fix_bars(self) -> None:
        """vfio_bar_fixup(): make the virtual BARs look as hardware would have left them after a write."""
        if not self._bars_are_dirty:
            return
        function = self._function
        at = PCI_BASE_ADDRESS_0
        index = 0
        while index < 6:
            bar = function.bars[index]
            width = 4
            if bar is None or not function.bar_address(index):
                value = 0
            else:
                width = 8 if bar.type_bits & 5 == 4 else 4
                value = int.from_bytes(self.vconfig[at : at + width], "little")
                value = value & -bar.size & (1 << 8 * width) - 1 | bar.type_bits
            self.vconfig[at : at + width] = value.to_bytes(width, "little")
            at += width
            index += width // 4
        self.vconfig[_PCI_ROM_ADDRESS : _PCI_ROM_ADDRESS + 4] = bytes(4)
        self._bars_are_dirty = False

    def _msi_write(self, at: int, width: int, perm: PermBits, offset: int, value: int) -> None:
        """vfio_msi_config_write(): the client turns MSI on and off only while the kernel has it on."""
        self._default_write(at, width, perm, offset, value)
        if offset <= PCI_MSI_FLAGS and offset + width >= PCI_MSI_FLAGS:
            start = at - offset + PCI_MSI_FLAGS
            interrupts = self._device.interrupts
            flags = int.from_bytes(self.vconfig[start : start + 2], "little")
            if interrupts.irq_type != VFIO_PCI_MSI_IRQ_INDEX:
                flags &= ~PCI_MSI_FLAGS_ENABLE
            if (flags & PCI_MSI_FLAGS_QSIZE) >> 4 > interrupts.msi_qmax:
                flags = flags & ~PCI_MSI_FLAGS_QSIZE | interrupts.msi_qmax << 4
            self.vconfig[start : start + 2] = flags.to_bytes(2, "little")
            self._function.config_write(start, 2, flags)
