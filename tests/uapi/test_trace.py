"""The recorder: what it passes on, what it keeps, and what makes two runs comparable."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from uapi import registry
from uapi.backend import DEV_IOMMU
from uapi.buffers import AnonymousBuffer
from uapi.decode import decode, find_ioctl, render, render_all
from uapi.iommufd import IOMMU_IOAS_ALLOC, IOMMU_IOAS_MAP, IOMMU_OPTION
from uapi.iommufd_test import IOMMU_TEST_CMD, IOMMU_TEST_OP_CREATE_ACCESS, TEST_OP_MEMBERS
from uapi.trace import LIMIT, Recorder
from uapi.vfio import VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, VFIO_IOMMU_GET_INFO


class FakeFile:
    """Answers as a script says: a callable for each ioctl."""

    def __init__(self, path: str, answers: Any) -> None:
        self.path = path
        self._answers = answers
        self._fd = os.open(os.devnull, os.O_RDWR)

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, arg: Any = 0) -> int:
        return int(self._answers(request, arg))

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(count)

    def close(self) -> None:
        os.close(self._fd)


class FakeBackend:
    name, release = "model", "7.3"

    def __init__(self, answers: Any = lambda request, arg: 0) -> None:
        self._answers = answers

    def open(self, path: str, flags: int = 0) -> FakeFile:
        if path == "/nope":
            raise OSError(errno.ENOENT, "no")
        return FakeFile(path, self._answers)

    def buffer(self, length: int, *, huge: bool = False) -> AnonymousBuffer:
        return AnonymousBuffer(length)

    def close(self) -> None: ...


def recorder(answers: Any = lambda request, arg: 0) -> Recorder:
    return Recorder(FakeBackend(answers))  # type: ignore[arg-type]


def refuse(number: int, why: str = "") -> Any:
    def answer(_request: int, _arg: Any) -> int:
        error = OSError(number, os.strerror(number))
        error.why = why  # type: ignore[attr-defined]
        raise error

    return answer


def test_inputs_and_changed_fields_are_told_apart() -> None:
    def answer(request: int, arg: Any) -> int:
        arg.out_ioas_id = 7
        return 0

    kernel = recorder(answer)
    with kernel.open(DEV_IOMMU) as file:
        assert IOMMU_IOAS_ALLOC(file).out_ioas_id == 7
    call = kernel.calls()[1]
    assert call == {"call": "IOMMU_IOAS_ALLOC", "file": "fd1", "in": {}, "ret": 0, "out": {"out_ioas_id": 7}}


def test_errno_reaches_the_client_and_the_log_with_its_reason() -> None:
    kernel = recorder(refuse(errno.EOPNOTSUPP, "because"))
    with kernel.open(DEV_IOMMU) as file, pytest.raises(OSError, match="not supported") as caught:
        IOMMU_OPTION(file, option_id=1)
    assert caught.value.errno == errno.EOPNOTSUPP
    call = kernel.calls()[1]
    assert (call["errno"], call["why"]) == ("EOPNOTSUPP", "because")
    assert render(call).endswith("= -EOPNOTSUPP (because)")


def test_pointers_into_buffers_are_buffer_and_offset() -> None:
    kernel = recorder()
    buffer = kernel.buffer(8192)
    with kernel.open(DEV_IOMMU) as file:
        IOMMU_IOAS_MAP(file, user_va=buffer.address + 0x1000, iova=0x4000, length=0x1000)
        IOMMU_IOAS_MAP.raw(file, buffer.address)
        IOMMU_IOAS_MAP(file, user_va=0x7F0000001234, iova=0x7F0000001000)
    inputs = [call["in"] for call in kernel.calls() if call["call"] == "IOMMU_IOAS_MAP"]
    assert inputs[0] == {"user_va": "buf1+0x1000", "iova": 0x4000, "length": 0x1000}
    assert inputs[1] == {"arg": "buf1+0x0"}
    assert inputs[2] == {"user_va": "ptr+0x234", "iova": 0x7F0000001000}
    kernel.close()


def test_descriptors_are_tokens_and_a_reused_number_is_a_new_one() -> None:
    kernel = recorder()
    first = kernel.open(DEV_IOMMU)
    number = first.fileno()
    first.close()
    with kernel.open(DEV_IOMMU) as second:
        assert second.fileno() == number
        VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=number)
        VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=-1)
    binds = [call for call in kernel.calls() if call["call"] == "VFIO_DEVICE_BIND_IOMMUFD"]
    assert [call["in"]["iommufd"] for call in binds] == ["fd2", -1]
    assert binds[0]["file"] == "fd2"


def test_bytes_beyond_the_struct_are_the_tail() -> None:
    def answer(request: int, arg: Any) -> int:
        arg[-1] = 0xEE
        return 0

    kernel = recorder(answer)
    block = bytearray(IOMMU_IOAS_ALLOC.size + 4)
    block[0] = len(block)
    with kernel.open(DEV_IOMMU) as file:
        IOMMU_IOAS_ALLOC.raw(file, block)
    call = kernel.calls()[1]
    assert call["in"] == {"size": len(block)}
    assert call["out"] == {"tail": "000000ee"}


def test_a_short_block_is_decoded_as_far_as_it_goes() -> None:
    kernel = recorder(refuse(errno.EINVAL))
    with kernel.open(DEV_IOMMU) as file, pytest.raises(OSError, match="Invalid"):
        IOMMU_IOAS_ALLOC.raw(file, bytearray(b"\x08\0\0\0"))
    assert kernel.calls()[1]["in"] == {"size": 8, "bytes": 4}


def test_identical_calls_in_a_row_are_one_with_a_count() -> None:
    kernel = recorder()
    with kernel.open(DEV_IOMMU) as file:
        for _ in range(5):
            file.pread(4, 0)
    reads = [call for call in kernel.calls() if call["call"] == "pread"]
    assert len(reads) == 1
    assert reads[0]["times"] == 5


def test_failed_open_is_recorded() -> None:
    kernel = recorder()
    with pytest.raises(FileNotFoundError):
        kernel.open("/nope")
    assert kernel.calls() == [{"call": "open", "in": {"path": "/nope"}, "errno": "ENOENT"}]


def test_calls_past_the_limit_are_counted() -> None:
    kernel = recorder()
    with kernel.open(DEV_IOMMU) as file:
        for number in range(LIMIT):
            file.pread(4, number)
    assert kernel.dropped == 3
    assert len(kernel.calls()) == LIMIT - 1


def test_what_a_test_left_open_is_closed() -> None:
    kernel = recorder()
    file = kernel.open(DEV_IOMMU)
    kernel.buffer(4096)
    kernel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fileno())


def test_notes_are_kept() -> None:
    kernel = recorder()
    kernel.note("pages", [1, 2])
    assert kernel.notes == {"pages": [1, 2]}


def test_numbers_with_two_meanings_are_told_apart_by_struct_then_by_file() -> None:
    number = VFIO_IOMMU_GET_INFO.number
    assert number == VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.number
    assert find_ioctl(number, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.struct) is VFIO_DEVICE_GET_PCI_HOT_RESET_INFO
    assert find_ioctl(number, bytearray, "/dev/vfio/vfio") is VFIO_IOMMU_GET_INFO
    assert find_ioctl(number, bytearray, "/dev/vfio/devices/vfio0") is VFIO_DEVICE_GET_PCI_HOT_RESET_INFO


def test_flags_are_named() -> None:
    text = render({"call": "IOMMU_IOAS_MAP", "file": "fd1", "in": {"flags": 3, "iova": 0x1000}, "ret": 0, "out": {}})
    assert text == "IOMMU_IOAS_MAP(fd1, flags=IOMMU_IOAS_MAP_FIXED_IOVA|IOMMU_IOAS_MAP_WRITEABLE, iova=0x1000) = 0"


def test_only_the_last_calls_are_printed_with_their_numbers() -> None:
    lines = render_all([{"call": "close", "file": "fd1", "in": {}, "ret": 0}] * 5, last=2)
    assert lines[0].strip() == "… 3 earlier calls"
    assert lines[1].startswith("   4  close(fd1)")


def test_the_mock_drivers_union_is_shown_by_its_operation() -> None:
    before = IOMMU_TEST_CMD.make(op=IOMMU_TEST_OP_CREATE_ACCESS, id=1)
    after = IOMMU_TEST_CMD.make(op=IOMMU_TEST_OP_CREATE_ACCESS, id=1)
    after.create_access.out_access_fd = 9
    event = ("ioctl", 0, 1, DEV_IOMMU, IOMMU_TEST_CMD.number, type(before), bytes(before), bytes(after), 0, 0, "")
    assert [call["out"] for call in decode([event])] == [{"out_access_fd": "fd1"}]


def test_every_operation_of_the_mock_driver_has_its_member() -> None:
    operations = {
        c.value for n, c in registry.constants(registry.TEST_HEADER).items() if n.startswith("IOMMU_TEST_OP_")
    }
    assert set(TEST_OP_MEMBERS) == operations
