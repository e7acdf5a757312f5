"""Programs for a machine with an SMMUv3: guests with a virtual SMMU of their own, and what their device then sees.

After drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-iommufd.c, which says what a guest may hand over. A program that changes
tables under a running device has the guest flush what the unit may have cached: how long it keeps what nobody
invalidates is the unit's own affair.
"""

from __future__ import annotations

import struct

from iommulab.fuzz.hardware import ACTIONS, SCENES, HardwareGenerator
from iommulab.fuzz.memory import PAGE
from iommulab.fuzz.program import Call, Value
from iommulab.fuzz.smmuv3_guest import ABORT, DATA, IOVAS, RAM, STE, STRAY, SW_MSI, Tables, V, command, flushes, vste
from iommulab.fuzz.smmuv3_guest import PAGES as RAM_PAGES
from iommulab.fuzz.world import Area, DeviceFile, Hwpt, Queue, Viommu
from uapi import iommufd as abi
from uapi.vfio import VFIO_PCI_BAR0_REGION_INDEX

_INVALIDATE = int(abi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3)
_DATA = int(abi.IOMMU_HWPT_DATA_ARM_SMMUV3)
#: Transfers of a program: each takes QEMU's edu a tenth of a second, twice.
_COPIES = 4


class Smmuv3Generator(HardwareGenerator):
    """Makes one program."""

    # Ends of stage 1 and of stage 2 (44 bits of address in QEMU's unit).
    lasts = ((1 << 48) - 1, (1 << 44) - 1)
    msi = SW_MSI

    def actions(self) -> list[tuple[float, str]]:
        return SMMUV3_ACTIONS

    def scenes(self) -> list[str]:
        return [*SCENES, *5 * ["scene_guest"]]

    # -- objects -------------------------------------------------------------------------------------------------------

    def hwpt_alloc(self, wanted: int | None = None) -> None:
        device, ioas = self._device(), self._ioas()
        flags = self.rng.choice((0, 0, 0, 1, 1, 1, 2, 3, 8, 9, 10)) if wanted is None else wanted
        more: dict[str, Value] = {}
        fault = self.world.pick(self.world.faults)
        if fault is not None and self.coin(0.3):
            flags |= 4
            more["fault_id"] = fault.ref
        if wanted is None and self.coin(0.1):
            more |= self._vste(STE)
        call = self.add("IOMMU_HWPT_ALLOC", flags=flags, dev_id=device.idev, pt_id=ioas.ref, **more)
        if call is not None:
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", ioas, flags))

    def _vste(self, words: tuple[int, int]) -> dict[str, Value]:
        """Words 0 and 1 of a guest's STE as data: of the right type and length mostly."""
        rng = self.rng
        kind, data = _DATA, struct.pack("<QQ", *words)
        if self.coin(0.05):
            kind = rng.choice((0, 1, 3, 0xDEAD))
        if self.coin(0.08):
            data += bytes(rng.choice((8, 16, 48))) + bytes([rng.choice((0, 0, 1))])
            data = data[rng.choice((0, 0, 0, len(data) - 8, len(data) - 15)) :]
        return {"data_type": kind, "data_len": len(data), "data_uptr": "*" + data.hex()}

    def hwpt_nested(self, fault: bool = False) -> None:
        self.nested(vste(self.rng), fault)

    def nested(self, words: tuple[int, int], fault: bool = False) -> None:
        """A nested HWPT with this vSTE; made from a parent, it is refused."""
        viommu = self._viommu()
        if viommu is None:
            return
        parent = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.flags & 1])
        target: Value = parent.ref if parent is not None and self.coin(0.04) else viommu.ref
        flags = self.rng.choice((1, 2, 8)) if self.coin(0.08) else 0
        more = self._vste(words)
        queue = self.world.pick(self.world.faults)
        if queue is not None and (fault or self.coin(0.3)):
            flags |= 4
            more["fault_id"] = queue.ref
        call = self.add("IOMMU_HWPT_ALLOC", flags=flags, dev_id=self._device().idev, pt_id=target, **more)
        if call is not None:
            self.world.hwpts.append(Hwpt(call + "out_hwpt_id", viommu.parent.ioas, flags, nested=True, viommu=viommu))

    def viommu_alloc(self) -> None:
        parent = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.flags & 1 or self.coin(0.05)])
        if parent is None:
            self.hwpt_alloc(1)
            return
        kind = int(abi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3) if self.coin(0.93) else self.rng.choice((0, 2, 3, 0xDEADBEEF))
        more: dict[str, Value] = {"data_len": 8, "data_uptr": "*" + "01" * 8} if self.coin(0.05) else {}
        call = self.add("IOMMU_VIOMMU_ALLOC", type=kind, dev_id=self._device().idev, hwpt_id=parent.ref, **more)
        if call is not None:
            self.world.viommus.append(Viommu(call + "out_viommu_id", parent))

    def virtual(self, known: bool = False) -> int:
        """A virtual stream id."""
        if self.world.virtual and self.coin(0.9 if known else 0.15):
            return self.rng.choice(self.world.virtual)
        return self.rng.choice((0x81, 0x81, 0, 1, 0xFFFF, 0xFFFF_FFFF))

    def veventq_alloc(self) -> None:
        viommu = self._viommu()
        if viommu is None:
            return
        kind = int(abi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3) if self.coin(0.93) else self.rng.choice((0, 2, 0xDEAD))
        depth = self.rng.choice((1, 2, 3, 16, 16, 16, 0, 1 << 19, (1 << 19) + 1))
        call = self.add("IOMMU_VEVENTQ_ALLOC", viommu_id=viommu.ref, type=kind, veventq_depth=depth)
        if call is not None:
            self.world.events.append(Queue(call + "out_veventq_id", call + "out_veventq_fd"))

    def hw_queue_alloc(self) -> None:
        """It has none."""
        viommu = self._viommu()
        if viommu is not None:
            kind = self.rng.choice((0, 1, 1, 2))
            length = self.rng.choice((0, 64, PAGE))
            self.add("IOMMU_HW_QUEUE_ALLOC", viommu_id=viommu.ref, type=kind, nesting_parent_iova=RAM, length=length)

    def hw_info(self) -> None:
        rng = self.rng
        length = rng.choice((0, 4, 8, 36, 40, 40, 40, 44, 64))
        flags = rng.choice((0, 0, 0, 1, 1, 2))
        self.add(
            "IOMMU_GET_HW_INFO",
            flags=flags,
            dev_id=self._device().idev,
            data_len=length,
            data_uptr=f">{length}" if length else 0,
            in_data_type=rng.choice((0, 1, 2, 2, 3, 4, 0xDEAD)) if flags else 0,
        )

    # -- what a guest does ---------------------------------------------------------------------------------------------

    def invalidate(self) -> None:
        """Commands of the guest's: a few, or as many as go to the unit in several pieces."""
        rng = self.rng
        viommu = self.world.pick(self.world.viommus)
        if viommu is None:
            return
        count = rng.choice((1, 1, 2, 3, 5, 8)) if self.coin(0.93) else rng.choice((0, 62, 63, 64, 65, 127, 130))
        commands = [command(rng, self.virtual(known=True)) for _ in range(count)]
        if count > 60:
            commands = [one if self.coin(0.02) else flushes([])[-1] for one in commands]
        length = 16
        data = [struct.pack("<QQ", *one) for one in commands]
        if self.coin(0.08):
            length = rng.choice((17, 20, 24, 32))
            data = [one + bytes(length - 17) + rng.choice((b"\0", b"\0", b"\1")) for one in data]
        hwpt = self.world.pick(self.world.hwpts)
        self.add(
            "IOMMU_HWPT_INVALIDATE",
            hwpt_id=hwpt.ref if hwpt is not None and self.coin(0.06) else viommu.ref,
            data_uptr="*" + b"".join(data).hex() if data else 0,
            data_type=_INVALIDATE if self.coin(0.95) else rng.choice((0, 2, 3, 0xDEAD)),
            entry_len=length,
            entry_num=count,
        )

    def flush(self) -> None:
        """Each guest forgets all that its unit may have cached, one stream after the other."""
        for viommu in self.world.viommus:
            for one in flushes(self.world.virtual):
                self.sure(
                    "IOMMU_HWPT_INVALIDATE",
                    hwpt_id=viommu.ref,
                    data_uptr="*" + struct.pack("<QQ", *one).hex(),
                    data_type=_INVALIDATE,
                    entry_len=16,
                    entry_num=1,
                )

    def tables(self) -> None:
        """Write the guest's context descriptor and stage-1 table."""
        words = [list(word) for word in sorted(Tables(self.rng).words.items())]
        self.calls.append(Call("poke", {"address": "&buf+0x0", "length": DATA.start * PAGE, "words": words}))
        self.flush()

    def unmap(self) -> None:
        super().unmap()
        self.flush()

    def edu_copy(self, file: object = None) -> None:
        """Four bytes, which are one access to QEMU's unit also where it is refused, then the guest's events."""
        if sum(call.name == "edu_copy" for call in self.calls) >= _COPIES:
            return
        places = []
        for _ in range(2):
            page = self.rng.choice(IOVAS[:3] if self.coin(0.7) else (*IOVAS, *STRAY))
            places.append(page + self.rng.choice((0, 0, 8, PAGE - 4)))
        fields = {"fd": self._file().fd, "source": places[0], "target": places[1], "count": 4}
        self.calls.append(Call("edu_copy", fields))
        for queue in self.world.events[-2:]:
            self.read_events(queue)

    def _read(self, file: DeviceFile, region: int, place: int, count: int) -> None:
        """Of BAR 0 whole words: a narrower one of edu is an external abort on arm64, and vfio-pci oopses."""
        if region == VFIO_PCI_BAR0_REGION_INDEX:
            place, count = place & ~3, count + 3 & ~3
        super()._read(file, region, place, count)

    def read_events(self, queue: Queue) -> None:
        self.calls.append(Call("poll", {"fd": queue.fd}))
        for _ in range(self.rng.choice((1, 1, 2))):
            count = self.rng.choice((40, 40, 80, 400, 400, 39, 8, 7, 0))
            self.calls.append(Call("read", {"fd": queue.fd, "count": count}))

    def scene_guest(self) -> None:
        """A guest with a virtual SMMU, its device behind it."""
        file = next((file for file in self.world.files if file.device is not None), None) or self.bind()
        ioas, world = self._ioas(), self.world
        self.sure("IOMMU_IOAS_MAP", flags=7, ioas_id=ioas.ref, user_va="&buf+0x0", length=RAM_PAGES * PAGE, iova=RAM)
        ioas.areas.append(Area(RAM, RAM_PAGES * PAGE, "&buf+0x0", True))
        parent = self.sure("IOMMU_HWPT_ALLOC", flags=1, dev_id=self._device().idev, pt_id=ioas.ref)
        world.hwpts.append(Hwpt(parent + "out_hwpt_id", ioas, 1))
        self.viommu_alloc()
        if self.coin(0.9):
            self.vdevice_alloc()
        if self.coin(0.85):
            self.veventq_alloc()
        self.tables()
        self.nested(STE if self.coin(0.7) else vste(self.rng))
        if self.coin(0.3):
            self.nested(self.rng.choice(((V | ABORT << 1, 0), (0, 0), vste(self.rng))))
        self.enable(file)
        if world.hwpts[-1].nested:
            self.attach_to(file, world.hwpts[-1].ref, ioas)
        self.edu_copy()


#: Programs here write to their memory, so it stays where it is. A store that is tied to an eventfd may be a narrow one,
#: which on arm64 is an external abort.
_ABSENT = ("protect", "ioeventfd", "hwpt_nested", "invalidate", "edu_copy")
SMMUV3_ACTIONS: list[tuple[float, str]] = [
    *((weight, name) for weight, name in ACTIONS if name not in _ABSENT),
    (8, "hwpt_nested"),
    (10, "invalidate"),
    (4, "viommu_alloc"),
    (3, "vdevice_alloc"),
    (3, "veventq_alloc"),
    (6, "edu_copy"),
    (3, "tables"),
]
