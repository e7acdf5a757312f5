"""IOMMU_IOAS_ALLOC: what a fresh IOAS is.

Mirrors iommufd_ioas_alloc_ioctl() and iopt_init_table(). Ids are in test_objects.py.
"""

from __future__ import annotations

import errno

import pytest

from conformance.steps import (
    NOWHERE,
    PAGE,
    U64_MAX,
    destroy,
    fails,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_user,
    option_get,
    unmap_all,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_IOAS_ALLOC, IOMMU_OPTION_HUGE_PAGES


@pytest.mark.parametrize("flags", [1, 2, 0x8000_0000, 0xFFFF_FFFF])
def test_any_flag_is_eopnotsupp(iommu: File, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_ALLOC(iommu, flags=flags)


def test_value_in_the_output_field_is_ignored(iommu: File) -> None:
    assert IOMMU_IOAS_ALLOC(iommu, out_ioas_id=77).out_ioas_id == 1


def test_reply_keeps_size_and_flags(iommu: File) -> None:
    reply = IOMMU_IOAS_ALLOC(iommu)
    assert (reply.size, reply.flags) == (12, 0)


def test_fresh_ioas_offers_the_whole_64_bit_space(iommu: File) -> None:
    assert iova_ranges(iommu, ioas_alloc(iommu)) == [(0, U64_MAX)]


def test_fresh_ioas_has_byte_alignment(iommu: File) -> None:
    assert iova_alignment(iommu, ioas_alloc(iommu)) == 1


def test_fresh_ioas_allows_huge_pages(iommu: File) -> None:
    assert option_get(iommu, IOMMU_OPTION_HUGE_PAGES, ioas_alloc(iommu)) == 1


def test_fresh_ioas_is_empty(iommu: File) -> None:
    assert unmap_all(iommu, ioas_alloc(iommu)) == 0


def test_ioases_do_not_share_their_space(iommu: File) -> None:
    first, second = ioas_alloc(iommu), ioas_alloc(iommu)
    map_user(iommu, first, NOWHERE, PAGE, iova=PAGE)
    map_user(iommu, second, NOWHERE, PAGE, iova=PAGE)
    assert unmap_all(iommu, first) == PAGE
    with fails(errno.EEXIST):
        map_user(iommu, second, NOWHERE, PAGE, iova=PAGE)
    destroy(iommu, first)
    assert unmap_all(iommu, second) == PAGE
