"""What a kernel and its host offer to a test: the probes behind `@pytest.mark.needs(...)`.

A probe takes a backend and returns None, or in one clause what is missing.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable

from conformance.drivers.vfio import VfioDevice
from conformance.dsa_offers import DSA_PROBES
from uapi import iommufd_test as abi
from uapi.backend import DEV_IOMMU, Backend, File
from uapi.behaviours import BY_ID
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_IOAS_ALLOC,
)
from uapi.iommufd_test import IOMMU_TEST_CMD
from uapi.version import includes
from uapi.vfio import VFIO_DEVICE_BIND_IOMMUFD

#: QEMU's educational device, the DMA engine that the suite drives.
EDU = ("0x1234", "0x11e8")
PCI_DEVICES = "/sys/bus/pci/devices"
HUGE_PAGE = 2 << 20
#: IOMMU_TEST_CMD of drivers/iommu/iommufd/iommufd_test.h: _IO(';', 0xa0).
_IOMMU_TEST_CMD = 0x3BA0


def sysfs(backend: Backend, path: str) -> str:
    """The text of a sysfs attribute, stripped."""
    with backend.open(path, os.O_RDONLY) as file:
        return file.read(4096).decode().strip()


def find_edus(backend: Backend) -> list[str]:
    """The PCI addresses of the `edu` devices, in order."""
    found = []
    try:
        for name in sorted(backend.listdir(PCI_DEVICES)):
            ids = tuple(sysfs(backend, f"{PCI_DEVICES}/{name}/{attribute}") for attribute in ("vendor", "device"))
            if ids == EDU:
                found.append(name)
    except OSError:
        return []
    return found


def find_edu(backend: Backend) -> str | None:
    """The PCI address of the first `edu` device, e.g. "0000:00:10.0"."""
    return next(iter(find_edus(backend)), None)


def _iommu(backend: Backend) -> str | None:
    try:
        backend.open(DEV_IOMMU).close()
    except OSError as error:
        return f"{DEV_IOMMU} does not open ({errno.errorcode.get(error.errno or 0, error.errno)})"
    return None


def _root(backend: Backend) -> str | None:
    # The model's clients have the credentials it gives them, whoever runs it.
    return "not root" if backend.name == "linux" and os.geteuid() != 0 else None


def _mock(backend: Backend) -> str | None:
    if (missing := _iommu(backend)) is not None:
        return missing
    with backend.open(DEV_IOMMU) as file:
        try:
            file.ioctl(_IOMMU_TEST_CMD, bytearray(b"\x08\0\0\0\0\0\0\0"))
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return "no mock driver (CONFIG_IOMMUFD_TEST)"
        arg = IOMMU_TEST_CMD.make(op=abi.IOMMU_TEST_OP_MOCK_DOMAIN, id=IOMMU_IOAS_ALLOC(file).out_ioas_id)
        try:
            IOMMU_TEST_CMD.raw(file, arg)
        except OSError as error:
            if error.errno == errno.EINVAL and not BY_ID["mock-beside-a-real-iommu"].holds(number(backend.release)):
                return "no mock devices beside a real IOMMU before 6.17: they are on the machine `mock`"
    return None


def _dmabuf_fd(backend: Backend) -> str | None:
    if (missing := _mock(backend)) is not None:
        return missing
    arg = IOMMU_TEST_CMD.make(op=abi.IOMMU_TEST_OP_DMABUF_GET)
    arg.dmabuf_get.length, arg.dmabuf_get.open_flags = 4096, os.O_CLOEXEC
    with backend.open(DEV_IOMMU) as file:
        expected = os.dup(file.fileno())  # where a kernel that keeps the number to itself will put the descriptor
        os.close(expected)
        try:
            fd = IOMMU_TEST_CMD.raw(file, arg)
        except OSError:
            return "no dma-bufs in the mock driver"
    if fd == 0:
        if os.readlink(f"/proc/self/fd/{expected}").startswith("/dmabuf:"):
            os.close(expected)
        return NOT_COMPARED["dmabuf_fd"]
    os.close(fd)
    return None


BEHIND_NONE = "the edu device is behind no IOMMU"


def _dma_device(backend: Backend) -> str | None:
    return None if find_edu(backend) else "no edu device (PCI 1234:11e8)"


def _vfio_pci(backend: Backend) -> str | None:
    if (missing := _dma_device(backend)) is not None:
        return missing
    try:
        backend.listdir("/sys/bus/pci/drivers/vfio-pci")
        backend.listdir("/dev/vfio")
    except OSError:
        return "no vfio-pci driver"
    return None


def _vfio_cdev(backend: Backend) -> str | None:
    if (missing := _vfio_pci(backend)) is not None:
        return missing
    try:
        backend.readlink(f"{PCI_DEVICES}/{find_edu(backend)}/iommu")
    except OSError:
        return BEHIND_NONE
    return None


def bound(backend: Backend, ask: Callable[[File, int], str | None]) -> str | None:
    """The answer of `ask(iommu, dev_id)` for the first edu device, bound for the length of the question."""
    if (missing := _vfio_cdev(backend) or _iommu(backend)) is not None:
        return missing
    with VfioDevice(backend, str(find_edu(backend))) as device, backend.open(DEV_IOMMU) as iommu:
        try:
            return ask(iommu, VFIO_DEVICE_BIND_IOMMUFD(device.file, iommufd=iommu.fileno()).out_devid)
        except OSError as error:
            return f"the edu device does not bind ({errno.errorcode.get(error.errno or 0, error.errno)})"


def _hw_info_type(wanted: int, name: str) -> Callable[[Backend], str | None]:
    def probe(backend: Backend) -> str | None:
        def ask(iommu: File, dev_id: int) -> str | None:
            return None if IOMMU_GET_HW_INFO(iommu, dev_id=dev_id).out_data_type == wanted else f"no {name}"

        return bound(backend, ask)

    return probe


def _nesting(backend: Backend) -> str | None:
    def ask(iommu: File, dev_id: int) -> str | None:
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        try:
            IOMMU_HWPT_ALLOC(iommu, dev_id=dev_id, pt_id=ioas, flags=IOMMU_HWPT_ALLOC_NEST_PARENT)
        except OSError:
            return "the IOMMU has no nested translation"
        return None

    return bound(backend, ask)


def _dirty(backend: Backend) -> str | None:
    def ask(iommu: File, dev_id: int) -> str | None:
        capable = IOMMU_GET_HW_INFO(iommu, dev_id=dev_id).out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING
        return None if capable else "the IOMMU has no dirty tracking"

    return bound(backend, ask)


def _narrow_loads(backend: Backend) -> str | None:
    """An SMMU stands for an Arm board here: the rest of the kernel does not say what it is."""
    arm = _hw_info_type(IOMMU_HW_INFO_TYPE_ARM_SMMUV3, "SMMUv3")(backend) is None
    return "on Arm a load that no register takes is an external abort, of which the kernel dies" if arm else None


def _edu_pair(backend: Backend) -> str | None:
    if (missing := _vfio_cdev(backend)) is not None:
        return missing
    groups = [backend.readlink(f"{PCI_DEVICES}/{address}/iommu_group") for address in find_edus(backend)[:2]]
    return None if len(groups) == 2 and groups[0] == groups[1] else "no two edu functions in one IOMMU group"


def _noiommu(backend: Backend) -> str | None:
    if (missing := _vfio_pci(backend)) is not None:
        return missing
    if older(backend.release, "7.3"):
        return "no-IOMMU devices came with 7.3"
    try:
        mode = sysfs(backend, "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    except OSError:
        mode = "N"
    if mode != "Y":
        return "VFIO gives away no devices without an IOMMU (vfio.enable_unsafe_noiommu_mode=1)"
    return None if _vfio_cdev(backend) == BEHIND_NONE else "the device is behind an IOMMU"


def _huge_pages(backend: Backend) -> str | None:
    try:
        backend.buffer(HUGE_PAGE, huge=True).close()
    except OSError:
        return "no free 2 MiB huge page"
    return None


def _memfd(backend: Backend) -> str | None:
    try:
        os.close(os.memfd_create("iommulab-probe"))
    except OSError:
        return "no memfd_create"
    return None


def _hugetlb_memfd(backend: Backend) -> str | None:
    try:
        fd = os.memfd_create("iommulab-probe", os.MFD_HUGETLB)
    except OSError:
        return "no memfd_create with MFD_HUGETLB"
    try:
        os.ftruncate(fd, 3 * HUGE_PAGE)
        mmap.mmap(fd, 3 * HUGE_PAGE).close()
    except OSError:
        return NOT_COMPARED["hugetlb_memfd"]
    finally:
        os.close(fd)
    return None


#: Skips that are no difference between two runs: a released kernel has a fault that the model has on request only; the
#: machine that the model runs on lacks what the other had.
NOT_COMPARED = {
    "dmabuf_fd": "DMABUF_GET returns 0 instead of the descriptor, as in 7.3",
    "hugetlb_memfd": "no three free huge pages of 2 MiB on this host",
}


def _fail_nth(backend: Backend) -> str | None:
    try:
        backend.open("/proc/thread-self/fail-nth").close()
        backend.open("/sys/kernel/debug/fail_iommufd/times").close()
    except OSError:
        return "no fault injection (CONFIG_FAULT_INJECTION, debugfs)"
    return None


def _interrupt_remapping(backend: Backend) -> str | None:
    """The first VT-d unit's extended capabilities say so in bit 3, and Linux uses what there is."""
    try:
        if int(sysfs(backend, "/sys/class/iommu/dmar0/intel-iommu/ecap"), 16) >> 3 & 1:
            return None
    except OSError:
        return "no VT-d unit"
    return "the VT-d unit does not remap interrupts"


PROBES: dict[str, Callable[[Backend], str | None]] = {
    "iommu": _iommu,
    "root": _root,
    "mock": _mock,
    "dmabuf_fd": _dmabuf_fd,
    "dma_device": _dma_device,
    "vfio_cdev": _vfio_cdev,
    "edu_pair": _edu_pair,
    "smmuv3": _hw_info_type(IOMMU_HW_INFO_TYPE_ARM_SMMUV3, "SMMUv3"),
    "vtd": _hw_info_type(IOMMU_HW_INFO_TYPE_INTEL_VTD, "VT-d"),
    "nesting": _nesting,
    "no_nesting": lambda backend: None if _nesting(backend) else "the IOMMU has nested translation",
    "narrow_loads": _narrow_loads,
    "dirty": _dirty,
    "no_dirty": lambda backend: None if _dirty(backend) else "the IOMMU has dirty tracking",
    "noiommu": _noiommu,
    "huge_pages": _huge_pages,
    "memfd": _memfd,
    "hugetlb_memfd": _hugetlb_memfd,
    "fail_nth": _fail_nth,
    "interrupt_remapping": _interrupt_remapping,
    **DSA_PROBES,
}


def number(release: str) -> str:
    """The release's name alone ("7.3.4-oracle" -> "7.3.4", "7.4.0-rc1+" -> "7.4-rc1"); "0.0" for what is none."""
    found = re.match(r"(\d+\.\d+)(\.\d+)?(-rc\d+)?", release)
    if found is None:
        return "0.0"
    base, point, candidate = found.groups()
    return base + (candidate or point or "")


def older(release: str, since: str) -> bool:
    """Whether a kernel of this release ("7.3.4-oracle", "7.4.0-rc1+", "6.12") comes before `since`."""
    return not includes(number(release), since)
