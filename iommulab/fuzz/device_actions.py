"""Devices: mock devices, page tables, nesting, PASIDs, dirty tracking, and the end of objects."""

from __future__ import annotations

import struct

from iommulab.fuzz.mapping_actions import APERTURE, MappingActions
from iommulab.fuzz.memory import PAGE
from iommulab.fuzz.program import Value
from iommulab.fuzz.world import Device, Hwpt, Ioas
from uapi import iommufd_test as mock


class DeviceActions(MappingActions):
    """Actions on mock devices and their page tables."""

    def _target(self) -> tuple[Value, Ioas | None]:
        """Something to attach to: an IOAS, or a page table."""
        hwpt = self.world.pick(self.world.hwpts)
        if hwpt is None or self.coin(0.5):
            ioas = self._ioas()
            return ioas.ref, ioas
        return hwpt.ref, hwpt.ioas

    def mock_domain(self, wanted: int | None = None) -> None:
        target, ioas = self._target()
        flags = self.rng.choice((0, 0, 0, 4, 4, 1, 5)) if wanted is None else wanted
        if flags or self.coin(0.3):
            call = self.add("IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS", id=target, dev_flags=flags)
        else:
            call = self.add("IOMMU_TEST_OP_MOCK_DOMAIN", id=target)
        if call is not None:
            if ioas is not None:
                ioas.domain = True
            self.world.devices.append(Device(call + "out_stdev_id", call + "out_idev_id", flags))
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", ioas))

    def _device(self) -> Device:
        """A device: the last one rather often, as what was made last is for it."""
        if self.world.devices and self.coin(0.4):
            return self.world.devices[-1]
        device = self.world.pick(self.world.devices)
        while device is None:
            self.mock_domain()
            device = self.world.pick(self.world.devices)
        return device

    def replace(self, hwpt: Hwpt | None = None, device: Device | None = None) -> None:
        """Attach a device to something else: to `hwpt`, or to whatever there is."""
        device = device or self._device()
        target, ioas = self._target()
        if hwpt is not None:
            target, ioas = hwpt.ref, hwpt.ioas
        else:
            hwpt = next((known for known in self.world.hwpts if known.ref == target), None)
        call = self.add("IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE", id=device.stdev, pt_id=target)
        if call is not None:
            device.ready = hwpt is not None and bool(hwpt.flags & 8)
            device.guest = hwpt is not None and hwpt.viommu is not None
            if self.coin(0.3) and hwpt is None:
                self.world.hwpts.append(Hwpt(call + "pt_id", ioas))

    def hwpt_alloc(self, wanted: int | None = None) -> None:
        device, ioas = self._device(), self._ioas()
        flags = self.rng.choice((0, 1, 1, 1, 2, 2, 3, 8, 9, 10, 11)) if wanted is None else wanted
        more: dict[str, Value] = {}
        if self.world.faults and not flags & 1 and self.coin(0.25):
            fault = self.world.pick(self.world.faults)
            if fault is not None:
                flags |= 4
                more["fault_id"] = fault.ref
        if self.coin(0.2):
            kind = self.rng.choice((0, 0, 1, 1, 1, 1, 2))
            data = struct.pack("<II", self.rng.randrange(1 << 32), kind)[: self.rng.choice((8, 8, 8, 8, 8, 4, 4, 3))]
            more |= {
                "data_type": int(mock.IOMMU_HWPT_DATA_SELFTEST),
                "data_len": len(data),
                "data_uptr": "*" + data.hex(),
            }
        call = self.add("IOMMU_HWPT_ALLOC", flags=flags, dev_id=device.idev, pt_id=ioas.ref, **more)
        if call is not None:
            ioas.domain = True
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", ioas, flags))

    def hwpt_nested(self, fault: bool = False) -> None:
        device = self._device()
        viommu = self.world.pick(self.world.viommus)
        parents = [hwpt for hwpt in self.world.hwpts if hwpt.flags & 1]
        parent = self.world.pick(parents)
        target: Value
        if viommu is not None and self.coin(0.5):
            target = viommu.ref
        elif parent is not None:
            target, viommu = parent.ref, None
        else:
            self.hwpt_alloc(1)
            return
        flags = self.rng.choice((0, 0, 0, 8))
        more: dict[str, Value] = {}
        queue = self.world.pick(self.world.faults)
        if queue is not None and (fault or self.coin(0.5)):
            flags |= 4
            more["fault_id"] = queue.ref
        word = self.rng.choice((0xBADBEEF, 1, 2))
        data = struct.pack("<II", word, 0)[: self.rng.choice((4, 4, 4, 4, 4, 4, 8, 8, 2))]
        call = self.add(
            "IOMMU_HWPT_ALLOC",
            flags=flags,
            dev_id=device.idev,
            pt_id=target,
            data_type=int(mock.IOMMU_HWPT_DATA_SELFTEST),
            data_len=len(data),
            data_uptr="*" + data.hex(),
            **more,
        )
        if call is not None:
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", None, flags, nested=True, word=word, viommu=viommu))

    def invalidate(self) -> None:
        rng = self.rng
        targets = [hwpt.ref for hwpt in self.world.hwpts if hwpt.nested] + [viommu.ref for viommu in self.world.viommus]
        target = self.world.pick(targets)
        if target is None:
            return
        count = rng.choice((0, 1, 1, 2, 4))
        to_viommu = any(viommu.ref == target for viommu in self.world.viommus)
        data, size = b"", 12 if to_viommu else 8
        for _ in range(count):
            flags = rng.choice((0, 0, 0, 1, 2))
            cell = rng.choice((0, 1, 2, 3, 3, 4))
            if to_viommu:
                data += struct.pack("<III", flags, self.virtual(known=True), cell)
            else:
                data += struct.pack("<II", flags, cell)
        if self.coin(0.06):
            size = rng.choice((1, 4, 8, 12, 16, 13))
        kind = int(mock.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST) if self.coin(0.92) else rng.choice((0, 1, 0xDADBEEF))
        self.add(
            "IOMMU_HWPT_INVALIDATE",
            hwpt_id=target,
            data_uptr="*" + (data + bytes(count * size - len(data) if count * size > len(data) else 0)).hex()
            if data
            else 0,
            data_type=kind,
            entry_len=size,
            entry_num=count,
        )

    def check_iotlb(self) -> None:
        hwpt = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.nested or self.coin(0.1)])
        if hwpt is not None:
            value = self.rng.choice((hwpt.word, hwpt.word, 0, 0xBADBEEF))
            self.add(
                "IOMMU_TEST_OP_MD_CHECK_IOTLB", id=hwpt.ref, index=self.rng.choice((0, 1, 2, 3, 3, 4)), iotlb=value
            )

    def check_cache(self) -> None:
        device = self._device()
        value = self.rng.choice((0xBADDAD, 0))
        self.add("IOMMU_TEST_OP_DEV_CHECK_CACHE", id=device.idev, index=self.rng.randrange(5), cache=value)

    def hw_info(self) -> None:
        length = self.rng.choice((0, 4, 8, 8, 16))
        flags = self.rng.choice((0, 0, 0, 1))
        wanted = self.rng.choice((0, int(mock.IOMMU_HW_INFO_TYPE_SELFTEST), 1)) if flags else 0
        self.add(
            "IOMMU_GET_HW_INFO",
            flags=flags,
            dev_id=self._device().idev,
            data_len=length,
            data_uptr=f">{length}" if length else 0,
            in_data_type=wanted,
        )

    def destroy(self) -> None:
        """Anything that a reference names; a mock device goes through `destroy_device`."""
        ids = self.world.ids()
        target = self.world.pick(ids)
        if target is None or self.coin(0.15):
            self.destroy_device()
            return
        self.add("IOMMU_DESTROY", id=target)
        # What it was is forgotten now and then; the rest stays as a stale id.
        if self.coin(0.6):
            world = self.world
            world.ioas[:] = [ioas for ioas in world.ioas if ioas.ref != target]
            world.hwpts[:] = [hwpt for hwpt in world.hwpts if hwpt.ref != target]
            world.viommus[:] = [viommu for viommu in world.viommus if viommu.ref != target]
            world.faults[:] = [queue for queue in world.faults if queue.ref != target]
            world.events[:] = [queue for queue in world.events if queue.ref != target]

    def destroy_device(self) -> None:
        device = self.world.pick(self.world.devices)
        if device is None:
            return
        self._detach_all(device)
        self.add("IOMMU_DESTROY", id=device.stdev)
        if self.coin(0.8):
            self.world.devices.remove(device)

    def _detach_all(self, device: Device) -> None:
        for pasid in sorted(device.pasids):
            self.sure("IOMMU_TEST_OP_PASID_DETACH", id=device.stdev, pasid=pasid)

    def pasid(self) -> int:
        return self.rng.choice((1, 1, 2, 2, 100, 1024, 1024, (1 << 20) - 1, 1 << 20))

    def _pasid_device(self) -> Device:
        able = [device for device in self.world.devices if device.flags & 4]
        device = self.world.pick(able)
        return device if device is not None and self.coin(0.95) else self._device()

    def _pasid_target(self) -> Value:
        able = [hwpt.ref for hwpt in self.world.hwpts if hwpt.flags & 8]
        if not able and self.coin(0.6):
            self.hwpt_alloc(8)
            able = [hwpt.ref for hwpt in self.world.hwpts if hwpt.flags & 8]
        target = self.world.pick(able)
        return target if target is not None and self.coin(0.9) else self._target()[0]

    def pasid_attach(self) -> None:
        device, pasid = self._pasid_device(), self.pasid()
        able = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.flags & 8 and not hwpt.nested])
        if able is not None and not device.ready and self.coin(0.7):
            self.replace(able, device)
        again = pasid in device.pasids
        name = "IOMMU_TEST_OP_PASID_ATTACH" if self.coin(0.2 if again else 0.9) else "IOMMU_TEST_OP_PASID_REPLACE"
        # Unspoiled: what may be attached must be known, to be detached before the device dies.
        self.sure(name, id=device.stdev, pasid=pasid, pt_id=self._pasid_target())
        device.pasids.add(pasid)

    def pasid_detach(self) -> None:
        device = self._pasid_device()
        pasid = self.rng.choice(sorted(device.pasids)) if device.pasids and self.coin(0.8) else self.pasid()
        self.add("IOMMU_TEST_OP_PASID_DETACH", id=device.stdev, pasid=pasid)

    def pasid_check(self) -> None:
        device = self._pasid_device()
        pasid = self.rng.choice(sorted(device.pasids)) if device.pasids else self.pasid()
        hwpt = self.world.pick(self.world.hwpts)
        target: Value = hwpt.ref if hwpt is not None and self.coin(0.7) else 0
        self.add("IOMMU_TEST_OP_PASID_CHECK_HWPT", id=device.stdev, pasid=pasid, hwpt_id=target)

    def _paging(self) -> Hwpt | None:
        return self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.flags & 2 or self.coin(0.05)])

    def set_dirty_tracking(self) -> None:
        hwpt = self._paging()
        if hwpt is None:
            self.hwpt_alloc(2)
            return
        on = self.coin(0.85)
        if self.add("IOMMU_HWPT_SET_DIRTY_TRACKING", hwpt_id=hwpt.ref, flags=int(on)) is not None:
            hwpt.tracked = on

    def _range(self, hwpt: Hwpt, unit: int) -> tuple[Value, int]:
        areas = [area for area in (hwpt.ioas.areas if hwpt.ioas is not None else []) if isinstance(area.iova, int)]
        area = self.world.pick(areas)
        if area is None or not isinstance(area.iova, int):
            self.map()
            return APERTURE, 64 * unit
        start = area.iova // unit * unit
        return start, max(1, (area.length + self.rng.choice((0, 0, 0, 4 * PAGE))) // unit) * unit

    def get_dirty(self) -> None:
        hwpt = self._paging()
        if hwpt is None:
            return
        page = self.rng.choice((2048, PAGE, PAGE, PAGE, 2 * PAGE, 512, 3 * PAGE))
        iova, length = self._range(hwpt, page if page & (page - 1) == 0 else PAGE)
        room = length // (page & -page) // 8 + 8
        self.add(
            "IOMMU_HWPT_GET_DIRTY_BITMAP",
            hwpt_id=hwpt.ref,
            flags=int(self.coin(0.4)),
            iova=iova,
            length=length,
            page_size=page,
            data=f">{min(room, 256)}+{self.rng.choice((0, 0, 1, 3, 5))}",
        )

    def make_dirty(self) -> None:
        if not self.world.aligned:
            self.set_dirty_tracking()
            return
        hwpt = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.tracked]) or self._paging()
        if hwpt is None or not (hwpt.tracked or self.coin(0.1)):
            self.set_dirty_tracking()
            return
        page = self.rng.choice((2048, PAGE, PAGE, PAGE))
        iova, length = self._range(hwpt, page)
        bits = self.rng.randbytes(min(length // page // 8 + 1, 64))
        self.add(
            "IOMMU_TEST_OP_DIRTY",
            id=hwpt.ref,
            iova=iova,
            length=min(length, 512 * page),
            page_size=page,
            uptr="*" + bits.hex() + "00" * 64,
        )
