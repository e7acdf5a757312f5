"""Run fuzzed programs on a kernel: the same code on the model, on the running kernel and in a guest.

A program arrives compiled (`program.compile_program`): the bytes of the work region, and a list of steps in which all
is numbers. Each ioctl has its own block in the region, so a step is one libc call, and what the kernel wrote stays
there until the end. An answer is each step's result, the region afterwards, and the final state: what DESTROY of each
id says, pins and contents of the buffers, pinned memory before and pins after the files close.

A frame with the digest of the answer that is expected gets that digest back, or the whole answer where it differs, so
little goes over the wire. As a program this serves frames over a descriptor (`serve`). Needs only the standard library,
`uapi` and the suite's drivers of devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import marshal
import os
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

from iommulab.fuzz import edu_steps
from iommulab.fuzz.doors import Door, LinuxDoor, Mapping
from iommulab.fuzz.memory import FIRST_FD, NULL_FD, PAGE, REGIONS, SYSTEM, WATCHED, WORK, Memory
from uapi.iommufd import IOMMU_DESTROY
from uapi.iommufd_test import (
    IOMMU_TEST_CMD,
    IOMMU_TEST_OP_MD_CHECK_REFS,
    IOMMU_TEST_OP_PASID_DETACH,
    iommu_test_cmd,
)
from uapi.vfio import VFIO_DEVICE_FEATURE

#: Kinds of steps. The result of an FD_IOCTL is a descriptor; DETACH has no result: it frees every device of PASIDs.
IOCTL, READ, WRITE, CLOSE, POLL, UNMAP, PROTECT, FD_IOCTL, DETACH, MMAP = range(10)
#: Those of programs with hardware: open a device or an eventfd, an ioctl of a file, its regions, what `edu` does. MAIN
#: has no result: it says the iommufd's number. POKE writes into the program's memory, as a guest does.
OPEN, EVENTFD, FILE_IOCTL, PREAD, PWRITE, EDU, MAIN, POKE = range(10, 18)
#: Ids that the final state tries to destroy.
IDS = 20
#: A page with more pins than this counts as that.
PINS = 16

Step: TypeAlias = "tuple[Any, ...]"
#: Results of the steps; the work region; the final state, as numbers by name.
Answer: TypeAlias = "tuple[list[int], bytes, dict[str, list[int]]]"

_HEAD = struct.Struct("<I")


class Executor:
    """Runs programs one after the other, each on a fresh /dev/iommu and with the memory as it was."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._low: list[int] = []
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < FIRST_FD:
            self._low.append(fd)
        os.dup2(fd, NULL_FD, inheritable=False)
        os.close(fd)
        self.memory = Memory()
        refs = iommu_test_cmd(size=IOMMU_TEST_CMD.size, op=IOMMU_TEST_OP_MD_CHECK_REFS)
        ctypes.memmove(SYSTEM, ctypes.addressof(refs), IOMMU_TEST_CMD.size)
        self._refs = iommu_test_cmd.from_address(SYSTEM).check_refs
        self._destroy = SYSTEM + 2048
        ctypes.c_uint32.from_address(self._destroy).value = IOMMU_DESTROY.size
        #: An iommufd that is open for the next program, and how much of the work region the last one had.
        self._fresh = -1
        self._opened: list[int] = []
        self._main = -1
        self._mapped: list[Mapping] = []
        #: Eventfds that the program has made: files of the real kernel on either side.
        self._plain: set[int] = set()
        self._linux = LinuxDoor()
        self._used = len(self.memory.work)

    def close(self) -> None:
        """Give memory and descriptors back."""
        if self._fresh >= 0:
            os.close(self._fresh)
        self.memory.close()
        for fd in [*self._low, NULL_FD]:
            os.close(fd)

    def abandon(self) -> None:
        """Give all back after a run that an exception ended; what it had closed already stays so."""
        self._mapped.clear()
        for fd in {*self._opened, self._main}:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.close()

    def run(self, image: bytes, steps: Sequence[Step], main_first: bool = False) -> Answer:
        """One program, from open to close."""
        door, memory = self._door, self.memory
        work = memory.work
        ctypes.memset(WORK, 0, self._used)
        self._used = min(len(image) + PAGE, len(work))
        work[: len(image)] = image
        iommu = self._main = door.open() if self._fresh < 0 else self._fresh
        self._fresh = -1
        opened: list[int] = []
        self._opened = opened
        slots: list[int] = []
        results: list[int] = []
        moved = False
        self._plain.clear()
        for step in steps:
            kind = step[0]
            if kind in (IOCTL, FD_IOCTL):
                _, request, address, slot, patches = step
                for target, source, count in patches:
                    work[target : target + count] = work[source : source + count]
                result = door.ioctl(iommu, request, address)
                if kind == FD_IOCTL and result > 0:
                    work[slot : slot + 4] = result.to_bytes(4, "little")
                    result = 1
                if slot >= 0 and result >= 0:
                    opened.append(int.from_bytes(work[slot : slot + 4], "little"))
                    slots.append(slot)
            elif kind in (UNMAP, PROTECT):
                moved = True
                result = memory.unmap(*step[1:]) if kind == UNMAP else memory.protect(*step[1:])
            elif kind == DETACH:
                self._detach(iommu, step[1])
                continue
            elif kind == MMAP:
                result = self._mmap(iommu, *step[1:])
            elif kind == MAIN:
                work[step[1] : step[1] + 4] = iommu.to_bytes(4, "little")
                slots.append(step[1])
                continue
            elif kind == POKE:
                result = memory.poke(*step[1:])
            elif kind in (OPEN, EVENTFD):
                result = self._open(step, opened, slots)
            elif kind in (FILE_IOCTL, PREAD, PWRITE, EDU):
                result = self._device_step(step, opened)
            else:
                result = self._file_step(step, opened, slots)
            results.append(result)
        # Numbers of descriptors are nobody's business: 1, where the kernel wrote them and where they were used.
        for slot in slots:
            work[slot : slot + 4] = b"\1\0\0\0"
        for step in steps if slots else ():
            if step[0] in (IOCTL, FD_IOCTL, FILE_IOCTL):
                for target, source, count in step[4]:
                    if source in slots:
                        work[target : target + count] = b"\1\0\0\0"[:count]
        written = bytes(work[: len(image) + 256])
        return results, written, self._final(iommu, opened, main_first, moved)

    def _mmap(
        self, iommu: int, block: int, length: int, prot: int, flags: int, patches: Sequence[Step], slot: int = -1
    ) -> int:
        """Map pages of the iommufd until the end; the first byte where they can be read. Or a region of the device in
        `slot`: nothing is read of that, as a function whose memory is off answers with a signal."""
        work = self.memory.work
        if slot >= 0:
            iommu = int.from_bytes(work[slot : slot + 4], "little", signed=True)
            if iommu not in self._opened or iommu in self._plain:
                return -errno.EBADF
        for target, source, count in patches:
            work[target : target + count] = work[source : source + count]
        offset = int.from_bytes(work[block : block + 8], "little", signed=True)
        got = self._door.mmap(iommu, length, offset, prot, flags)
        if isinstance(got, int):
            return got
        self._mapped.append(got)
        return got.read(0, 1) if prot & 1 and slot < 0 else 0

    def _unmap_all(self) -> None:
        while self._mapped:
            self._mapped.pop().close()

    def _detach(self, iommu: int, pasids: Sequence[int]) -> None:
        """Detach these PASIDs of every device: one that dies with a PASID attached is a WARN and a leak on 7.3."""
        block = iommu_test_cmd(size=IOMMU_TEST_CMD.size, op=IOMMU_TEST_OP_PASID_DETACH)
        for pasid in pasids:
            block.pasid_detach.pasid = pasid
            for number in range(1, IDS + 1):
                block.id = number
                self._door.ioctl(iommu, IOMMU_TEST_CMD.number, ctypes.addressof(block))

    def _open(self, step: Step, opened: list[int], slots: list[int]) -> int:
        """Open a device or an eventfd: 0 or a negative errno."""
        if step[0] == EVENTFD:
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._plain.add(fd)
        else:
            fd = self._door.open_device(step[2]) if step[2] >= 0 else self._door.open()
        if fd < 0:
            return fd
        self.memory.work[step[1] : step[1] + 4] = fd.to_bytes(4, "little")
        opened.append(fd)
        slots.append(step[1])
        return 0

    def _device_step(self, step: Step, opened: list[int]) -> int:
        """An ioctl of a file that the program opened, or an access to its regions; EBADF where that failed."""
        work, door, kind, slot = self.memory.work, self._door, step[0], step[1]
        fd = int.from_bytes(work[slot : slot + 4], "little", signed=True)
        if fd not in opened:
            fd = -1
        for target, source, count in step[4] if kind != PREAD else ():
            work[target : target + count] = work[source : source + count]
        if kind == FILE_IOCTL:
            result = (self._linux if fd in self._plain else door).ioctl(fd, step[2], step[3])
            if result > 0 and step[2] == VFIO_DEVICE_FEATURE.number:  # a descriptor of a dma-buf
                door.close(result)
                result = 1
            return result
        if fd < 0:
            return -errno.EBADF
        if fd in self._plain:
            return -errno.ESPIPE
        if kind == EDU:
            block = step[2]
            numbers = [int.from_bytes(work[block + at : block + at + 8], "little") for at in (0, 8, 16)]
            return edu_steps.run(door, fd, step[3], *numbers)
        if kind == PWRITE:
            block, count, offset = step[2], step[3], step[5]
            return (
                -errno.EPERM
                if edu_steps.forbidden(offset, count)
                else door.pwrite(fd, bytes(work[block : block + count]), offset)
            )
        data = door.pread(fd, step[2], step[3])
        if isinstance(data, int):
            return data
        work[step[4] : step[4] + len(data)] = data
        return len(data)

    def _file_step(self, step: Step, opened: list[int], slots: list[int]) -> int:
        """A call on a file that an earlier step opened; EBADF where that failed."""
        work, kind = self.memory.work, step[0]
        slot = step[1]
        fd = int.from_bytes(work[slot : slot + 4], "little", signed=True)
        if fd not in opened:
            return -9
        door = self._linux if fd in self._plain and kind != CLOSE else self._door
        if kind == READ:
            data = door.read(fd, step[2])
            if isinstance(data, int):
                return data
            work[step[3] : step[3] + len(data)] = data
            return len(data)
        if kind == WRITE:
            for target, source, count in step[4]:
                work[target : target + count] = work[source : source + count]
            written = door.write(fd, bytes(work[step[2] : step[2] + step[3]]))
            if door is self._linux:
                self._door.signalled()
            return written
        if kind == POLL:
            return door.poll(fd)
        # A number that is free again would mean another file on each side: later uses of it get one that is not open.
        opened.remove(fd)
        self._plain.discard(fd)
        for at in slots:
            if int.from_bytes(work[at : at + 4], "little") == fd:
                work[at : at + 4] = b"\xff\xff\xff\xff"
        return door.close(fd)

    def _check_refs(self, iommu: int, address: int, length: int, refs: int) -> int:
        block = self._refs
        block.uptr, block.length, block.refs = address, length, refs
        return self._door.ioctl(iommu, IOMMU_TEST_CMD.number, SYSTEM)

    def _pins(self, iommu: int) -> list[int]:
        """How often each page of the watched regions is pinned; -1 where a page does not answer."""
        pins: list[int] = []
        for name in WATCHED:
            start, pages = REGIONS[name]
            if self._check_refs(iommu, start, pages * PAGE, 0) == 0:
                pins += [0] * pages
                continue
            for address in range(start, start + pages * PAGE, PAGE):
                for refs in range(PINS):
                    result = self._check_refs(iommu, address, PAGE, refs)
                    if result != -5:
                        break
                pins.append(refs if result in (0, -5) else -1)
        return pins

    def _final(self, iommu: int, opened: list[int], main_first: bool, moved: bool) -> dict[str, list[int]]:
        door, memory = self._door, self.memory
        final = {"pins": self._pins(iommu), "VmPin": [door.pinned()]}
        block = ctypes.c_uint32.from_address(self._destroy + 4)
        destroyed = []
        for number in range(IDS, 0, -1):
            block.value = number
            destroyed.append(door.ioctl(iommu, IOMMU_DESTROY.number, self._destroy))
        for number in range(1, IDS + 1):
            if destroyed[IDS - number] == -16:
                block.value = number
                destroyed.append(door.ioctl(iommu, IOMMU_DESTROY.number, self._destroy))
        final["destroy"] = destroyed
        self._unmap_all()
        for fd in [iommu, *opened] if main_first else [*opened, iommu]:
            door.close(fd)
        changed = memory.differing(("ro", "file") if moved else WATCHED)
        final["contents"] = [number for name in changed for number in _where_changed(memory, name)]
        self._fresh = door.open()
        left = self._pins(self._fresh)
        final["left"] = left if any(left) else []
        if moved or any(left):
            memory.build()
            self._restore_system()
        else:
            memory.restore([name for name in changed if name != "ro"])
        return final

    def _restore_system(self) -> None:
        ctypes.c_uint32.from_address(self._destroy).value = IOMMU_DESTROY.size
        refs = iommu_test_cmd(size=IOMMU_TEST_CMD.size, op=IOMMU_TEST_OP_MD_CHECK_REFS)
        ctypes.memmove(SYSTEM, ctypes.addressof(refs), IOMMU_TEST_CMD.size)


def _where_changed(memory: Memory, name: str) -> list[int]:
    """The pages of a region that do not hold their pattern: address and digest of each."""
    now, before, start = memory.content(name), memory.patterns[name], REGIONS[name][0]
    found = []
    for offset in range(0, len(now), PAGE):
        page = now[offset : offset + PAGE]
        if page != before[offset : offset + PAGE]:
            found += [start + offset, int.from_bytes(hashlib.blake2b(page, digest_size=6).digest(), "little")]
    return found


def digest(answer: Answer) -> bytes:
    """Eight bytes that say whether two answers are the same."""
    results, work, final = answer
    state = hashlib.blake2b(work, digest_size=8)
    state.update(array("q", results).tobytes())
    for name, numbers in final.items():
        state.update(name.encode() + array("q", numbers).tobytes())
    return state.digest()


def send(fd: int, message: Any) -> None:
    """One frame: a length and a marshalled value."""
    body = marshal.dumps(message)
    data = memoryview(_HEAD.pack(len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


class Frames:
    """The frames that arrive at a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = bytearray()

    def _fill(self, count: int) -> bool:
        while len(self._bytes) < count:
            more = os.read(self._fd, 1 << 16)
            if not more:
                return False
            self._bytes += more
        return True

    def next(self) -> Any:
        """The next frame; None at the end of the stream."""
        if not self._fill(_HEAD.size):
            return None
        length = _HEAD.unpack_from(self._bytes)[0] + _HEAD.size
        if not self._fill(length):
            return None
        message = marshal.loads(memoryview(self._bytes)[_HEAD.size : length])
        del self._bytes[:length]
        return message


def serve(source: int, target: int, door: Door) -> None:
    """Answer frames (number, expected digest or empty, image, steps, main first) until the stream ends.

    An answer is (number, digest) where it is the expected one, else (number, results, work, final state).
    """
    executor = Executor(door)
    frames = Frames(source)
    send(target, ("ready", os.uname().release))
    while (frame := frames.next()) is not None:
        number, expected, image, steps, main_first = frame
        answer = executor.run(image, steps, main_first)
        found = digest(answer)
        send(target, (number, found) if found == expected else (number, *answer))
    executor.close()


if __name__ == "__main__":
    if len(sys.argv) == 2:  # a port with both directions
        port = os.open(sys.argv[1], os.O_RDWR)
        serve(port, port, LinuxDoor())
    else:
        stream = os.dup(1)
        os.dup2(2, 1)
        serve(0, stream, LinuxDoor())
