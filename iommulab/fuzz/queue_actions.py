"""Fault queues, virtual IOMMUs and what hangs on them: virtual devices, event queues, hardware queues."""

from __future__ import annotations

import struct
from typing import Any

from iommulab.fuzz.device_actions import DeviceActions
from iommulab.fuzz.mapping_actions import APERTURE, U64_MAX
from iommulab.fuzz.memory import PAGE
from iommulab.fuzz.program import Call, Value
from iommulab.fuzz.world import Queue, Viommu
from uapi import iommufd_test as mock


class QueueActions(DeviceActions):
    """Actions on queues and virtual IOMMUs."""

    def fault_queue(self) -> None:
        call = self.add("IOMMU_FAULT_QUEUE_ALLOC")
        if call is not None:
            self.world.faults.append(Queue(call + "out_fault_id", call + "out_fault_fd"))

    def trigger_iopf(self) -> None:
        device = self._device()
        pasid = self.rng.choice((0, 0, *sorted(device.pasids), 7))
        self.add(
            "IOMMU_TEST_OP_TRIGGER_IOPF",
            dev_id=device.idev,
            pasid=pasid,
            grpid=self.rng.randrange(4),
            perm=self.rng.choice((0, 1, 2, 3, 15)),
            addr=self.rng.choice((0, 0x1000, APERTURE, U64_MAX)),
        )

    def use_queue(self) -> None:
        """read, write, poll or close of a fault or event queue."""
        rng = self.rng
        queue = self.world.pick(self.world.faults + self.world.events)
        if queue is None:
            self.fault_queue()
            return
        kind = rng.random()
        if kind < (0.2 if queue.reads and queue in self.world.faults else 0.5):
            self.read_queue(queue)
        elif kind < 0.75:
            self.write_queue(queue)
        elif kind < 0.92:
            self.calls.append(Call("poll", {"fd": queue.fd}))
        else:
            self.calls.append(Call("close", {"fd": queue.fd}))

    def read_queue(self, queue: Queue) -> None:
        """read(2); its call's number stays with the queue, for the cookies."""
        counts = (40, 80, 400, 400, 39, 0, 8) if queue in self.world.faults else (8, 12, 16, 24, 24, 100, 11, 7, 0)
        count = self.rng.choice(counts)
        self.calls.append(Call("read", {"fd": queue.fd, "count": count}))
        queue.reads.append(len(self.calls) - 1)

    def write_queue(self, queue: Queue) -> None:
        """Answer page requests: cookies that were read, or guessed ones."""
        words: list[Value] = []
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            cookie = self.rng.choice((36, 36, 36, 76))
            known = (
                f"@{self.rng.choice(queue.reads)}.{cookie}" if queue.reads and self.coin(0.7) else self.rng.randrange(4)
            )
            words += [known, self.rng.choice((0, 0, 0, 1, 1, 2))]
        fields: dict[str, Any] = {"fd": queue.fd, "words": words}
        if self.coin(0.15):
            fields["more"] = self.rng.choice((-4, -8, 1))
        self.calls.append(Call("write", fields))

    def viommu_alloc(self) -> None:
        parents = [hwpt for hwpt in self.world.hwpts if hwpt.flags & 1]
        parent = self.world.pick(parents)
        if parent is None:
            self.hwpt_alloc(1)
            return
        more: dict[str, Value] = {}
        if self.coin(0.4):
            data = struct.pack("<IIQQ", self.rng.randrange(1 << 32), 0, 0, 0)[: self.rng.choice((24, 24, 24, 8, 4))]
            more = {"data_len": len(data), "data_uptr": "*" + data.hex()}
        call = self.add(
            "IOMMU_VIOMMU_ALLOC",
            type=int(mock.IOMMU_VIOMMU_TYPE_SELFTEST),
            dev_id=self._device().idev,
            hwpt_id=parent.ref,
            **more,
        )
        if call is not None:
            self.world.viommus.append(Viommu(call + "out_viommu_id", parent))
            if len(more) and self.coin(0.7):
                self.world.pages.append(call + "data_uptr:8")

    def mmap(self) -> None:
        """Map the pages that a virtual IOMMU publishes; DESTROY finds it busy from then on."""
        offset: Value = self.rng.choice((0, PAGE, 1 << 40))
        if not self.world.pages and self.coin(0.9):
            return
        if self.world.pages and self.coin(0.95):
            offset = self.rng.choice(self.world.pages)
        length = self.rng.choice((2, 2, 2, 2, 2, 2, 1, 3)) * PAGE
        prot, flags = self.rng.choice((3, 3, 3, 3, 3, 1, 1, 5)), self.rng.choice((1, 1, 1, 1, 1, 1, 1, 2))
        self.calls.append(Call("mmap", {"offset": offset, "length": length, "prot": prot, "flags": flags}))

    def _viommu(self) -> Viommu | None:
        if not self.world.viommus:
            self.viommu_alloc()
        return self.world.pick(self.world.viommus)

    def vdevice_alloc(self) -> None:
        viommu = self._viommu()
        if viommu is None:
            return
        number = self.virtual()
        wide = self.rng.choice((0, 0, 0, 1 << 40))
        call = self.add("IOMMU_VDEVICE_ALLOC", viommu_id=viommu.ref, dev_id=self._device().idev, virt_id=number | wide)
        if call is not None:
            self.world.virtual.append(number)
            self.world.others.append(call + "out_vdevice_id")

    def veventq_alloc(self) -> None:
        viommu = self._viommu()
        if viommu is None:
            return
        call = self.add(
            "IOMMU_VEVENTQ_ALLOC",
            viommu_id=viommu.ref,
            type=int(mock.IOMMU_VEVENTQ_TYPE_SELFTEST) if self.coin(0.9) else 1,
            veventq_depth=self.rng.choice((1, 2, 2, 3, 0, 1 << 19, (1 << 19) + 1)),
        )
        if call is not None:
            self.world.events.append(Queue(call + "out_veventq_id", call + "out_veventq_fd"))

    def trigger_vevent(self) -> None:
        guest = self.world.pick([device for device in self.world.devices if device.guest])
        device = guest if guest is not None and self.coin(0.9) else self._device()
        if guest is not None or self.coin(0.25):
            self.add("IOMMU_TEST_OP_TRIGGER_VEVENT", dev_id=device.idev)

    def hw_queue_alloc(self) -> None:
        viommu = self._viommu()
        if viommu is None or viommu.parent.ioas is None:
            return
        area = self.world.pick(viommu.parent.ioas.areas)
        if area is None and self.coin(0.8):
            self.map(viommu.parent.ioas)
            area = self.world.pick(viommu.parent.ioas.areas)
        iova: Value = self.inside(area, 0) if area is not None else APERTURE
        length = self.rng.choice((1, 64, 2048, PAGE)) if self.coin(0.97) else 0
        call = self.add(
            "IOMMU_HW_QUEUE_ALLOC",
            viommu_id=viommu.ref,
            type=int(mock.IOMMU_HW_QUEUE_TYPE_SELFTEST),
            index=self.rng.choice((0, 0, 0, 0, 1, 1, 1, 2)),
            nesting_parent_iova=iova,
            length=length,
        )
        if call is not None:
            self.world.others.append(call + "out_hw_queue_id")
