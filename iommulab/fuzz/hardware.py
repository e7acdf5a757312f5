"""Programs with a real device behind an IOMMU: VFIO's device files in place of the mock's devices.

The generator is the mock's; what made a mock device binds and attaches a VFIO device here. What an IOMMU's driver has
of its own is in a subclass (`vtd_actions.py`). There are no mock devices beside the real one: 7.3 does not look whose
domain it is when it replaces one (iommu_replace_group_handle()), and hangs in the other driver.
"""

from __future__ import annotations

from iommulab.fuzz.memory import PAGE
from iommulab.fuzz.program import Call, Value
from iommulab.fuzz.vfio_actions import VfioActions
from iommulab.fuzz.world import Device, DeviceFile, Hwpt, Ioas

U64_MAX = (1 << 64) - 1


class HardwareGenerator(VfioActions):
    """Makes one program."""

    #: Ends of the aperture that a domain may have, and the window of interrupts.
    lasts: tuple[int, ...] = ((1 << 48) - 1,)
    msi = (0xFEE0_0000, 0xFEEF_FFFF)

    def actions(self) -> list[tuple[float, str]]:
        return ACTIONS

    def scenes(self) -> list[str]:
        return SCENES

    def place(self, ioas: Ioas) -> int:
        """An IOVA to map at: close together mostly, else where an aperture or a window ends."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.06 and ioas.areas:
            known = rng.choice(ioas.areas)
            if isinstance(known.iova, int):
                return (known.iova + rng.choice((0, known.length, known.length - PAGE, -PAGE, 2048))) & U64_MAX
        if kind < 0.16:
            edges = (0, *self.msi, *self.lasts, *(last >> 1 for last in self.lasts), 1 << 32, 12345)
            return max((rng.choice(edges) + rng.choice((0, 1, -PAGE, 1 - PAGE, 1 - 2 * PAGE, PAGE))), 0) & U64_MAX
        start = rng.choice((0x1000000, 0x1000000, 0x1000000, 0x1000000, 0x40000000, 1 << 32, 1 << 40))
        return (
            start
            + rng.randrange(rng.choice((40, 512))) * PAGE
            + (rng.choice((0, 0, 0, 2048)) if not ioas.aligned else 0)
        )

    # -- devices -------------------------------------------------------------------------------------------------------

    def mock_domain(self, wanted: int | None = None) -> None:
        """What the mock's scenes begin with: a device that is bound and attached."""
        file = next((file for file in self.world.files if file.device is not None), None) or self.bind()
        target, ioas = self._target()
        self.attach_to(file, target, ioas)

    def attach_to(self, file: DeviceFile, target: Value, ioas: Ioas | None) -> None:
        """ATTACH, or the replacement of what was attached."""
        call = self.on(file, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", pt_id=target, argsz=self.rng.choice((12, 16, 16)))
        if call is not None:
            file.ioas = ioas
            if ioas is not None:
                ioas.domain = True
                if not any(hwpt.ref == target for hwpt in self.world.hwpts):
                    self.world.hwpts.append(Hwpt(call + "pt_id", ioas))

    def attach(self) -> None:
        self.attach_to(self._file(), *self._target())

    def replace(self, hwpt: Hwpt | None = None, device: Device | None = None) -> None:
        file = next((file for file in self.world.files if file.device is device and device is not None), None)
        if hwpt is None:
            self.attach_to(file or self._file(), *self._target())
        else:
            self.attach_to(file or self._file(), hwpt.ref, hwpt.ioas)

    def detach(self) -> None:
        file = self._file()
        self.on(file, "VFIO_DEVICE_DETACH_IOMMUFD_PT", argsz=self.rng.choice((8, 12)))
        if self.coin(0.9):
            file.ioas = None

    def pasid_attach(self) -> None:
        file, pasid = self._file(), self.pasid()
        self.on(file, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", argsz=16, flags=1, pasid=pasid, pt_id=self._pasid_target())

    def pasid_detach(self) -> None:
        self.on(self._file(), "VFIO_DEVICE_DETACH_IOMMUFD_PT", argsz=12, flags=1, pasid=self.pasid())

    def destroy_device(self) -> None:
        """The id of a bound device: it is the file's, and stays."""
        device = self.world.pick(self.world.devices)
        if device is not None:
            self.add("IOMMU_DESTROY", id=device.idev)

    # -- scenes --------------------------------------------------------------------------------------------------------

    def scene_pasid(self) -> None:
        self.mock_domain()
        self.hwpt_alloc(8)
        self.replace(self.world.hwpts[-1])
        self.pasid_attach()

    def scene_faults(self) -> None:
        self.mock_domain()
        self.fault_queue()
        self.hwpt_alloc(1)
        self.hwpt_nested(fault=True)
        self.replace(self.world.hwpts[-1] if self.world.hwpts else None)

    def scene_viommu(self) -> None:
        self.mock_domain()
        self.hwpt_alloc(1)
        self.map()
        self.viommu_alloc()
        self.vdevice_alloc()
        self.hwpt_nested()
        self.replace(self.world.hwpts[-1] if self.world.hwpts else None)
        self.veventq_alloc()

    def scene_dirty(self) -> None:
        self.mock_domain()
        self.hwpt_alloc(2)
        self.replace(self.world.hwpts[-1] if self.world.hwpts else None)
        self.map()
        self.set_dirty_tracking()
        self.scene_dma()
        self.get_dirty()

    def scene_dma(self) -> None:
        """A device that moves what is mapped."""
        if self._file().ioas is None:
            self.mock_domain()
        file = self._file()
        if file.ioas is not None:
            self.map(file.ioas)
            self.map(file.ioas)
        self.enable(file)
        self.edu_copy(file)
        if self.coin(0.3):
            self.unmap()
            self.edu_copy(file)

    def scene_irq(self) -> None:
        """An interrupt that signals an eventfd."""
        if self._file().ioas is None and self.coin(0.8):
            self.mock_domain()
        self.set_irqs(self.rng.choice((0, 1, 1)))
        self.enable()
        self.edu_irq()
        self.set_irqs()
        self.edu_irq()

    def scene_compat(self) -> None:
        """VFIO's container calls."""
        self.vfio_ioas()
        for _ in range(4):
            self.compat()

    def container(self) -> None:
        """Calls of VFIO's containers that iommufd knows, or does not."""
        name = self.rng.choice(
            ("VFIO_GET_API_VERSION", "VFIO_IOMMU_ENABLE", "VFIO_IOMMU_DISABLE", "VFIO_IOMMU_DIRTY_PAGES")
        )
        self.calls.append(Call(name, {}))

    def _questions(self) -> None:
        """What the final state is; the executor asks for the rest."""
        world = self.world
        if any(call.name == "IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT" for call in self.calls):
            self.sure("IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT", limit=65536)
        for ioas in world.ioas[:4]:
            self.sure("IOMMU_IOAS_IOVA_RANGES", ioas_id=ioas.ref, num_iovas=8, allowed_iovas=">128")
        for hwpt in [hwpt for hwpt in world.hwpts if hwpt.flags & 2][:2]:
            for area in (hwpt.ioas.areas if hwpt.ioas is not None else [])[:2]:
                self.sure(
                    "IOMMU_HWPT_GET_DIRTY_BITMAP",
                    hwpt_id=hwpt.ref,
                    flags=1,
                    iova=area.iova,
                    length=max(PAGE, area.length // PAGE * PAGE),
                    page_size=PAGE,
                    data=">16",
                )
        for file in world.files[:1]:
            self.on(file, "VFIO_DEVICE_GET_INFO", argsz=24)


SCENES = [
    "scene_mapped",
    "scene_pasid",
    "scene_faults",
    "scene_viommu",
    "scene_dirty",
    "scene_access",
    "scene_dma",
    "scene_dma",
    "scene_irq",
    "scene_compat",
]

ACTIONS: list[tuple[float, str]] = [
    (3, "new_ioas"),
    (12, "map"),
    (3, "map_file"),
    (5, "copy"),
    (6, "unmap"),
    (3, "iova_ranges"),
    (1.5, "allow_iovas"),
    (0.7, "reserve"),
    (1.5, "option"),
    (0.5, "change_process"),
    (0.3, "get_pa"),
    (1, "mock_domain"),
    (6, "attach"),
    (3, "detach"),
    (1, "open_again"),
    (1, "close_device"),
    (5, "hwpt_alloc"),
    (3, "hwpt_nested"),
    (2, "invalidate"),
    (3, "hw_info"),
    (4, "destroy"),
    (0.7, "destroy_device"),
    (2, "pasid_attach"),
    (1, "pasid_detach"),
    (1, "fault_queue"),
    (1, "use_queue"),
    (1.5, "viommu_alloc"),
    (1, "vdevice_alloc"),
    (1, "veventq_alloc"),
    (0.7, "hw_queue_alloc"),
    (1.5, "create_access"),
    (2, "access_pages"),
    (1.5, "access_rw"),
    (1, "access_release"),
    (2, "set_dirty_tracking"),
    (2, "get_dirty"),
    (1, "vfio_ioas"),
    (4, "compat"),
    (0.3, "check_refs"),
    (0.5, "protect"),
    (0.3, "raw"),
    (1, "device_info"),
    (1.5, "region_info"),
    (1.5, "irq_info"),
    (0.7, "hot_reset_info"),
    (0.7, "reset"),
    (2, "feature"),
    (3, "read_region"),
    (3, "write_region"),
    (1, "enable"),
    (5, "set_irqs"),
    (1, "mmap_region"),
    (1, "ioeventfd"),
    (1, "eventfd_write"),
    (0.7, "container"),
    (1.5, "eventfd_read"),
    (1, "edu_irq"),
    (0.5, "edu_liveness"),
    (2, "edu_copy"),
]
