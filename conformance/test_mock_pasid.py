"""PASIDs of mock devices: attach, replace and detach, and which HWPTs they go with.

Mirrors iommufd_device_attach() and its kin with a PASID (drivers/iommu/iommufd/device.c), iommu_attach_device_pasid()
and its kin (drivers/iommu/iommu.c), and the mock driver's set_dev_pasid.
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.mock import APERTURE, check_map, command, mock_domain, mock_replace
from conformance.mock_guest import viommu_alloc
from conformance.pasids import (
    FAILING,
    PASIDS,
    attached,
    nest_parent,
    nested,
    pasid_attach,
    pasid_check,
    pasid_detach,
    pasid_device,
    pasid_hwpt,
    pasid_replace,
    ready,
)
from conformance.steps import PAGE, destroy, fails, hwpt_alloc, ioas_alloc, iova_ranges, map_user
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_PASID

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.15")]

#: Any PASID that nothing is special about.
P = 100


# -- what the operations are given ------------------------------------------------------------------------------------


def test_operations_on_what_is_no_mock_device_are_enoent(iommu: File) -> None:
    dev = pasid_device(iommu)
    for number in (0, dev.ioas, dev.idev, dev.auto, 99):
        with fails(errno.ENOENT):
            pasid_attach(iommu, number, P, dev.auto)
        with fails(errno.ENOENT):
            pasid_replace(iommu, number, P, dev.auto)
        with fails(errno.ENOENT):
            pasid_detach(iommu, number, P)
        with fails(errno.ENOENT):
            pasid_check(iommu, number, P)


@pytest.mark.parametrize("pt_id", [0, 99, 0xFFFF_FFFF])
def test_missing_page_table_is_enoent(iommu: File, pt_id: int) -> None:
    dev, (hwpt,) = ready(iommu)
    with fails(errno.ENOENT):
        pasid_attach(iommu, dev.stdev, P, pt_id)
    with attached(iommu, dev.stdev, [P], hwpt):
        with fails(errno.ENOENT):
            pasid_replace(iommu, dev.stdev, P, pt_id)
        pasid_check(iommu, dev.stdev, P, hwpt)


def test_object_that_is_no_page_table_is_einval(iommu: File) -> None:
    dev, (hwpt,) = ready(iommu)
    for number in (dev.stdev, dev.idev):
        with fails(errno.EINVAL):
            pasid_attach(iommu, dev.stdev, P, number)
    with attached(iommu, dev.stdev, [P], hwpt), fails(errno.EINVAL):
        pasid_replace(iommu, dev.stdev, P, dev.idev)


def test_detach_of_what_is_not_attached_succeeds(iommu: File) -> None:
    dev = pasid_device(iommu)
    pasid_detach(iommu, dev.stdev, 1, P, PASIDS, 0xFFFF_FFFF)


def test_check_tells_what_is_attached(iommu: File) -> None:
    dev, (hwpt, other) = ready(iommu, 2)
    pasid_check(iommu, dev.stdev, P)
    for number in (hwpt, other):
        with fails(errno.EINVAL):
            pasid_check(iommu, dev.stdev, P, number)
    with attached(iommu, dev.stdev, [P], hwpt):
        pasid_check(iommu, dev.stdev, P, hwpt)
        pasid_check(iommu, dev.stdev, P + 1)
        for number in (0, other):
            with fails(errno.EINVAL):
                pasid_check(iommu, dev.stdev, P, number)
    pasid_check(iommu, dev.stdev, P)


def test_check_against_a_missing_hwpt_is_enoent_and_against_another_object_einval(iommu: File) -> None:
    dev = pasid_device(iommu)
    with fails(errno.ENOENT):
        pasid_check(iommu, dev.stdev, P, 99)
    for number in (dev.ioas, dev.stdev, dev.idev):
        with fails(errno.EINVAL):
            pasid_check(iommu, dev.stdev, P, number)


def test_check_of_pasid_zero_is_of_the_devices_own_requests(iommu: File) -> None:
    dev = pasid_device(iommu)
    pasid_check(iommu, dev.stdev, 0, dev.auto)
    with fails(errno.EINVAL):
        pasid_check(iommu, dev.stdev, 0)


# -- attach -----------------------------------------------------------------------------------------------------------


def test_attach_answers_with_the_hwpt(iommu: File) -> None:
    dev, (hwpt,) = ready(iommu)
    assert pasid_attach(iommu, dev.stdev, P, hwpt) == hwpt
    pasid_detach(iommu, dev.stdev, P)


def test_attach_while_attached_is_ebusy_whatever_the_hwpt(iommu: File) -> None:
    dev, (hwpt, other) = ready(iommu, 2)
    with attached(iommu, dev.stdev, [P], hwpt):
        for number in (hwpt, other):
            with fails(errno.EBUSY):
                pasid_attach(iommu, dev.stdev, P, number)
        pasid_check(iommu, dev.stdev, P, hwpt)


def test_attach_while_attached_is_ebusy_before_the_hwpt_is_looked_at(iommu: File) -> None:
    dev, (hwpt,) = ready(iommu)
    plain = hwpt_alloc(iommu, dev.idev, dev.ioas)
    with attached(iommu, dev.stdev, [P], hwpt):
        for number in (plain, dev.ioas):
            with fails(errno.EBUSY):
                pasid_attach(iommu, dev.stdev, P, number)


def test_pasids_are_apart_and_each_holds_the_hwpt(iommu: File) -> None:
    dev, (own, hwpt) = ready(iommu, 2)
    with attached(iommu, dev.stdev, [1, 2, 3], hwpt):
        pasid_detach(iommu, dev.stdev, 2)
        for pasid, expected in ((1, hwpt), (2, 0), (3, hwpt)):
            pasid_check(iommu, dev.stdev, pasid, expected)
        with fails(errno.EBUSY):
            destroy(iommu, hwpt)
        pasid_detach(iommu, dev.stdev, 3)
        with fails(errno.EBUSY):
            destroy(iommu, hwpt)
    destroy(iommu, hwpt)
    with fails(errno.EBUSY):
        destroy(iommu, own)


def test_hwpt_must_be_for_pasids(iommu: File) -> None:
    dev, _ = ready(iommu)
    plain = hwpt_alloc(iommu, dev.idev, dev.ioas)
    for number in (plain, nest_parent(iommu, dev)):
        with fails(errno.EINVAL):
            pasid_attach(iommu, dev.stdev, P, number)
        pasid_check(iommu, dev.stdev, P)


def test_devices_own_hwpt_must_be_for_pasids_too(iommu: File) -> None:
    dev = pasid_device(iommu)
    hwpt = pasid_hwpt(iommu, dev)
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, P, hwpt)
    parent = nest_parent(iommu, dev)
    mock_replace(iommu, dev.stdev, parent)
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, P, hwpt)
    mock_replace(iommu, dev.stdev, hwpt)
    with attached(iommu, dev.stdev, [P], hwpt):
        pasid_check(iommu, dev.stdev, P, hwpt)


def test_ioas_for_a_pasid_is_einval_and_leaves_no_id(iommu: File) -> None:
    dev, _ = ready(iommu)
    free, next_id = ioas_alloc(iommu), ioas_alloc(iommu)
    destroy(iommu, next_id)
    for number in (dev.ioas, free):
        with fails(errno.EINVAL):
            pasid_attach(iommu, dev.stdev, P, number)
        pasid_check(iommu, dev.stdev, P)
    assert ioas_alloc(iommu) == next_id


def test_automatic_hwpt_by_its_id_is_not_for_pasids(iommu: File) -> None:
    dev, _ = ready(iommu)
    auto = mock_domain(iommu, dev.ioas).hwpt
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, P, auto)


@pytest.mark.parametrize("pasid", [1, PASIDS - 1])
def test_first_and_last_pasid_of_the_device(iommu: File, pasid: int) -> None:
    dev, (hwpt,) = ready(iommu)
    with attached(iommu, dev.stdev, [pasid], hwpt):
        pasid_check(iommu, dev.stdev, pasid, hwpt)


@pytest.mark.parametrize("pasid", [PASIDS, PASIDS + 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_pasid_beyond_the_devices_is_einval(iommu: File, pasid: int) -> None:
    dev, (hwpt,) = ready(iommu)
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, pasid, hwpt)
    pasid_check(iommu, dev.stdev, pasid)


@pytest.mark.parametrize("pasid", [1, FAILING, PASIDS, 0xFFFF_FFFF])
def test_mock_device_without_pasids_has_one_which_is_zero(iommu: File, pasid: int) -> None:
    dev = pasid_device(iommu, flags=0)
    hwpt = pasid_hwpt(iommu, dev)
    mock_replace(iommu, dev.stdev, hwpt)
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, pasid, hwpt)
    pasid_check(iommu, dev.stdev, pasid)


def test_device_without_pasids_follows_the_rules_of_hwpts(iommu: File) -> None:
    with_pasids = pasid_device(iommu)
    without = mock_domain(iommu, with_pasids.ioas)
    for_pasids = nested(iommu, with_pasids.idev, nest_parent(iommu, with_pasids))
    mock_replace(iommu, without.stdev, for_pasids)
    mock_replace(iommu, without.stdev, with_pasids.ioas)
    for number in (for_pasids, without.hwpt):
        with fails(errno.EINVAL):
            pasid_attach(iommu, without.stdev, P, number)


def test_hwpt_of_another_ioas(kernel: Backend, iommu: File) -> None:
    dev, _ = ready(iommu)
    other = ioas_alloc(iommu)
    hwpt = pasid_hwpt(iommu, dev, other)
    with kernel.buffer(PAGE) as buffer, attached(iommu, dev.stdev, [P], hwpt):
        map_user(iommu, other, buffer.address, PAGE, iova=APERTURE[0])
        check_map(iommu, hwpt, APERTURE[0], PAGE, buffer.address)
        with fails(errno.EBUSY):
            destroy(iommu, other)


def test_two_devices_share_a_hwpt_on_the_same_pasid(iommu: File) -> None:
    dev, (hwpt,) = ready(iommu)
    second = pasid_device(iommu, dev.ioas)
    mock_replace(iommu, second.stdev, hwpt)
    with attached(iommu, dev.stdev, [P], hwpt), attached(iommu, second.stdev, [P], hwpt):
        pasid_detach(iommu, dev.stdev, P)
        pasid_check(iommu, second.stdev, P, hwpt)


def test_device_that_tracks_no_dirty_pages_takes_a_tracked_hwpt_on_a_pasid_alone(iommu: File) -> None:
    tracker = pasid_device(iommu)
    hwpt = pasid_hwpt(iommu, tracker, flags=IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    dev = pasid_device(iommu, tracker.ioas, abi.MOCK_FLAGS_DEVICE_PASID | abi.MOCK_FLAGS_DEVICE_NO_DIRTY)
    mock_replace(iommu, dev.stdev, pasid_hwpt(iommu, tracker))
    with fails(errno.EINVAL):
        mock_replace(iommu, dev.stdev, hwpt)
    with attached(iommu, dev.stdev, [P], hwpt):
        pasid_check(iommu, dev.stdev, P, hwpt)


# -- nested -----------------------------------------------------------------------------------------------------------


def test_nested_hwpt_on_a_pasid_holds_itself_and_its_parent(iommu: File) -> None:
    dev, _ = ready(iommu)
    parent = nest_parent(iommu, dev)
    child = nested(iommu, dev.idev, parent)
    with attached(iommu, dev.stdev, [P], child):
        pasid_check(iommu, dev.stdev, P, child)
        for number in (child, parent):
            with fails(errno.EBUSY):
                destroy(iommu, number)
    destroy(iommu, child)
    destroy(iommu, parent)


def test_nested_hwpt_must_be_for_pasids_itself(iommu: File) -> None:
    dev, _ = ready(iommu)
    parent = nest_parent(iommu, dev, IOMMU_HWPT_ALLOC_PASID)
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, P, nested(iommu, dev.idev, parent, flags=0))
    with attached(iommu, dev.stdev, [P], parent):
        pasid_check(iommu, dev.stdev, P, parent)


def test_nested_hwpt_of_a_viommu_needs_a_vdevice_for_own_requests_but_not_for_a_pasid(iommu: File) -> None:
    dev, _ = ready(iommu)
    child = nested(iommu, dev.idev, viommu_alloc(iommu, dev.idev, nest_parent(iommu, dev)))
    with fails(errno.ENOENT):
        mock_replace(iommu, dev.stdev, child)
    with attached(iommu, dev.stdev, [P], child):
        pasid_check(iommu, dev.stdev, P, child)


# -- the device's own requests beside PASIDs --------------------------------------------------------------------------


def test_own_requests_cannot_leave_for_a_hwpt_without_pasids_while_one_is_attached(iommu: File) -> None:
    dev, (own, other) = ready(iommu, 2)
    plain = hwpt_alloc(iommu, dev.idev, dev.ioas)
    with attached(iommu, dev.stdev, [P], own):
        for number in (plain, dev.ioas):
            with fails(errno.EINVAL):
                mock_replace(iommu, dev.stdev, number)
            pasid_check(iommu, dev.stdev, 0, own)
        mock_replace(iommu, dev.stdev, other)
        pasid_check(iommu, dev.stdev, P, own)
    mock_replace(iommu, dev.stdev, plain)


def test_refused_replace_by_an_ioas_leaves_no_hwpt(iommu: File) -> None:
    dev, (own,) = ready(iommu)
    other = ioas_alloc(iommu)
    with attached(iommu, dev.stdev, [P], own):
        with fails(errno.EINVAL):
            mock_replace(iommu, dev.stdev, other)
        assert len(iova_ranges(iommu, other)) == 1
        destroy(iommu, other)


def test_pasid_zero_is_the_devices_own_requests(iommu: File) -> None:
    dev = pasid_device(iommu)
    with fails(errno.EBUSY):
        pasid_attach(iommu, dev.stdev, 0, dev.auto)
    hwpt = pasid_hwpt(iommu, dev)
    assert pasid_replace(iommu, dev.stdev, 0, hwpt) == hwpt
    with fails(errno.ENOENT):
        destroy(iommu, dev.auto)
    pasid_detach(iommu, dev.stdev, 0)
    destroy(iommu, hwpt)
    assert pasid_attach(iommu, dev.stdev, 0, dev.ioas) == dev.auto
    destroy(iommu, dev.stdev)


def test_pasid_is_attached_without_the_devices_own_requests(iommu: File) -> None:
    dev = pasid_device(iommu)
    hwpt = pasid_hwpt(iommu, dev)
    pasid_detach(iommu, dev.stdev, 0)
    with attached(iommu, dev.stdev, [P], hwpt):
        for number in (dev.ioas, hwpt_alloc(iommu, dev.idev, dev.ioas)):
            with fails(errno.EINVAL):
                pasid_attach(iommu, dev.stdev, 0, number)
        assert pasid_attach(iommu, dev.stdev, 0, hwpt) == hwpt
    destroy(iommu, dev.stdev)
    destroy(iommu, hwpt)


# -- replace ----------------------------------------------------------------------------------------------------------


def test_replace_of_what_is_not_attached_is_einval(iommu: File) -> None:
    dev, (hwpt,) = ready(iommu)
    for pasid in (P, PASIDS):
        with fails(errno.EINVAL):
            pasid_replace(iommu, dev.stdev, pasid, hwpt)
        pasid_check(iommu, dev.stdev, pasid)


def test_replace_by_the_same_changes_nothing(iommu: File) -> None:
    dev, (hwpt,) = ready(iommu)
    with attached(iommu, dev.stdev, [P], hwpt):
        assert pasid_replace(iommu, dev.stdev, P, hwpt) == hwpt
        pasid_check(iommu, dev.stdev, P, hwpt)


def test_replace_rotates_over_all_kinds(iommu: File) -> None:
    dev, (own, first, second) = ready(iommu, 3)
    parent = nest_parent(iommu, dev)
    rotation = [first, nested(iommu, dev.idev, parent), nested(iommu, dev.idev, parent), second, own]
    with attached(iommu, dev.stdev, [P], own):
        before = own
        for number in rotation:
            assert pasid_replace(iommu, dev.stdev, P, number) == number
            pasid_check(iommu, dev.stdev, P, number)
            with fails(errno.EBUSY):
                destroy(iommu, number)
            if before != own:
                destroy(iommu, before)
            before = number
    destroy(iommu, parent)


def test_refused_replace_keeps_the_old(iommu: File) -> None:
    dev, (_, hwpt) = ready(iommu, 2)
    plain = hwpt_alloc(iommu, dev.idev, dev.ioas)
    free = ioas_alloc(iommu)
    with attached(iommu, dev.stdev, [P], hwpt):
        for number in (plain, dev.ioas, free):
            with fails(errno.EINVAL):
                pasid_replace(iommu, dev.stdev, P, number)
            pasid_check(iommu, dev.stdev, P, hwpt)
            with fails(errno.EBUSY):
                destroy(iommu, hwpt)
        destroy(iommu, plain)
    assert ioas_alloc(iommu) == plain


def test_replace_of_one_pasid_leaves_the_others(iommu: File) -> None:
    dev, (own, hwpt) = ready(iommu, 2)
    with attached(iommu, dev.stdev, [1, 2], own):
        pasid_replace(iommu, dev.stdev, 1, hwpt)
        for pasid, expected in ((0, own), (1, hwpt), (2, own)):
            pasid_check(iommu, dev.stdev, pasid, expected)


# -- a driver that fails ----------------------------------------------------------------------------------------------


def test_pasid_1024_fails_its_second_call_and_keeps_the_old(iommu: File) -> None:
    dev, (hwpt, other) = ready(iommu, 2)
    with attached(iommu, dev.stdev, [FAILING], hwpt):
        with fails(errno.ENOMEM):
            pasid_replace(iommu, dev.stdev, FAILING, other)
        pasid_check(iommu, dev.stdev, FAILING, hwpt)
        destroy(iommu, other)


def test_pasid_1024_fails_every_second_call(iommu: File) -> None:
    dev, (hwpt, other) = ready(iommu, 2)
    with attached(iommu, dev.stdev, [FAILING], hwpt):
        with fails(errno.ENOMEM):
            pasid_replace(iommu, dev.stdev, FAILING, other)
        pasid_replace(iommu, dev.stdev, FAILING, other)
        with fails(errno.ENOMEM):
            pasid_replace(iommu, dev.stdev, FAILING, hwpt)
        pasid_check(iommu, dev.stdev, FAILING, other)


def test_detach_of_pasid_1024_starts_anew(iommu: File) -> None:
    dev, (hwpt, other) = ready(iommu, 2)
    for _ in range(2):
        pasid_attach(iommu, dev.stdev, FAILING, hwpt)
        pasid_detach(iommu, dev.stdev, FAILING)
    with attached(iommu, dev.stdev, [FAILING], hwpt):
        pasid_replace(iommu, dev.stdev, FAILING, hwpt)
        with fails(errno.ENOMEM):
            pasid_replace(iommu, dev.stdev, FAILING, other)


def test_pasid_1024_is_counted_for_each_device(iommu: File) -> None:
    dev, (hwpt, other) = ready(iommu, 2)
    second = pasid_device(iommu, dev.ioas)
    mock_replace(iommu, second.stdev, hwpt)
    with attached(iommu, dev.stdev, [FAILING], hwpt), attached(iommu, second.stdev, [FAILING], hwpt):
        with fails(errno.ENOMEM):
            pasid_replace(iommu, dev.stdev, FAILING, other)
        with fails(errno.ENOMEM):
            pasid_replace(iommu, second.stdev, FAILING, other)


# -- replies that cannot be written -----------------------------------------------------------------------------------


def blocked(iommu: File, op: int, stdev: int, member: str, **fields: int) -> None:
    """The operation, from a block that cannot be written."""
    with arena(1) as memory:
        Arena.write(memory.page(0), command(op, stdev, member, **fields))
        memory.read_only(0)
        iommu.ioctl(abi.IOMMU_TEST_CMD.number, memory.page(0))


def test_reply_of_an_attach_that_cannot_be_written_detaches(iommu: File) -> None:
    dev, (_, hwpt) = ready(iommu, 2)
    with fails(errno.EFAULT):
        blocked(iommu, abi.IOMMU_TEST_OP_PASID_ATTACH, dev.stdev, "pasid_attach", pasid=P, pt_id=hwpt)
    pasid_check(iommu, dev.stdev, P)
    destroy(iommu, hwpt)


def test_reply_of_a_replace_that_cannot_be_written_keeps_the_effect(iommu: File) -> None:
    dev, (own, hwpt) = ready(iommu, 2)
    with attached(iommu, dev.stdev, [P], own):
        with fails(errno.EFAULT):
            blocked(iommu, abi.IOMMU_TEST_OP_PASID_REPLACE, dev.stdev, "pasid_replace", pasid=P, pt_id=hwpt)
        pasid_check(iommu, dev.stdev, P, hwpt)


def test_detach_and_check_write_no_reply(iommu: File) -> None:
    dev, (own,) = ready(iommu)
    with attached(iommu, dev.stdev, [P], own):
        check = abi.IOMMU_TEST_OP_PASID_CHECK_HWPT
        blocked(iommu, check, dev.stdev, "pasid_check", pasid=P, hwpt_id=own)
        blocked(iommu, abi.IOMMU_TEST_OP_PASID_DETACH, dev.stdev, "pasid_detach", pasid=P)
        blocked(iommu, check, dev.stdev, "pasid_check", pasid=P, hwpt_id=0)
