"""Fault injection of the model: `kernel.fail_nth`, tasks, what counts, and the sweep that the suite makes with it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.fail_nth import FailNth
from conformance.mock import (
    access_pages,
    access_rw,
    create_access,
    memory_limit,
    mock_domain,
    mock_domain_flags,
    mock_replace,
)
from conformance.steps import PAGE, destroy, fails, ioas_alloc, map_user, unmap
from kernel_model.errors import KernelError
from kernel_model.fault_injection import EVERYTHING, MEMORY, injecting, kmalloc
from kernel_model.fault_injection_files import parse_integer
from kernel_model.iommufd.io_pagetable import IoPagetable
from kernel_model.kernel import Kernel
from uapi import iommufd_test as abi
from uapi.backend import File
from uapi.iommufd import IOMMU_HWPT_ALLOC, IOMMU_IOAS_ALLOC, IOMMU_IOAS_COPY, IOMMU_IOAS_MAP


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with Kernel("mock") as kernel:
        yield kernel


@pytest.fixture
def iommu(kernel: Kernel) -> Iterator[File]:
    with kernel.open("/dev/iommu") as file:
        yield file


def sites(kernel: Kernel, call: Callable[[], Any], kinds: tuple[str, ...] = MEMORY) -> list[str]:
    """Where the call can fail, in order. Each time the kernel must hold what it held before."""
    found: list[str] = []
    before = kernel.digest()
    for nth in range(1, 10_000):
        with kernel.fail_nth(nth, kinds) as injection:
            try:
                call()
            except OSError:
                assert injection.injected
        if not injection.injected:
            return found
        found.append(injection.site)
        assert kernel.difference(before, kernel.digest()) == []
    raise AssertionError("no end")


def awaited(kernel: Kernel) -> bool:
    return kernel.failing is not None


# ---------------------------------------------------------------------------------------------------------- fail_nth()


def test_nth_allocation_fails_and_says_what_it_was(kernel: Kernel, iommu: File) -> None:
    with kernel.fail_nth(1) as injection, fails(errno.ENOMEM):
        ioas_alloc(iommu)
    assert injection.injected
    assert (injection.remaining, injection.site) == (0, "Ioas")
    assert ioas_alloc(iommu) == 1


def test_what_does_not_happen_says_what_is_left(kernel: Kernel, iommu: File) -> None:
    with kernel.fail_nth(10) as injection:
        ioas_alloc(iommu)
        ioas_alloc(iommu)
    assert (injection.injected, injection.remaining, injection.site) == (False, 8, "")


def test_only_one_fails(kernel: Kernel, iommu: File) -> None:
    with kernel.fail_nth(2):
        assert ioas_alloc(iommu) == 1
        with fails(errno.ENOMEM):
            ioas_alloc(iommu)
        assert ioas_alloc(iommu) == 2


def test_after_the_block_nothing_is_looked_at(kernel: Kernel, iommu: File) -> None:
    with kernel.fail_nth(100):
        ioas_alloc(iommu)
        assert awaited(kernel)
    assert not awaited(kernel)
    assert not injecting
    assert kernel.faults.get_nth(threading.get_native_id()) == 0


def test_failures_are_counted_by_place(kernel: Kernel, iommu: File) -> None:
    for _ in range(3):
        with kernel.fail_nth(1), fails(errno.ENOMEM):
            ioas_alloc(iommu)
    assert kernel.faults.injected == {"Ioas": 3}


def test_first_is_number_one(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="number 1"):
        kernel.fail_nth(0)


def test_kinds_choose_what_counts(kernel: Kernel, iommu: File) -> None:
    assert sites(kernel, lambda: ioas_alloc(iommu), EVERYTHING) == ["copy_from_user()", "Ioas", "copy_to_user()"]
    assert sites(kernel, lambda: ioas_alloc(iommu), ("fail_usercopy",)) == ["copy_from_user()", "copy_to_user()"]


def test_spared_places_do_not_count(kernel: Kernel, iommu: File) -> None:
    with kernel.fail_nth(1, EVERYTHING, spare=("copy_from_user()", "Ioas")) as injection, fails(errno.EFAULT):
        ioas_alloc(iommu)
    assert injection.site == "copy_to_user()"


def test_two_kernels_do_not_mix(kernel: Kernel, iommu: File) -> None:
    with Kernel("mock") as other, other.open("/dev/iommu") as theirs, kernel.fail_nth(1) as injection:
        assert ioas_alloc(theirs) == 1
        assert not injection.injected
        with fails(errno.ENOMEM):
            ioas_alloc(iommu)


def test_open_can_fail_and_opens_nothing(kernel: Kernel) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert sites(kernel, lambda: kernel.open("/dev/iommu").close()) == ["struct iommufd_ctx", "struct file"]
    assert len(os.listdir("/proc/self/fd")) == before
    assert not kernel.contexts


# -------------------------------------------------------------------------------------------------------------- tasks


def test_thread_has_its_own(kernel: Kernel, iommu: File) -> None:
    made: list[int] = []
    with kernel.fail_nth(1) as injection:
        thread = threading.Thread(target=lambda: made.append(ioas_alloc(iommu)))
        thread.start()
        thread.join()
        assert made == [1]
        assert not injection.injected
        with fails(errno.ENOMEM):
            ioas_alloc(iommu)


def test_second_client_has_its_own(kernel: Kernel, iommu: File) -> None:
    with kernel.spawn() as client:
        theirs = client.receive(iommu)
        with kernel.fail_nth(1) as injection:
            theirs.ioctl(IOMMU_IOAS_ALLOC.number, IOMMU_IOAS_ALLOC.make())
            assert not injection.injected
        with kernel.open(f"/proc/{client.pid}/task/{client.pid}/fail-nth") as file:
            file.write(b"1")
            assert ioas_alloc(iommu) == 2
            with fails(errno.EFAULT):
                theirs.ioctl(IOMMU_IOAS_ALLOC.number, IOMMU_IOAS_ALLOC.make())
            assert file.pread(8, 0) == b"0\n"
            file.write(b"50")
        assert awaited(kernel)
    assert not awaited(kernel), "an exited task awaits nothing"


def test_file_of_a_task_that_has_gone_is_esrch(kernel: Kernel) -> None:
    with kernel.spawn() as client:
        file = kernel.open(f"/proc/{client.pid}/fail-nth")
    with file, fails(errno.ESRCH):
        file.read(8)
    with fails(errno.ENOENT):
        kernel.open(f"/proc/{client.pid}/fail-nth")


def test_other_user_may_read_and_not_write(kernel: Kernel) -> None:
    with kernel.spawn() as client:
        client.setuid(1000)
        client.open(f"/proc/{os.getpid()}/fail-nth", os.O_RDONLY).close()
        client.open(f"/proc/{client.pid}/fail-nth", os.O_RDWR).close()
        with fails(errno.EACCES):
            client.open(f"/proc/{os.getpid()}/fail-nth", os.O_RDWR)


def test_deferred_work_is_nobodys(kernel: Kernel) -> None:
    seen: list[bool] = []
    with kernel.fail_nth(1), kernel.entered():
        kernel.defer(lambda: seen.append(bool(injecting)))
        assert injecting
    assert seen == [False]


# ----------------------------------------------------------------------------------------------------- where, by call


def test_places_of_a_map_follow_the_memory_limit(kernel: Kernel, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    mock_domain(iommu, ioas)
    buffer = kernel.buffer(16 * PAGE)

    def call() -> None:
        map_user(iommu, ioas, buffer.address, 16 * PAGE, iova=1 << 24)

    memory_limit(iommu, 32)  # four pages at once
    found = sites(kernel, call)
    assert found.count("pin_user_pages()") == 4
    assert found == [
        "iommufd_get_object()",
        "struct iopt_pages",
        "struct iopt_area",
        "a batch of pages",
        "a list of pages",
        *["pin_user_pages()"] * 4,
        "a charge",
        "a table",
    ]
    unmap(iommu, ioas, 1 << 24, 16 * PAGE)
    memory_limit(iommu, 65536)
    assert sites(kernel, call).count("pin_user_pages()") == 1


def test_copy_of_several_areas_can_fail_at_each(kernel: Kernel, iommu: File) -> None:
    source, target = ioas_alloc(iommu), ioas_alloc(iommu)
    mock_domain(iommu, target)
    buffer = kernel.buffer(4 * PAGE)
    for index in range(4):
        map_user(iommu, source, buffer.address + index * PAGE, PAGE, iova=(1 << 24) + index * PAGE)
    fields = {"flags": 7, "src_ioas_id": source, "dst_ioas_id": target, "src_iova": 1 << 24, "dst_iova": 1 << 25}
    found = sites(kernel, lambda: IOMMU_IOAS_COPY(iommu, length=4 * PAGE, **fields))
    assert [found.count(what) for what in ("struct iopt_pages_list", "struct iopt_area", "a charge", "a table")] == [
        4
    ] * 4


def test_second_domain_can_fail_at_each_area(kernel: Kernel, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    buffer = kernel.buffer(8 * PAGE)
    for index in range(8):
        map_user(iommu, ioas, buffer.address + index * PAGE, PAGE, iova=(1 << 24) + index * 2 * PAGE)
    found = sites(kernel, lambda: IOMMU_HWPT_ALLOC(iommu, dev_id=device.idev, pt_id=ioas))
    assert found.count("a table") == 8
    assert "a charge" not in found, "what is pinned is not pinned again"


def test_access_can_fail_and_leaves_no_descriptor(kernel: Kernel, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    before = set(os.listdir("/proc/self/fd"))
    found = sites(kernel, lambda: os.close(create_access(iommu, ioas)))
    assert found == ["struct selftest_access", "struct file", "Access", "iommufd_get_object()"]
    kernel.digest()  # any call notices what was closed
    assert set(os.listdir("/proc/self/fd")) == before


def test_pins_of_an_access_can_fail(kernel: Kernel, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    buffer = kernel.buffer(4 * PAGE)
    map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=1 << 24)
    access = create_access(iommu, ioas)
    found = sites(kernel, lambda: access_pages(iommu, access, 1 << 24, 4 * PAGE, buffer.address))
    assert found == [
        "an array of pages",
        "struct iopt_pages_access",
        "pin_user_pages()",
        "pages_to_xarray()",
        "a charge",
        "struct selftest_access_item",
    ]
    slow = abi.MOCK_ACCESS_RW_SLOW_PATH
    assert sites(kernel, lambda: access_rw(iommu, access, 1 << 24, 8, buffer.address, slow)) == [
        "a copy of the data",
        "iopt_pages_rw_page()",
    ]
    os.close(access)


def test_reserved_regions_that_fail_make_another_hwpt(kernel: Kernel, iommu: File) -> None:
    """EINVAL there looks like an unsuitable HWPT, as on the real kernel: the attachment makes one of its own."""
    ioas = ioas_alloc(iommu)
    first = mock_domain(iommu, ioas)
    for nth in range(1, 40):
        with kernel.fail_nth(nth) as injection:
            try:
                second = mock_domain(iommu, ioas)
            except OSError:
                continue
        break
    assert injection.site == "iopt_table_enforce_dev_resv_regions()"
    assert second.hwpt != first.hwpt


def test_replace_that_fails_changes_nothing(kernel: Kernel, iommu: File) -> None:
    ioas, other = ioas_alloc(iommu), ioas_alloc(iommu)
    device = mock_domain_flags(iommu, ioas, abi.MOCK_FLAGS_DEVICE_PASID)
    found = sites(kernel, lambda: mock_replace(iommu, device.stdev, other))
    assert {"HwptPaging", "struct mock_iommu_domain", "struct iommufd_attach_handle"} <= set(found)
    destroy(iommu, device.stdev)


# ------------------------------------------------------------------------------------------------------------ debugfs


def test_min_order_of_pages_counts_only_for_the_files(kernel: Kernel, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    buffer = kernel.buffer(PAGE)
    mock_domain(iommu, ioas)

    def failures() -> set[str]:
        kernel.faults.injected.clear()
        with kernel.open("/proc/thread-self/fail-nth") as file:
            for nth in range(1, 50):
                file.pwrite(b"%d" % nth, 0)
                try:
                    map_user(iommu, ioas, buffer.address, PAGE, iova=1 << 24)
                except OSError:
                    pass
                left = int(file.pread(8, 0))
                file.pwrite(b"0", 0)
                if unmapped(iommu, ioas) and left:
                    break
        return set(kernel.faults.injected)

    assert "a table" not in failures()
    assert "struct iopt_pages" not in failures()
    for name, value in (("fail_page_alloc/min-order", b"0"), ("fail_page_alloc/ignore-gfp-wait", b"N")):
        with kernel.open(f"/sys/kernel/debug/{name}", os.O_WRONLY) as file:
            file.write(value)
    assert "a table" in failures()


def unmapped(iommu: File, ioas: int) -> bool:
    try:
        unmap(iommu, ioas, 1 << 24, PAGE)
    except OSError:
        return False
    return True


def test_release_without_iommufd_has_none_of_its_capability() -> None:
    with Kernel("mock", "6.1") as kernel:
        assert not kernel.files.exists("/sys/kernel/debug/fail_iommufd")
        assert kernel.files.exists("/sys/kernel/debug/failslab")


@given(st.integers(0, (1 << 32) - 1), st.sampled_from(["{}", "{:#x}", "0{:o}", "+{}", "{}\n", "0X{:X}"]))
@settings(max_examples=200)
def test_integers_are_read_in_every_base(value: int, form: str) -> None:
    assert parse_integer(form.format(value).encode(), (1 << 32) - 1) == value


@given(st.binary(max_size=12))
@settings(max_examples=300)
def test_other_bytes_are_einval_or_erange_or_a_number(data: bytes) -> None:
    try:
        value = parse_integer(data, 255)
    except KernelError as error:
        value, found = -1, error.errno
    else:
        found = 0
    assert 0 <= value <= 255 or found in (errno.EINVAL, errno.ERANGE)


# ----------------------------------------------------------------------------------------------------------- the sweep


def test_sweep_gives_the_same_answers(kernel: Kernel) -> None:
    def story(backend: Any) -> list[int]:
        with backend.open("/dev/iommu") as file:
            ioas = ioas_alloc(file)
            buffer = backend.buffer(4 * PAGE)
            device = mock_domain(file, ioas)
            iova = map_user(file, ioas, buffer.address, 4 * PAGE)
            return [ioas, *device, iova, unmap(file, ioas, iova, 4 * PAGE)]

    swept = FailNth(Kernel("mock"))
    assert story(swept) == story(kernel)
    assert swept.calls == 5
    assert swept.injected.total() > 30
    swept.close()


def test_sweep_finds_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: IoPagetable, area: Any) -> None:
        pass  # an undo that was forgotten

    monkeypatch.setattr(IoPagetable, "_remove", leaky)
    swept = FailNth(Kernel("mock"))
    with swept.open("/dev/iommu") as file:
        ioas = ioas_alloc(file)
        mock_domain(file, ioas)
        buffer = swept.buffer(PAGE)
        with pytest.raises(AssertionError, match=r"IOMMU_IOAS_MAP, failure .* left something behind: .*IoPagetable"):
            IOMMU_IOAS_MAP(file, flags=7, ioas_id=ioas, user_va=buffer.address, length=PAGE, iova=1 << 24)
    monkeypatch.undo()


def test_sweep_finds_an_errno_that_is_out_of_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(what: str, size: int = 64, *, gfp_wait: bool = True) -> None:
        try:
            kmalloc(what, size, gfp_wait=gfp_wait)
        except KernelError as error:
            raise KernelError(errno.EBUSY, "not what a lack of memory is") from error

    monkeypatch.setattr("kernel_model.iommufd.object.kmalloc", odd)
    swept = FailNth(Kernel("mock"))
    with swept.open("/dev/iommu") as file, pytest.raises(AssertionError, match="IOAS_ALLOC, failure 2: Ioas: EBUSY"):
        ioas_alloc(file)
    swept.close()


def test_sweep_tells_of_what_stays_when_all_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_model.iommufd.pages.Pages._uncharge", lambda self, npages: None)
    swept = FailNth(Kernel("mock"))
    with swept.open("/dev/iommu") as file:
        ioas = ioas_alloc(file)
        mock_domain(file, ioas)
        buffer = swept.buffer(PAGE)
        swept._seen["IOMMU_IOAS_MAP"] = 100  # not swept, so only the end shows it
        map_user(file, ioas, buffer.address, PAGE, iova=1 << 24)
    with pytest.raises(AssertionError, match="pinned_vm 1"):
        swept.close()
