"""Random programs.

Each action of `ACTIONS` adds one call that should succeed in the world as it is believed to be, chosen by weight among
those that have what they need. A call in seven is then spoiled in one field: a wrong kind of id, a reserved bit, a
size, a length near 2^64, a bad pointer. At the end come questions about the state (`_questions`).

Left out (docs/fuzz.md, "What is not tried"): a mock device's death with a PASID attached, a MAP of nearly 2^64 bytes
off a page, arrays of nearly 2^19 invalidations, and dirty bits over leaves that merge by chance.
"""

from __future__ import annotations

import random

from iommulab.fuzz.maker import SPOILED
from iommulab.fuzz.memory import PAGE
from iommulab.fuzz.program import RAW, Call, Program, Value
from iommulab.fuzz.queue_actions import QueueActions
from iommulab.fuzz.world import Area


class Generator(QueueActions):
    """Makes one program."""

    def __init__(self, rng: random.Random, dmabuf: bool = False) -> None:
        super().__init__(rng, dmabuf)
        # Half of the programs look at a few things closely.
        self.weights = [
            weight * (rng.choice((0.2, 1, 1, 4)) if rng.random() < 0.5 else 1) for weight, _ in self.actions()
        ]

    def actions(self) -> list[tuple[float, str]]:
        """Methods that add a call, and how often each is chosen where nothing is known about the world."""
        return ACTIONS

    def scenes(self) -> list[str]:
        """Methods that add several."""
        return SCENES

    def program(self, count: int) -> Program:
        self.spoiled = 0.02
        self.new_ioas()
        if self.coin(0.8):
            self.mock_domain()
        if self.coin(0.75):
            getattr(self, self.rng.choice(self.scenes()))()
        self.spoiled = SPOILED
        while len(self.calls) < count:
            _, action = self.rng.choices(self.actions(), self.weights)[0]
            getattr(self, action)()
        del self.calls[count:]
        self._questions()
        return Program(self.calls, main_first=self.rng.random() < 0.3)

    # -- scenes: what takes several calls in their order -------------------------------------------------------------

    def scene_mapped(self) -> None:
        """A second IOAS, mappings in both, a copy."""
        self.map()
        self.map()
        self.new_ioas()
        self.map_file()
        self.copy()

    def scene_pasid(self) -> None:
        """A device whose PASIDs have page tables of their own."""
        self.mock_domain(4)
        self.hwpt_alloc(8)
        self.hwpt_alloc(self.rng.choice((8, 10)))
        self.replace(self.world.hwpts[-1], self.world.devices[-1])
        self.pasid_attach()
        self.pasid_attach()

    def scene_faults(self) -> None:
        """A nested page table with a fault queue, attached, and page requests."""
        self.mock_domain(self.rng.choice((0, 4)))
        self.fault_queue()
        self.hwpt_alloc(1)
        self.hwpt_nested(fault=True)
        self.replace(self.world.hwpts[-1], self.world.devices[-1])
        for _ in range(self.rng.randrange(1, 4)):
            self.trigger_iopf()
        if self.world.faults and self.coin(0.8):
            self.read_queue(self.world.faults[-1])
            self.write_queue(self.world.faults[-1])

    def scene_viommu(self) -> None:
        """A device in a guest: vIOMMU, vDEVICE, nested page table, event queue."""
        self.mock_domain(self.rng.choice((0, 4)))
        self.hwpt_alloc(1)
        self.map()
        self.viommu_alloc()
        self.vdevice_alloc()
        self.hwpt_nested()
        self.replace(self.world.hwpts[-1], self.world.devices[-1])
        self.veventq_alloc()
        self.trigger_vevent()
        self.hw_queue_alloc()
        if self.world.pages:
            self.mmap()

    def scene_dirty(self) -> None:
        """Dirty tracking that is on, with something mapped."""
        self.mock_domain(self.rng.choice((0, 4)))
        self.hwpt_alloc(2)
        self.replace(self.world.hwpts[-1], self.world.devices[-1])
        self.map()
        self.set_dirty_tracking()
        self.map()
        self.make_dirty()

    def scene_access(self) -> None:
        """Pins by accesses."""
        self.map()
        self.create_access(pins=True)
        self.map()
        self.access_pages()
        self.access_pages()

    # -- the rest ----------------------------------------------------------------------------------------------------

    def raw(self) -> None:
        """A request that no kernel knows."""
        self.calls.append(Call(f"RAW_{self.rng.choice(RAW):#x}"))

    def memory_limit(self) -> None:
        self.add("IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT", limit=self.rng.choice((0, 11, 12, 16, 64, 4096, 65536)))

    def vfio_ioas(self) -> None:
        kind = self.rng.randrange(4)
        if kind == 0:
            self.add("IOMMU_VFIO_IOAS", op=0)
        elif kind == 1 and self.coin(0.4):
            self.add("IOMMU_VFIO_IOAS", op=2)
            self.world.compat = None
        else:
            ioas = self._ioas()
            self.add("IOMMU_VFIO_IOAS", op=1, ioas_id=ioas.ref)
            self.world.compat = ioas

    def compat(self) -> None:
        """VFIO's container calls on the iommufd."""
        ioas = self.world.compat
        if ioas is None and self.coin(0.9):
            self.vfio_ioas()
            return
        rng = self.rng
        kind = rng.randrange(6)
        if kind == 0:
            number = rng.choice((1, 3, 4, 8, 9, 10, 6, 0))
            self.calls.append(Call("VFIO_CHECK_EXTENSION", {}, arg=number))
        elif kind == 1 and not self.world.aligned:
            self.calls.append(Call("VFIO_SET_IOMMU", {}, arg=rng.choice((1, 3, 3, 8, 2))))
        elif kind == 2:
            size = rng.choice((16, 24, 88, 104, 128, 200, 15))
            self.add("VFIO_IOMMU_GET_INFO", argsz=size)
        elif kind in (3, 1) and ioas is not None:
            va, length, may_write = self.piece(ioas)
            iova = self.place(ioas)
            flags = 3 if may_write else 1
            if self.add("VFIO_IOMMU_MAP_DMA", flags=flags, vaddr=va, iova=iova, size=length) is not None:
                ioas.areas.append(Area(iova, length, va, may_write))
        elif ioas is not None:
            area = self.world.pick(ioas.areas)
            if area is None or self.coin(0.1):
                self.add("VFIO_IOMMU_UNMAP_DMA", flags=2)
                return
            skip, length = self.part(area, self.coin(0.8))
            self.add("VFIO_IOMMU_UNMAP_DMA", iova=self.inside(area, skip), size=length)

    def check_map(self) -> None:
        hwpt = self.world.pick([hwpt for hwpt in self.world.hwpts if hwpt.ioas is not None and hwpt.ioas.areas])
        if hwpt is None or hwpt.ioas is None:
            return
        area = self.world.pick([area for area in hwpt.ioas.areas if area.va])
        if area is not None:
            self.add(
                "IOMMU_TEST_OP_MD_CHECK_MAP",
                id=hwpt.ref,
                iova=self.inside(area, 0),
                length=area.length,
                uptr=area.va,
            )

    def protect(self) -> None:
        """Change the memory under the mappings."""
        page = self.rng.randrange(32)
        where: dict[str, Value] = {"address": f"&buf+{page * PAGE:#x}", "length": PAGE * self.rng.choice((1, 1, 2))}
        if self.coin(0.4):
            self.calls.append(Call("munmap", where))
        else:
            self.calls.append(Call("mprotect", where | {"prot": self.rng.choice((0, 1, 3))}))

    def _questions(self) -> None:
        """What the final state is: ranges, mappings and dirty bits. The executor asks for the rest."""
        world = self.world
        if any(call.name == "IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT" for call in self.calls):
            self.sure("IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT", limit=65536)
        for ioas in world.ioas[:4]:
            self.sure("IOMMU_IOAS_IOVA_RANGES", ioas_id=ioas.ref, num_iovas=8, allowed_iovas=">128")
        pairs = [(hwpt, area) for hwpt in world.hwpts if hwpt.ioas is not None for area in hwpt.ioas.areas if area.va]
        for hwpt, area in self.rng.sample(pairs, min(len(pairs), 8)):
            self.sure(
                "IOMMU_TEST_OP_MD_CHECK_MAP",
                id=hwpt.ref,
                iova=area.iova,
                length=area.length,
                uptr=area.va,
            )
        for hwpt in [hwpt for hwpt in world.hwpts if hwpt.flags & 2][:3]:
            for area in [area for area in (hwpt.ioas.areas if hwpt.ioas is not None else []) if world.aligned][:3]:
                self.sure(
                    "IOMMU_HWPT_GET_DIRTY_BITMAP",
                    hwpt_id=hwpt.ref,
                    flags=1,
                    iova=area.iova,
                    length=max(PAGE, area.length // PAGE * PAGE),
                    page_size=PAGE,
                    data=">16",
                )


SCENES = [
    "scene_mapped",
    "scene_pasid",
    "scene_faults",
    "scene_viommu",
    "scene_viommu",
    "scene_dirty",
    "scene_access",
]

ACTIONS: list[tuple[float, str]] = [
    (3, "new_ioas"),
    (14, "map"),
    (4, "map_file"),
    (4, "use_dmabuf"),
    (6, "copy"),
    (7, "unmap"),
    (2, "iova_ranges"),
    (1, "allow_iovas"),
    (1, "reserve"),
    (2, "option"),
    (0.7, "change_process"),
    (0.3, "get_pa"),
    (5, "mock_domain"),
    (4, "replace"),
    (6, "hwpt_alloc"),
    (4, "hwpt_nested"),
    (2.5, "invalidate"),
    (1.5, "check_iotlb"),
    (0.7, "check_cache"),
    (1.5, "hw_info"),
    (5, "destroy"),
    (1, "destroy_device"),
    (5, "pasid_attach"),
    (2, "pasid_detach"),
    (1.5, "pasid_check"),
    (2, "fault_queue"),
    (3.5, "trigger_iopf"),
    (4, "use_queue"),
    (2.5, "viommu_alloc"),
    (1, "mmap"),
    (3, "vdevice_alloc"),
    (2, "veventq_alloc"),
    (2, "trigger_vevent"),
    (2, "hw_queue_alloc"),
    (3, "create_access"),
    (5, "access_pages"),
    (3, "access_rw"),
    (3, "access_release"),
    (2.5, "set_dirty_tracking"),
    (3, "get_dirty"),
    (3, "make_dirty"),
    (0.5, "memory_limit"),
    (1, "vfio_ioas"),
    (4, "compat"),
    (2, "check_map"),
    (0.5, "check_refs"),
    (0.5, "protect"),
    (0.3, "raw"),
]
