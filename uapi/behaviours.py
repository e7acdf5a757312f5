"""What differs between releases beside the headers: one table, which the model asks and `iommulab versions` prints.

A row says what a release does since some mainline release and the stable releases that took it over, what an older one
does, and how that is known. The model asks `has(release, "some-id")`; a handler with an old and a new way carries the
id, not a number. What the headers say (ioctls, structs, constants) is declared where it is declared, with `since`.

Evidence, the best there is for the difference itself:
  run         seen on real kernels on both sides, 6.12.117 and 7.3.4 (or 6.12.117 alone for what only it shows)
  source      read in the source of releases on both sides: 6.12.95, 6.12.117, 7.2.13, 7.3.4
  header      the release's own header says so
  UNVERIFIED  from the history as people tell it; no release on the older side was looked at
`since` is exact where a header or `between` fixes it. `between` names the releases that were looked at, the last
without and the first with: with it, `since` is the release in between that is said to have brought it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from uapi.version import includes

RUN, SOURCE, HEADER, UNVERIFIED = "run", "source", "header", "UNVERIFIED"
EVIDENCE = (RUN, SOURCE, HEADER, UNVERIFIED)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One difference. `test` is a test that shows it, of the suite or of `tests/`; "" where there is none.

    `modelled` is False where the model does the new thing at every release, with the reason in `note`.
    """

    id: str
    area: str
    since: str
    what: str
    before: str
    evidence: str
    backports: tuple[str, ...] = ()
    between: tuple[str, str] | None = None
    test: str = ""
    modelled: bool = True
    note: str = ""

    def holds(self, release: str) -> bool:
        """Whether the release does the new thing."""
        return includes(release, self.since, self.backports)


def _row(id: str, area: str, since: str, what: str, before: str, evidence: str, **more: object) -> Behaviour:
    return Behaviour(id, area, since, what, before, evidence, **more)  # type: ignore[arg-type]


_LATE_612 = ("6.12.117",)
_AFTER_612 = ("6.12.117", "7.2.13")

TABLE: tuple[Behaviour, ...] = (
    # -- iommufd ------------------------------------------------------------------------------------------------------
    _row(
        "noiommu-cdev",
        "vfio",
        "7.3",
        "with enable_unsafe_noiommu_mode a device without an IOMMU gets a character device, and iommufd binds it",
        "only the older interface of groups takes it",
        SOURCE,
        between=("7.2.13", "7.3.4"),
        test="conformance/test_noiommu.py",
    ),
    _row(
        "hwpt-alloc-missing-pt",
        "iommufd",
        "6.7",
        "HWPT_ALLOC of a pt_id that does not exist is EINVAL",
        "ENOENT",
        UNVERIFIED,
        test="conformance/test_hwpt_errors.py",
        modelled=False,
        note="the older errno is known by hearsay only",
    ),
    _row(
        "fault-queue-on-paging-hwpt",
        "iommufd",
        "6.13",
        "HWPT_ALLOC takes FAULT_ID_VALID for a paging HWPT",
        "EOPNOTSUPP: the flag is for nested HWPTs only",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_fault_queue_on_a_paging_hwpt_is_eopnotsupp",
    ),
    _row(
        "invalidate-any-object",
        "iommufd",
        "6.13",
        "HWPT_INVALIDATE of an object that is neither nested HWPT nor vIOMMU is EINVAL",
        "ENOENT",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_invalidate_of_a_paging_hwpt_is_enoent",
    ),
    _row(
        "wrap-before-length",
        "iommufd",
        "6.13",
        "a map whose user address wraps is EOVERFLOW before its length is looked at",
        "a length above 2^64 - 4097 is EINVAL first",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_map_of_nearly_everything_is_einval",
    ),
    _row(
        "invalidate-caps",
        "iommufd",
        "7.2",
        "HWPT_INVALIDATE takes at most 2^19 entries of at most 4096 bytes (EINVAL)",
        "no cap: the driver goes through them",
        SOURCE,
        backports=_LATE_612,
        between=("6.12.95", "6.12.117"),
        test="conformance/test_viommu_errors.py",
        modelled=False,
        note="an uncapped walk of 2^32 entries shows nothing that a client could wait for",
    ),
    _row(
        "fault-read-too-small",
        "iommufd",
        "7.2",
        "a read that the first fault group does not fit into is EINVAL",
        "it returns 0, as if nothing were queued",
        SOURCE,
        backports=_LATE_612,
        between=("6.12.95", "6.12.117"),
        test="conformance/test_mock_fault_file.py::test_read_without_room_is_einval_while_something_waits",
    ),
    _row(
        "dirty-bitmap-length-0",
        "iommufd",
        "7.3",
        "GET_DIRTY_BITMAP of no bytes is EINVAL",
        "EOVERFLOW from an IOVA above 0; from IOVA 0 it is the whole space",
        SOURCE,
        backports=_LATE_612,
        between=("7.2.13", "7.3.4"),
        test="tests/kernel_model/test_versions.py::test_dirty_bitmap_of_no_bytes_is_einval_since_7_3",
    ),
    _row(
        "replace-answers-old-faults",
        "iommufd",
        "7.2",
        "a replace answers what waits for an answer in the queue of the old HWPT",
        "what waits in the queue of the new one is looked through, in vain",
        SOURCE,
        backports=_LATE_612,
        between=("6.12.95", "6.12.117"),
        test="conformance/test_mock_attach.py",
        modelled=False,
        note="a fault that is never answered is a leak of the kernel's own",
    ),
    _row(
        "mmap-of-iommufd",
        "iommufd",
        "6.17",
        "/dev/iommu has mmap(2): EINVAL, EPERM or ENXIO for what no driver published",
        "ENODEV: the file cannot be mapped",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_mmap_of_iommufd_is_enodev",
    ),
    _row(
        "auto-iova-alignment-cap",
        "iommufd",
        "6.17",
        "an automatic IOVA is aligned to at most 2 MiB",
        "to the whole length, rounded up to a power of two",
        UNVERIFIED,
        backports=("6.12.95",),
        test="conformance/test_ioas_auto_iova.py",
        modelled=False,
        note="every release that could be read has the cap; who took it over, and when, is not known",
    ),
    _row(
        "unmap-at-the-top",
        "iommufd",
        "7.3",
        "areas that end at 2^64 - 1 are unmapped like any other",
        "the kernel's loop wraps; a client must not try",
        UNVERIFIED,
        test="conformance/test_ioas_unmap.py",
        modelled=False,
        note="what an older kernel does there is a hang or worse",
    ),
    _row(
        "vdevice-tombstones",
        "iommufd",
        "6.17",
        "a vDEVICE whose device goes leaves a tombstone: its id is never used again",
        "a bound device with a vDEVICE cannot go first",
        UNVERIFIED,
        test="conformance/test_mock_vdevice.py",
        modelled=False,
        note="6.13 to 6.16 keep the device until the vDEVICE is destroyed",
    ),
    _row(
        "dma-buf-in-map-file",
        "iommufd",
        "6.19",
        "IOAS_MAP_FILE takes a dma-buf of vfio-pci or of the mock driver",
        "a dma-buf is a file that is neither shmem nor hugetlbfs",
        UNVERIFIED,
        test="conformance/test_mock_dmabuf.py",
    ),
    _row(
        "cache-coherency-at-allocation",
        "iommufd",
        "6.8",
        "a HWPT enforces cache coherency by the device that it was made for, for good",
        "attaching a second device could upgrade a shared HWPT",
        UNVERIFIED,
        modelled=False,
        note="shows in VFIO_DMA_CC_IOMMU only, and not on the machines here",
    ),
    # -- VT-d ---------------------------------------------------------------------------------------------------------
    _row(
        "vtd-write-only",
        "vt-d",
        "6.19",
        "a page that is mapped writable only refuses reads",
        "the driver sets the read bit in every second-stage entry (it is the present bit of a first-stage one)",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_write_only_mapping_lets_the_device_read",
    ),
    # -- VFIO ---------------------------------------------------------------------------------------------------------
    _row(
        "vfio-cdev",
        "vfio",
        "6.6",
        "VFIO devices have a node of their own, /dev/vfio/devices/vfioX",
        "groups only",
        HEADER,
        test="tests/kernel_model/test_versions.py::test_vfio_device_nodes_came_with_6_6",
    ),
    _row(
        "intx-without-trigger",
        "vfio",
        "6.9",
        "SET_IRQS of INTx with eventfd -1 enables it without a trigger",
        "EINVAL",
        UNVERIFIED,
        test="conformance/test_vfio_irqs.py",
    ),
    _row(
        "bar-access-64-bits",
        "vfio",
        "6.10",
        "reads and writes of a BAR go in 8 bytes where they are aligned",
        "at most 4 bytes at a time",
        UNVERIFIED,
        test="conformance/test_vfio_region.py",
    ),
    _row(
        "attach-pasid",
        "vfio",
        "6.15",
        "ATTACH and DETACH know the flag PASID",
        "EINVAL",
        HEADER,
        test="conformance/test_vfio_cdev.py",
    ),
    _row(
        "bind-copies-struct",
        "vfio",
        "6.17",
        "BIND_IOMMUFD knows the flag TOKEN, and a tail that is not zero is E2BIG",
        "any flag is EINVAL, the tail is not looked at",
        HEADER,
        test="conformance/test_vfio_cdev.py",
    ),
    _row(
        "precopy-info-v2",
        "vfio",
        "7.2",
        "DEVICE_FEATURE 12 of a device without migration is EINVAL, even to PROBE",
        "ENOTTY: no such feature",
        HEADER,
        test="conformance/test_vfio_feature.py",
    ),
    _row(
        "error-irq-everywhere",
        "vfio",
        "7.3",
        "every vfio-pci device has the error interrupt",
        "PCI Express devices only",
        RUN,
        between=("7.2.13", "7.3.4"),
        test="conformance/test_vfio_irqs.py",
    ),
    # -- the mock driver ----------------------------------------------------------------------------------------------
    _row(
        "mock-beside-a-real-iommu",
        "mock",
        "6.17",
        "mock devices work on a machine with an IOMMU",
        "from 6.8 on MOCK_DOMAIN is EINVAL there: the device is offered to the real driver, which does not take it",
        RUN,
        between=_AFTER_612,
        test="tests/kernel_model/test_versions.py::test_mock_device_beside_a_real_iommu_came_with_6_17",
    ),
    _row(
        "mock-generic-pt",
        "mock",
        "6.19",
        "mock domains have a table with leaves of every power of two from 2 KiB, or HUGE ones of 4 KiB and 1 MiB, by "
        "the data of HWPT_ALLOC",
        "leaves of 2 KiB (and 1 MiB for a device with the flag HUGE_IOVA); HWPT_ALLOC of a paging HWPT takes no "
        "data; a failure that is injected into a map is ENOENT (not modelled)",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_paging_mock_hwpt_takes_no_data",
    ),
    _row(
        "mock-dirty-cap",
        "mock",
        "7.2",
        "DIRTY of more than 2^27 bits is EOVERFLOW",
        "only memory limits it",
        SOURCE,
        backports=_LATE_612,
        between=("6.12.95", "6.12.117"),
        test="conformance/test_mock_dirty.py",
    ),
    _row(
        "mock-dmabuf-get-returns-0",
        "mock",
        "7.3",
        "DMABUF_GET makes a descriptor and returns 0",
        "it returns the descriptor",
        SOURCE,
        between=("7.2.13", "7.3.4"),
        test="conformance/test_mock_dmabuf.py",
        modelled=False,
        note="the descriptor is returned unless the kernel is asked to do as 7.3 does",
    ),
    _row(
        "mock-check-map-looks-first",
        "mock",
        "6.19",
        "MD_CHECK_MAP looks the HWPT up first (ENOENT before EINVAL)",
        "the alignment comes first (EINVAL before ENOENT)",
        RUN,
        between=_AFTER_612,
        test="conformance/test_versions.py::test_check_off_the_page_is_einval_before_the_hwpt_is_looked_up",
    ),
)

BY_ID = {row.id: row for row in TABLE}


@functools.cache
def has(release: str, behaviour: str) -> bool:
    """Whether a release does the new thing of a row. KeyError for an id that is not in the table."""
    return BY_ID[behaviour].holds(release)
