"""The sweep of failures: each ioctl of a test first meets every failure that it can, one after the other.

`FailNth` stands between a test and its kernel. An ioctl is made with the first thing that can fail failing, then the
second, until none is left to fail; that last call is the test's own, so a test says the same with the sweep as without.
A call that failed on the way must show one of `ERRNOS` and, on the model, must have left nothing behind: the kernel's
digest is the same. Where an injected failure is no error, because the kernel copes, the call has happened.

On the model the failures come by its `fail_nth`; on a real kernel by /proc/thread-self/fail-nth, which has to be there
(CONFIG_FAULT_INJECTION). Calls of other processes, reads, writes and mappings go through unswept.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from uapi import iommufd_test as abi
from uapi.backend import Argument, Backend, File
from uapi.decode import find_ioctl
from uapi.iommufd import IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_UNMAP

#: What an injected failure may show: mostly ENOMEM; EFAULT for a copy or a pin, and what iommufd's own places say.
ERRNOS = (errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.ENOENT)
#: More, by call: a COPY in the fuzzer's manner goes on without its IOAS, and then its arguments are odd.
#: VT-d says ENODEV where it has no memory for the entry of a PASID.
MORE_ERRNOS = {
    "IOMMU_IOAS_COPY": (errno.EOVERFLOW, errno.EOPNOTSUPP),
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT of a PASID": (errno.ENODEV,),
    # A function that cannot have its vectors, for whatever reason, is told that there is no room.
    "VFIO_DEVICE_SET_IRQS": (errno.ENOSPC,),
}

#: Calls that have had their effect when they copy their answer out: the kernel does not undo it where that fails.
KEEPS = {
    "IOMMU_IOAS_MAP": "the mapping stays",
    "IOMMU_IOAS_MAP_FILE": "the mapping stays",
    "IOMMU_IOAS_COPY": "the mappings stay",
    "IOMMU_IOAS_UNMAP": "the mappings have gone",
    "IOMMU_OPTION": "the option is set",
    "IOMMU_HWPT_INVALIDATE": "the entries before are done",
    "IOMMU_HWPT_GET_DIRTY_BITMAP": "the bits that were read are clear",
    "VFIO_IOMMU_UNMAP_DMA": "the mappings have gone",
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT again": "the device is detached from both",
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT of a PASID": "the device is detached, not the PASID",
    "IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE": "the device is moved",
    "IOMMU_HW_QUEUE_ALLOC": "the mock driver forgets its queue 0 whichever queue goes",
    "IOMMU_TEST_OP_PASID_REPLACE": "the PASID is moved",
    "IOMMU_TEST_OP_ACCESS_PAGES": "the pin is undone, its number is used up",
    "IOMMU_TEST_OP_DIRTY": "the pages are dirty",
}
#: A failure that is taken for an unsuitable HWPT when a device is attached to an IOAS: another HWPT is made, and the
#: call succeeds with another result.
TURNED = ("iopt_table_enforce_dev_resv_regions()",)

#: Failures that are not made, because the kernel itself leaves something behind there. A device that is attached and
#: cannot be attached anew loses its reserved regions, which the kernel takes from the target even if that is the IOAS
#: it is in; Intel's driver has blocked it before it looks for memory, and the core does not move it back. Of the two
#: cuts that an unmap in the VFIO manner makes, the first stays.
#: An interrupt translation service never gives back the events of a vector that finds no memory for its doorbell.
#: A page request or an event that finds no memory is lost, which the call that triggers it does not tell, or tells and
#: counts the event all the same. The mock driver's PASID 1024, which fails every second time, counts calls that fail.
LEFT = {
    "IOMMU_TEST_OP_TRIGGER_IOPF": ("struct iopf_fault", "struct iopf_group"),
    "IOMMU_TEST_OP_TRIGGER_VEVENT": ("struct iommufd_vevent",),
    "IOMMU_TEST_OP_PASID_ATTACH": ("struct iommu_fault_param",),
    "IOMMU_TEST_OP_PASID_REPLACE": ("struct iommu_fault_param",),
    "VFIO_IOMMU_UNMAP_DMA": ("struct iopt_area on the left", "struct iopt_area on the right"),
    "VFIO_DEVICE_SET_IRQS": ("struct iommufd_sw_msi_map", "a table or queue"),
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT again": (
        "struct iommufd_attach_handle",
        "struct iommu_domain_info",
        "struct cache_tag",
        "struct qi_batch",
        "struct iommu_fault_param",
        "a table or queue",
        "struct arm_smmu_vmaster",
        "struct arm_smmu_master_domain",
    ),
}

_ANY_LEFT = tuple(site for sites in LEFT.values() for site in sites)

#: How many calls of one kind are swept in one test, and from where on failures are skipped between.
_CALLS, _DENSE = 12, 40
#: Where the calls that map have the IOAS, the length and the IOVA.
_PLACES = {
    "IOMMU_IOAS_MAP": ((8, 12), (24, 32), (32, 40)),
    "IOMMU_IOAS_MAP_FILE": ((8, 12), (24, 32), (32, 40)),
    "IOMMU_IOAS_COPY": ((8, 12), (16, 24), (24, 32)),
}
_ATTACH = "VFIO_DEVICE_ATTACH_IOMMUFD_PT"
_DEBUGFS = "/sys/kernel/debug"
_TEST_OPS = {getattr(abi, name): name for name in dir(abi) if name.startswith("IOMMU_TEST_OP_")}


class Injector(Protocol):
    """How failures are made."""

    def __call__(self, nth: int, name: str, call: Callable[[], Any]) -> tuple[Any, OSError | None, str | None]:
        """Make `call` with its `nth` failure happening: result, error, and what failed (None: nothing did)."""


class ModelInjector:
    """By the model's own `fail_nth`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __call__(self, nth: int, name: str, call: Callable[[], Any]) -> tuple[Any, OSError | None, str | None]:
        # A bare address may lead to memory that only the answer cannot be written to.
        at = name.endswith(" at")
        more = {} if name in KEEPS or at else {"kinds": self._backend.faults.attributes}
        with self._backend.fail_nth(
            nth, spare=(*TURNED, *LEFT.get(name, _ANY_LEFT if at else ())), **more
        ) as injection:
            result, error = _try(call)
        return result, error, injection.site if injection.injected else None


class LinuxInjector:
    """By /proc/thread-self/fail-nth. Copies count, too: calls in `KEEPS` are swept by `FailNth` with care."""

    def __init__(self) -> None:
        for name in (
            "failslab/ignore-gfp-wait",
            "fail_page_alloc/ignore-gfp-wait",
            "fail_page_alloc/ignore-gfp-highmem",
        ):
            _write(f"{_DEBUGFS}/{name}", b"N")
        for name in os.listdir(_DEBUGFS):
            if name.startswith("fail"):
                _write(f"{_DEBUGFS}/{name}/verbose", b"0")
        self._fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR | os.O_CLOEXEC)

    def __call__(self, nth: int, name: str, call: Callable[[], Any]) -> tuple[Any, OSError | None, str | None]:
        os.pwrite(self._fd, b"%d" % nth, 0)
        result, error = _try(call)
        try:
            left = int(os.pread(self._fd, 20, 0))
        except OSError:
            left = 1  # it was this read whose turn it was
        try:
            os.pwrite(self._fd, b"0", 0)
        except OSError:
            os.pwrite(self._fd, b"0", 0)
        return result, error, None if left else f"failure {nth}"


def _write(path: str, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(data)


def _try(call: Callable[[], Any]) -> tuple[Any, OSError | None]:
    try:
        return call(), None
    except OSError as error:
        return None, error


class FailNth:
    """A `Backend` whose files' ioctls are swept. `injected` counts failures by what failed, `calls` swept calls."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.injected: Counter[str] = Counter()
        self.calls = 0
        self._model = hasattr(inner, "fail_nth")
        self._injector: Injector = ModelInjector(inner) if self._model else LinuxInjector()
        self._seen: Counter[str] = Counter()
        #: Descriptors of VFIO devices that are attached.
        self._attached: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> SweptFile:
        if self._model:
            return SweptFile(self, self.sweep(f"open {path}", lambda: self.inner.open(path, flags), None))
        return SweptFile(self, self.inner.open(path, flags))

    def adopt(self, fd: int) -> SweptFile:
        return SweptFile(self, self.inner.adopt(fd))

    def close(self) -> None:
        """AssertionError: everything is closed, and something is still held."""
        left: list[str] = getattr(self.inner, "leftovers", list)()
        self.inner.close()
        if left:
            raise AssertionError(f"held though everything is closed: {'; '.join(left)}")

    def ioctl(self, file: File, request: int, arg: Argument) -> int:
        name = _name(file, request, arg)
        block = None if isinstance(arg, int) else memoryview(arg).cast("B")
        if not self._model and name in KEEPS and not _can_be_taken_back(name, block):
            return file.ioctl(request, arg)
        of_pasid = block is not None and bytes(block[4:5]) == b"\1"
        if name.startswith(_ATTACH):
            if of_pasid:
                name = f"{_ATTACH} of a PASID"
            elif file.fileno() in self._attached:
                name = f"{_ATTACH} again"
        result: int = self.sweep(name, lambda: file.ioctl(request, arg), block, file)
        if of_pasid:
            pass
        elif name.startswith(_ATTACH):
            self._attached.add(file.fileno())
        elif name in ("VFIO_DEVICE_DETACH_IOMMUFD_PT", "VFIO_DEVICE_BIND_IOMMUFD"):
            self._attached.discard(file.fileno())
        return result

    def sweep(self, name: str, call: Callable[[], Any], block: memoryview | None, file: File | None = None) -> Any:
        """Make the call with each of its failures, then without; the result or the error of the last."""
        self._seen[name] += 1
        if self._seen[name] > _CALLS:
            return call()
        self.calls += 1
        before = self._digest()
        saved = bytes(block) if block is not None else b""
        nth = 1
        while True:
            result, error, site = self._injector(nth, name, call)
            if site is None or error is None:
                if site is not None:
                    self.injected[site] += 1
                if error is not None:
                    raise error
                return result
            self.injected[site] += 1
            where = f"{name}, failure {nth}: {site}"
            if error.errno not in (*ERRNOS, *MORE_ERRNOS.get(name, ())):
                raise AssertionError(f"{where}: {errno.errorcode.get(error.errno or 0, error.errno)}")
            if block is not None and not block.readonly:
                block[:] = saved
            if not self._model and nth > 1 and file is not None and error.errno == errno.EFAULT:
                _take_map_back(file, name, saved)
            after = self._digest()
            if after != before:
                raise AssertionError(f"{where} left something behind: {'; '.join(self._difference(before, after))}")
            nth += 1 if nth < _DENSE else nth // 4

    def _digest(self) -> Any:
        return self.inner.digest() if self._model else None  # type: ignore[attr-defined]

    def _difference(self, before: Any, after: Any) -> list[str]:
        found: list[str] = self.inner.difference(before, after)  # type: ignore[attr-defined]
        return found[:8]


def _can_be_taken_back(name: str, block: memoryview | None) -> bool:
    """Whether it maps, and the caller says where."""
    return (
        name in _PLACES and block is not None and bool(int.from_bytes(block[4:8], "little") & IOMMU_IOAS_MAP_FIXED_IOVA)
    )


def _take_map_back(file: File, name: str, block: bytes) -> None:
    """A map whose answer could not be copied has happened: undo it."""
    place = _PLACES.get(name)
    if place is None:
        return
    ioas, length, iova = (int.from_bytes(block[at:end], "little") for at, end in place)
    try:
        IOMMU_IOAS_UNMAP(file, ioas_id=ioas, iova=iova, length=length)
    except OSError:
        pass  # it was the pin that failed


def _name(file: File, request: int, arg: Argument) -> str:
    found = find_ioctl(request, type(arg), getattr(file, "path", ""))
    if found is None:
        return f"{request:#x} at"
    if isinstance(arg, int) and found.struct is not None:
        return f"{found.name} at"
    if found.name == "IOMMU_TEST_CMD" and not isinstance(arg, int) and len(memoryview(arg).cast("B")) >= 8:
        op = int.from_bytes(memoryview(arg).cast("B")[4:8], "little")
        return _TEST_OPS.get(op, f"test operation {op}")
    return found.name


class SweptFile:
    """A `File` whose ioctls are swept."""

    def __init__(self, backend: FailNth, inner: File) -> None:
        self._backend = backend
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        return self._backend.ioctl(self.inner, request, arg)

    def __enter__(self) -> SweptFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.close()
