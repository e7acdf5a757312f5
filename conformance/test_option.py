"""IOMMU_OPTION: RLIMIT_MODE of a context, HUGE_PAGES of an IOAS without a domain.

Mirrors iommufd_option(), iommufd_option_rlimit_mode() and iommufd_ioas_option(). What the modes charge is in
test_pin_accounting.py; HUGE_PAGES beside a domain, in test_ioas_reserved.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    U64_MAX,
    copy,
    destroy,
    fails,
    ioas_alloc,
    iova_alignment,
    map_user,
    option_get,
    option_set,
    unmap_all,
)
from uapi.backend import Backend, File, RemoteFile
from uapi.iommufd import (
    IOMMU_OPTION,
    IOMMU_OPTION_HUGE_PAGES,
    IOMMU_OPTION_OP_GET,
    IOMMU_OPTION_OP_SET,
    IOMMU_OPTION_RLIMIT_MODE,
)

HUGE, RLIMIT = IOMMU_OPTION_HUGE_PAGES, IOMMU_OPTION_RLIMIT_MODE
GET, SET = IOMMU_OPTION_OP_GET, IOMMU_OPTION_OP_SET
CAP_SYS_RESOURCE = 24


@pytest.fixture
def weak(kernel: Backend, iommu: File) -> Iterator[RemoteFile]:
    """The same context in a client without CAP_SYS_RESOURCE."""
    with kernel.spawn() as client:
        client.drop_capabilities(CAP_SYS_RESOURCE)
        yield client.receive(iommu)


@pytest.mark.parametrize("option_id", [2, 3, 0x100, U32_MAX])
@pytest.mark.parametrize("op", [SET, GET], ids=["set", "get"])
def test_unknown_option_is_eopnotsupp(iommu: File, option_id: int, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_OPTION(iommu, option_id=option_id, op=op)


@pytest.mark.parametrize("option_id", [RLIMIT, HUGE], ids=["rlimit", "huge"])
def test_reserved_field_is_eopnotsupp(iommu: File, option_id: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_OPTION(iommu, option_id=option_id, op=GET, __reserved=1)


# ------------------------------------------------------------------------------------------------------- RLIMIT_MODE


def test_rlimit_mode_starts_as_user(iommu: File) -> None:
    assert option_get(iommu, RLIMIT) == 0


@pytest.mark.needs("root")
def test_rlimit_mode_can_be_switched_and_back(iommu: File) -> None:
    seen = []
    for value in (1, 1, 0, 1):
        option_set(iommu, RLIMIT, value)
        seen.append(option_get(iommu, RLIMIT))
    assert seen == [1, 1, 0, 1]


@pytest.mark.needs("root")
@pytest.mark.parametrize("value", [2, 3, 1 << 32, U64_MAX])
def test_rlimit_mode_of_another_value_is_einval(iommu: File, value: int) -> None:
    with fails(errno.EINVAL):
        option_set(iommu, RLIMIT, value)
    assert option_get(iommu, RLIMIT) == 0


@pytest.mark.parametrize("object_id", [1, U32_MAX])
@pytest.mark.parametrize("op", [SET, GET, 2], ids=["set", "get", "other"])
def test_rlimit_mode_takes_no_object(iommu: File, object_id: int, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_OPTION(iommu, option_id=RLIMIT, op=op, object_id=object_id)


@pytest.mark.parametrize("op", [2, 3, 0xFFFF])
def test_rlimit_mode_with_another_op_is_eopnotsupp(iommu: File, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_OPTION(iommu, option_id=RLIMIT, op=op)


@pytest.mark.needs("root")
@pytest.mark.parametrize("value", [0, 1, 2])
def test_rlimit_mode_cannot_change_once_an_object_exists(iommu: File, value: int) -> None:
    """Not even to what it is, and before the value is looked at."""
    ioas_alloc(iommu)
    with fails(errno.EBUSY):
        option_set(iommu, RLIMIT, value)


@pytest.mark.needs("root")
def test_rlimit_mode_can_change_when_the_objects_are_gone(iommu: File) -> None:
    destroy(iommu, ioas_alloc(iommu))
    option_set(iommu, RLIMIT, 1)
    assert option_get(iommu, RLIMIT) == 1


@pytest.mark.needs("root")
def test_rlimit_mode_can_be_read_while_objects_exist(iommu: File) -> None:
    option_set(iommu, RLIMIT, 1)
    ioas_alloc(iommu)
    assert option_get(iommu, RLIMIT) == 1


@pytest.mark.needs("root")
def test_rlimit_mode_is_the_contexts_own(kernel: Backend, iommu: File) -> None:
    option_set(iommu, RLIMIT, 1)
    with kernel.open("/dev/iommu") as other:
        assert option_get(other, RLIMIT) == 0


@pytest.mark.parametrize("value", [0, 1, 2])
def test_rlimit_mode_without_cap_sys_resource_is_eperm(weak: RemoteFile, value: int) -> None:
    with fails(errno.EPERM):
        option_set(weak, RLIMIT, value)


def test_rlimit_mode_eperm_comes_before_ebusy(iommu: File, weak: RemoteFile) -> None:
    ioas_alloc(iommu)
    with fails(errno.EPERM):
        option_set(weak, RLIMIT, 1)


def test_rlimit_mode_object_comes_before_eperm(weak: RemoteFile) -> None:
    with fails(errno.EOPNOTSUPP):
        option_set(weak, RLIMIT, 1, object_id=1)


def test_rlimit_mode_may_be_read_by_anyone(weak: RemoteFile) -> None:
    assert option_get(weak, RLIMIT) == 0


@pytest.mark.needs("root")
def test_rlimit_mode_is_what_counts_at_the_call_not_at_the_open(kernel: Backend, iommu: File) -> None:
    """A context that a weak client opened is switched by a strong one."""
    with kernel.spawn() as client:
        remote = client.open("/dev/iommu")
        option_set(remote, RLIMIT, 1)
        client.drop_capabilities(CAP_SYS_RESOURCE)
        with fails(errno.EPERM):
            option_set(remote, RLIMIT, 0)
        assert option_get(remote, RLIMIT) == 1


# -------------------------------------------------------------------------------------------------------- HUGE_PAGES


def test_huge_pages_switch_off_and_on(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    seen = []
    for value in (0, 0, 1, 1, 0):
        option_set(iommu, HUGE, value, ioas)
        seen.append((option_get(iommu, HUGE, ioas), iova_alignment(iommu, ioas)))
    assert seen == [(0, PAGE), (0, PAGE), (1, 1), (1, 1), (0, PAGE)]


@pytest.mark.parametrize("value", [2, 1 << 32, U64_MAX])
def test_huge_pages_of_another_value_is_einval(iommu: File, value: int) -> None:
    ioas = ioas_alloc(iommu)
    with fails(errno.EINVAL):
        option_set(iommu, HUGE, value, ioas)


@pytest.mark.parametrize("object_id", [0, 2, U32_MAX])
@pytest.mark.parametrize("op", [SET, GET, 2], ids=["set", "get", "other"])
def test_huge_pages_of_an_unknown_ioas_is_enoent(iommu: File, object_id: int, op: int) -> None:
    ioas_alloc(iommu)
    with fails(errno.ENOENT):
        IOMMU_OPTION(iommu, option_id=HUGE, op=op, object_id=object_id)


@pytest.mark.parametrize("op", [2, 0xFFFF])
def test_huge_pages_with_another_op_is_eopnotsupp(iommu: File, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_OPTION(iommu, option_id=HUGE, op=op, object_id=ioas_alloc(iommu))


def test_huge_pages_are_each_ioases_own(iommu: File) -> None:
    first, second = ioas_alloc(iommu), ioas_alloc(iommu)
    option_set(iommu, HUGE, 0, first)
    assert option_get(iommu, HUGE, second) == 1


def test_huge_pages_need_no_capability(iommu: File, weak: RemoteFile) -> None:
    ioas = ioas_alloc(iommu)
    option_set(weak, HUGE, 0, ioas)
    assert option_get(iommu, HUGE, ioas) == 0


@pytest.mark.parametrize(
    ("va", "length", "iova"),
    [(NOWHERE, PAGE, 0x10001), (NOWHERE, PAGE + 1, 0x10000), (NOWHERE + 0x800, PAGE, 0x10000)],
    ids=["iova", "length", "page_offset"],
)
def test_huge_pages_off_over_a_misfit_area_is_eaddrinuse(iommu: File, va: int, length: int, iova: int) -> None:
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0)
    map_user(iommu, ioas, va, length, iova=iova)
    with fails(errno.EADDRINUSE):
        option_set(iommu, HUGE, 0, ioas)
    assert (option_get(iommu, HUGE, ioas), iova_alignment(iommu, ioas)) == (1, 1)
    unmap_all(iommu, ioas)
    option_set(iommu, HUGE, 0, ioas)


def test_huge_pages_off_over_a_misfit_piece_of_a_copy_is_eaddrinuse(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, 2 * PAGE, iova=0)
    copy(iommu, ioas, ioas, 0x800, PAGE, dst_iova=0x10000)
    with fails(errno.EADDRINUSE):
        option_set(iommu, HUGE, 0, ioas)


def test_huge_pages_off_is_fine_over_aligned_areas(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, 2 * PAGE, iova=0x10000)
    option_set(iommu, HUGE, 0, ioas)
    assert iova_alignment(iommu, ioas) == PAGE


def test_huge_pages_off_binds_later_maps_to_pages(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    option_set(iommu, HUGE, 0, ioas)
    for va, length, iova in ((NOWHERE, PAGE, 1), (NOWHERE, 1, 0), (NOWHERE + 1, PAGE, 0)):
        with fails(errno.EINVAL):
            map_user(iommu, ioas, va, length, iova=iova)
    option_set(iommu, HUGE, 1, ioas)
    assert map_user(iommu, ioas, NOWHERE + 1, 1, iova=1) == 1


# ------------------------------------------------------------------------------------------------------------- reply


@pytest.mark.parametrize(("before", "after"), [(7, 0), (7, 1), (U64_MAX, 0), (U64_MAX, 1)])
def test_get_overwrites_the_value_alone(iommu: File, before: int, after: int) -> None:
    ioas = ioas_alloc(iommu)
    option_set(iommu, HUGE, after, ioas)
    reply = IOMMU_OPTION(iommu, option_id=HUGE, op=GET, object_id=ioas, val64=before)
    assert (reply.size, reply.option_id, reply.op, reply.object_id, reply.val64) == (24, HUGE, GET, ioas, after)


@pytest.mark.parametrize("op", [SET, GET], ids=["set", "get"])
def test_reply_fault_is_efault_and_a_set_stays(iommu: File, op: int) -> None:
    """SET writes its value back too."""
    ioas = ioas_alloc(iommu)
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_OPTION.make(option_id=HUGE, op=op, object_id=ioas, val64=0))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_OPTION.number, memory.page(0))
    assert option_get(iommu, HUGE, ioas) == (0 if op == SET else 1)


def test_only_the_value_is_written_back(iommu: File) -> None:
    """The block's head may lie in read-only memory if the value itself can be written."""
    ioas = ioas_alloc(iommu)
    with arena(2) as memory:
        address = memory.page(1) - 16
        Arena.write(address, IOMMU_OPTION.make(option_id=HUGE, op=GET, object_id=ioas))
        memory.read_only(0)
        iommu.ioctl(IOMMU_OPTION.number, address)
        assert memory.read(memory.page(1), 8) == (1).to_bytes(8, "little")
