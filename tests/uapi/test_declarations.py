"""The declarations against the recorded table of every sampled release: none missing, none extra, none moved."""

from __future__ import annotations

import ctypes

import pytest

from uapi import history, iommufd, registry, vfio
from uapi.layout import layout_at, sizes_at
from uapi.table import Table, table_at

SAMPLES = [(arch, release) for arch in ("x86_64", "i386") for release in history.tables(arch)]


def mismatches(recorded: Table, declared: Table) -> list[str]:
    found = []
    for part in ("ioctls", "structs", "constants"):
        theirs, ours = getattr(recorded, part), getattr(declared, part)
        found += [f"missing: {name}" for name in theirs.keys() - ours.keys()]
        found += [f"extra: {name}" for name in ours.keys() - theirs.keys()]
        found += [
            f"{name}: recorded {theirs[name]}, declared {ours[name]}"
            for name in theirs.keys() & ours.keys()
            if theirs[name] != ours[name]
        ]
    return found


@pytest.mark.parametrize(("arch", "release"), SAMPLES, ids=[f"{release}-{arch}" for arch, release in SAMPLES])
def test_declarations_cut_to_a_release_equal_its_table(arch: str, release: str) -> None:
    recorded, declared = history.table(release, arch), table_at(release, arch)
    assert mismatches(recorded, declared) == []
    assert recorded.headers == declared.headers


def test_the_samples_are_31_releases_on_two_architectures() -> None:
    assert [len(history.tables(arch)) for arch in ("x86_64", "i386")] == [31, 31]


def test_newest_header_has_the_counts_of_the_issue() -> None:
    assert (len(registry.ioctls("linux/iommufd.h")), len(registry.structs("linux/iommufd.h"))) == (22, 38)
    assert (len(registry.ioctls("linux/vfio.h")), len(registry.structs("linux/vfio.h"))) == (34, 52)


@pytest.mark.parametrize("name", list(registry.structs()))
def test_ctypes_lays_out_the_newest_release(name: str) -> None:
    struct = registry.structs()[name]
    layout = layout_at(struct)
    assert (ctypes.sizeof(struct), ctypes.alignment(struct)) == (layout.size, layout.align)
    for member_name, member in layout.flat().items():
        descriptor = getattr(struct, member_name)
        assert (descriptor.offset, descriptor.size) == (member.offset, member.size), member_name


def test_a_table_is_not_equal_to_the_next_release() -> None:
    """The comparison can fail: it sees one field, one constant, one ioctl too many."""
    found = mismatches(history.table("6.12"), table_at("6.13"))
    assert "extra: IOMMU_VIOMMU_ALLOC" in found
    assert "extra: IOMMU_HWPT_ALLOC_PASID" in found
    assert "missing: VFIO_TYPE1_NESTING_IOMMU" in found


@pytest.mark.parametrize(
    ("ioctl", "release", "sizes"),
    [
        (iommufd.IOMMU_HWPT_ALLOC, "6.5", None),
        (iommufd.IOMMU_HWPT_ALLOC, "6.6", (24, 24)),
        (iommufd.IOMMU_HWPT_ALLOC, "6.7", (24, 40)),
        (iommufd.IOMMU_HWPT_ALLOC, "6.11", (24, 48)),
        (iommufd.IOMMU_GET_HW_INFO, "6.6", (32, 32)),
        (iommufd.IOMMU_GET_HW_INFO, "7.3", (32, 40)),
        (iommufd.IOMMU_VIOMMU_ALLOC, "6.16", (24, 24)),
        (vfio.VFIO_DEVICE_BIND_IOMMUFD, "6.6", (16, 16)),
        (vfio.VFIO_DEVICE_BIND_IOMMUFD, "6.17", (16, 24)),
        (vfio.VFIO_DEVICE_RESET, "6.17", (0, 0)),
    ],
)
def test_sizes_of_an_ioctl_follow_the_release(ioctl, release, sizes) -> None:
    assert sizes_at(ioctl, release) == sizes


def test_every_declaration_names_its_first_release_or_is_older_than_the_samples() -> None:
    for name, ioctl in registry.ioctls().items():
        assert ioctl.since
        assert ioctl.area, f"{name} has no area"
    assert all(struct.__doc__ and not struct.__doc__.startswith("Base of") for struct in registry.structs().values())


def test_a_constant_is_a_plain_int() -> None:
    constants = registry.constants(*registry.HEADERS, registry.TEST_HEADER)
    modules = [*registry.HEADERS.values()]
    for module in modules:
        for name in module.CONSTANTS:
            assert type(getattr(module, name)) is int, name
    assert all(type(constant.value) is int for constant in constants.values())


@pytest.mark.parametrize(
    ("name", "min_size"),
    [
        ("VFIO_GROUP_GET_STATUS", 8),
        ("VFIO_DEVICE_GET_INFO", 16),
        ("VFIO_DEVICE_GET_REGION_INFO", 32),
        ("VFIO_DEVICE_GET_IRQ_INFO", 16),
        ("VFIO_DEVICE_SET_IRQS", 20),
        ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", 12),
        ("VFIO_DEVICE_PCI_HOT_RESET", 12),
        ("VFIO_DEVICE_IOEVENTFD", 28),
        ("VFIO_DEVICE_FEATURE", 8),
        ("VFIO_DEVICE_BIND_IOMMUFD", 16),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 12),
        ("VFIO_DEVICE_DETACH_IOMMUFD_PT", 8),
        ("VFIO_IOMMU_GET_INFO", 16),
        ("VFIO_IOMMU_MAP_DMA", 32),
        ("VFIO_IOMMU_UNMAP_DMA", 24),
        ("VFIO_IOMMU_DIRTY_PAGES", 8),
        ("VFIO_MIG_GET_PRECOPY_INFO", 24),
        ("VFIO_IOMMU_SPAPR_TCE_GET_INFO", 16),
        ("VFIO_EEH_PE_OP", 12),
    ],
)
def test_vfio_insists_on_the_kernels_minsz(name: str, min_size: int) -> None:
    """The values of `minsz` in drivers/vfio of 7.3."""
    assert registry.ioctls()[name].min_size == min_size
