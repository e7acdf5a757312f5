"""A device behind an SMMUv3: its stream's entry, its table of context descriptors, its ATS and PASIDs.

Mirrors `struct arm_smmu_master` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3 and the functions that write STEs
and CDs. A device has one stream, its request id. Left out: streams of platform devices, devices whose ATS is always on,
streams that the firmware wants to bypass (RMR).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from fakedev.pci import RootComplex
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from kernel_model import pci_ats
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.entries import StreamOptions, make_cdtable_ste
from kernel_model.iommu.arm_smmu_v3.entry_writer import CD, STE, write_entry
from kernel_model.iommu.core import Device

_L2_ENTRIES = 1024
#: Without two-level tables, as many PASIDs as descriptors fit into 64 KiB.
_LINEAR_CDMAX = 10


class Vmaster(Protocol):
    """`struct arm_smmu_vmaster`: the device as a guest knows it."""

    def report_event(self, record: Sequence[int]) -> None:
        """Tell the guest. EOPNOTSUPP: it has no queue for it; ENOMEM: the event is lost."""


class Master:
    """`struct arm_smmu_master`. ERANGE: the stream table does not reach its stream. ENODEV: a stream of two devices."""

    def __init__(self, device: Device, smmu: SmmuDevice, sid: int, root: RootComplex) -> None:
        self.device = device
        self.smmu = smmu
        self.sid = sid
        if not smmu.init_sid(sid):
            raise KernelError(errno.ERANGE, f"stream {sid:#x} is beyond the stream table")
        if smmu.streams.setdefault(sid, self) is not self:
            raise KernelError(errno.ENODEV, f"stream {sid:#x} is {smmu.streams[sid].device.name}'s")
        #: The device cannot bypass caches, says the firmware of its root complex (`arm_smmu_master_canwbs()`).
        self.canwbs = "canwbs" in device.properties
        #: While it is in a guest's vIOMMU, and has a name there.
        self.vmaster: Vmaster | None = None
        #: Its transactions may stall: the firmware says so of the device, or the unit lets no other.
        self.stall_enabled = smmu.stall_forced or (smmu.stalls and "dma-can-stall" in device.properties)
        self.options = StreamOptions(smmu.attr_types_ovr, smmu.stalls, self.stall_enabled)
        #: Bits of a PASID.
        self.ssid_bits = 0
        #: How many PASIDs the function has, whatever the unit can; 0 without.
        self.function_pasids = 0
        self._enable_pasid(root)
        if not smmu.two_level_cdtab:
            self.ssid_bits = min(self.ssid_bits, _LINEAR_CDMAX)
        #: ATS is on at the device; the STE allows it.
        self.ats_enabled = self.ste_ats_enabled = False
        #: The CD table: its address, 0 before it is needed; format; PASIDs in use; whether the STE points to it.
        self.cdtab = 0
        self.s1fmt = e.S1FMT_LINEAR
        self.used_ssids = 0
        self.cdtab_in_ste = False
        self._l2: dict[int, int] = {}
        #: Attachments that take page faults.
        self.iopf_refcount = 0

    # -- PASID and ATS at the device ---------------------------------------------------------------------------------

    def _enable_pasid(self, root: RootComplex) -> None:
        """arm_smmu_enable_pasid(), whose errors mean that there are none."""
        function = self.device.pci
        if function is None:
            return
        try:
            self.function_pasids = pci_ats.max_pasids(function)
            pci_ats.enable_pasid(root, function, pci_ats.pasid_features(function))
        except KernelError:
            return
        self.ssid_bits = min(self.function_pasids.bit_length() - 1, self.smmu.ssid_bits)

    def ats_supported(self) -> bool:
        """arm_smmu_ats_supported(), on a root complex that lets ATS through."""
        return self.smmu.ats and self.device.pci is not None and pci_ats.ats_supported(self.device.pci)

    def enable_ats(self) -> None:
        """Forget what the device may have kept, then let it ask."""
        self.atc_inv(0)
        if self.device.pci is not None:
            pci_ats.enable_ats(self.device.pci, (self.smmu.pgsize_bitmap & -self.smmu.pgsize_bitmap).bit_length() - 1)

    def disable_ats(self) -> None:
        if self.device.pci is not None and pci_ats.ats_enabled(self.device.pci):  # a reset may have been before
            pci_ats.disable_ats(self.device.pci)

    def atc_inv(self, ssid: int) -> None:
        """arm_smmu_atc_inv_master(): the device forgets a PASID's translations; of 0, all."""
        self.smmu.cmdq.issue([c.atc_inv(self.sid, 0, c.ATC_SIZE_ALL, ssid or None)])

    # -- the stream table entry --------------------------------------------------------------------------------------

    def install_ste(self, ste: list[int]) -> None:
        """arm_smmu_install_ste_for_dev()."""
        self.cdtab_in_ste = e.STE_0_CONFIG.get(ste[0]) == e.CONFIG_S1
        self.ste_ats_enabled = e.STE_1_EATS.get(ste[1]) == e.EATS_FULL
        cmdq = self.smmu.cmdq
        write_entry(STE, self.smmu.ste(self.sid), ste, lambda: cmdq.issue([c.cfgi_ste(self.sid)]))
        cmdq.issue([c.prefetch_config(self.sid)], sync=False)

    def cdtable_ste(self, ats_enabled: bool, s1dss: int) -> list[int]:
        """An STE that points to the device's CD table, which there is."""
        return make_cdtable_ste(self.options, self.s1fmt, self.cdtab, self.ssid_bits, ats_enabled, s1dss)

    # -- context descriptors -----------------------------------------------------------------------------------------

    def _sync_cd(self, ssid: int, leaf: bool) -> None:
        self.smmu.cmdq.issue([c.cfgi_cd(self.sid, ssid, leaf)])

    def _cd_at(self, address: int) -> memoryview[int]:
        first = address >> 3
        return self.smmu.words[first : first + e.CD_WORDS]

    def get_cd(self, ssid: int) -> memoryview[int] | None:
        """The eight words of a descriptor, in place; None where there is no table for it."""
        if not self.cdtab:
            return None
        if self.s1fmt == e.S1FMT_LINEAR:
            return self._cd_at(self.cdtab + e.CD_BYTES * ssid)
        table = self._l2.get(ssid // _L2_ENTRIES)
        return None if table is None else self._cd_at(table + e.CD_BYTES * (ssid % _L2_ENTRIES))

    def alloc_cd(self, ssid: int) -> memoryview[int]:
        """The same, with tables made as they are needed. ENOMEM."""
        if ssid >> self.ssid_bits:
            # The core counts the function's PASIDs whether they are on or not: 7.3 writes behind the table here.
            raise KernelBug(f"PASID {ssid} of {self.device.name} is beyond its {1 << self.ssid_bits} descriptors")
        pages = self.smmu.pages
        if not self.cdtab:
            contexts = 1 << self.ssid_bits
            if not self.smmu.two_level_cdtab or contexts <= _L2_ENTRIES:
                self.s1fmt = e.S1FMT_LINEAR
                self.cdtab = pages.alloc(e.CD_BYTES * contexts)
            else:
                self.s1fmt = e.S1FMT_64K_L2
                self.cdtab = pages.alloc(8 * contexts // _L2_ENTRIES)
        index = ssid // _L2_ENTRIES
        if self.s1fmt == e.S1FMT_64K_L2 and index not in self._l2:
            table = self._l2[index] = pages.alloc(e.CD_BYTES * _L2_ENTRIES)
            pages.keep(table)  # until the device goes
            self.smmu.words[(self.cdtab >> 3) + index] = table & e.L1CD_L2PTR_MASK | e.L1CD_V
            self._sync_cd(ssid, leaf=False)  # an invalid level 1 descriptor can be cached
        cd = self.get_cd(ssid)
        if cd is None:
            raise KernelBug(f"no context descriptor for PASID {ssid}")
        return cd

    def write_cd(self, ssid: int, cd: memoryview[int], target: list[int]) -> None:
        """arm_smmu_write_cd_entry()."""
        if ssid:
            self.used_ssids += bool(target[0] & e.CD_0_V) - bool(cd[0] & e.CD_0_V)
        write_entry(CD, cd, target, lambda: self._sync_cd(ssid, leaf=True))

    def clear_cd(self, ssid: int) -> None:
        """arm_smmu_clear_cd(): if there is one."""
        cd = self.get_cd(ssid)
        if cd is not None:
            self.write_cd(ssid, cd, [0] * e.CD_WORDS)


def master_of(device: Device) -> Master:
    """`dev_iommu_priv_get()` of a device behind an SMMUv3."""
    master = device.priv
    if not isinstance(master, Master):
        raise KernelBug(f"{device.name} is not behind an SMMUv3")
    return master
