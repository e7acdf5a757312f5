"""Programs for a machine with VT-d: its page tables' data, its registers."""

from __future__ import annotations

import struct

from iommulab.fuzz.hardware import HardwareGenerator
from iommulab.fuzz.program import Value
from iommulab.fuzz.world import Hwpt
from uapi import iommufd as abi

U64_MAX = (1 << 64) - 1


class VtdGenerator(HardwareGenerator):
    """Makes one program."""

    #: Whether the unit nests, tracks dirty pages, or knows PASIDs. QEMU's does none of it.
    capable = False
    # Two-stage aperture of 48 bits; a first stage's lower half.
    lasts = ((1 << 48) - 1, (1 << 47) - 1)

    def hwpt_alloc(self, wanted: int | None = None) -> None:
        if wanted is not None and not self.capable and self.coin(0.7):
            wanted = 0  # what the scene needs is refused; the rest of it may still be worth something
        device, ioas = self._device(), self._ioas()
        flags = self.rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 8, 9, 10)) if wanted is None else wanted
        more: dict[str, Value] = {}
        if self.world.faults and self.coin(0.3):
            fault = self.world.pick(self.world.faults)
            if fault is not None:
                flags |= 4
                more["fault_id"] = fault.ref
        if self.coin(0.15):
            more |= self._table()
        call = self.add("IOMMU_HWPT_ALLOC", flags=flags, dev_id=device.idev, pt_id=ioas.ref, **more)
        if call is not None:
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", ioas, flags))

    def _table(self) -> dict[str, Value]:
        """A guest's first-stage table as data: mostly a good one."""
        rng = self.rng
        flags = rng.choice((0, 0, 1, 2, 4, 7, 8, rng.getrandbits(64)))
        address = rng.choice((0x1000000, 0, 0x1000800, 1 << 46, U64_MAX, rng.getrandbits(64)))
        data = struct.pack("<QQII", flags, address, rng.choice((48, 48, 48, 57, 39, 0, 64)), rng.choice((0, 0, 0, 1)))
        data = (data + bytes(8))[: rng.choice((24, 24, 24, 24, 24, 32, 16, 23, 8))]
        kind = rng.choice((1, 1, 1, 1, 1, 1, 2, 3, 0, 0xDEAD))
        return {"data_type": kind, "data_len": len(data), "data_uptr": "*" + data.hex()}

    def hwpt_nested(self, fault: bool = False) -> None:
        device = self._device()
        parent = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.flags & 1])
        viommu = self.world.pick(self.world.viommus)
        if parent is None:
            self.hwpt_alloc(1)
            return
        target: Value = viommu.ref if viommu is not None and self.coin(0.3) else parent.ref
        flags = self.rng.choice((0, 0, 0, 8, 1, 2))
        more = self._table()
        queue = self.world.pick(self.world.faults)
        if queue is not None and (fault or self.coin(0.5)):
            flags |= 4
            more["fault_id"] = queue.ref
        call = self.add("IOMMU_HWPT_ALLOC", flags=flags, dev_id=device.idev, pt_id=target, **more)
        if call is not None:
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", None, flags, nested=True))

    def invalidate(self) -> None:
        rng = self.rng
        hwpt = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.nested or self.coin(0.3)])
        viommu = self.world.pick(self.world.viommus)
        target = hwpt.ref if hwpt is not None else viommu.ref if viommu is not None else 0
        count = rng.choice((0, 1, 1, 2, 4))
        data = b""
        for _ in range(count):
            data += struct.pack(
                "<QQII",
                rng.choice((0, 0, 0x1000, 0x1000000, 0x1800, U64_MAX)),
                rng.choice((U64_MAX, 1, 1, 8, 512, 0, 1 << 52)),
                rng.choice((0, 0, 1, 2)),
                rng.choice((0, 0, 0, 0, 1)),
            )
        self.add(
            "IOMMU_HWPT_INVALIDATE",
            hwpt_id=target,
            data_uptr="*" + data.hex() if data else 0,
            data_type=0 if self.coin(0.9) else rng.choice((1, 2, 0xDADBEEF)),
            entry_len=24 if self.coin(0.93) else rng.choice((0, 8, 23, 32)),
            entry_num=count,
        )

    def hw_info(self) -> None:
        rng = self.rng
        length = rng.choice((0, 4, 8, 24, 24, 24, 32, 64))
        flags = rng.choice((0, 0, 0, 1, 1, 2))
        self.add(
            "IOMMU_GET_HW_INFO",
            flags=flags,
            dev_id=self._device().idev,
            data_len=length,
            data_uptr=f">{length}" if length else 0,
            in_data_type=rng.choice((0, int(abi.IOMMU_HW_INFO_TYPE_INTEL_VTD), 1, 2, 0xDEAD)) if flags else 0,
        )

    def viommu_alloc(self) -> None:
        """VT-d has none: each type is refused."""
        parent = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.flags & 1 or self.coin(0.1)])
        if parent is None:
            self.hwpt_alloc(1)
            return
        kind = self.rng.choice((0, 1, 1, 2, 3, 0xDEADBEEF))
        self.add("IOMMU_VIOMMU_ALLOC", type=kind, dev_id=self._device().idev, hwpt_id=parent.ref)

    def viommu_less(self) -> None:
        """What hangs on a virtual IOMMU, on something that is none."""
        rng = self.rng
        hwpt = self.world.pick(self.world.hwpts)
        target: Value = hwpt.ref if hwpt is not None and self.coin(0.7) else self._device().idev
        name = rng.choice(("IOMMU_VDEVICE_ALLOC", "IOMMU_VEVENTQ_ALLOC", "IOMMU_HW_QUEUE_ALLOC"))
        if name == "IOMMU_VDEVICE_ALLOC":
            self.add(name, viommu_id=target, dev_id=self._device().idev, virt_id=rng.randrange(4))
        elif name == "IOMMU_VEVENTQ_ALLOC":
            self.add(name, viommu_id=target, type=rng.choice((0, 1, 2)), veventq_depth=rng.choice((0, 1, 8)))
        else:
            self.add(name, viommu_id=target, type=rng.choice((0, 1)), length=rng.choice((0, 64)))

    vdevice_alloc = veventq_alloc = hw_queue_alloc = viommu_less


class VtdPairGenerator(VtdGenerator):
    """Where two functions share an IOMMU group."""

    devices = 2
