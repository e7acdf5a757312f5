"""Where bad input is thrown: a kernel, memory of every kind, and what must be true during and after.

`World.run` carries out one call of `bad_input_calls`. A call may end in `OSError`; anything else is a failure, as is a
call that takes too long, a broken invariant after it, and whatever is left once everything is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import tempfile
import time
from typing import Any

from bad_input_calls import ARENA_PAGES, BY_NAME, PAGE, SLOTS, U64

from conformance.drivers import vfio
from kernel_model.door import ModelFile, ModelMapping
from kernel_model.errors import KernelError
from kernel_model.iommufd.ctx import Context
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.pages import Pages
from kernel_model.kernel import Kernel
from kernel_model.vfs import Directory, Special
from uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC
from uapi.iommufd_test import IOMMU_TEST_CMD, IOMMU_TEST_OP_CREATE_ACCESS

#: Seconds of processor time that one call may take. Generous: what hangs takes minutes.
SLOW = 3.0
#: DMA may reach what lies behind a mapping's first page, so what lies behind must be ours.
_SLACK = 4 << 20
_MAPS = 3


class Broken(Exception):
    """What must hold does not."""


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: what for fd, what in found.items() if not what.startswith(f"/proc/{os.getpid()}/fd")}


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_RESERVE, _FIXED, _SHARED_ANONYMOUS, _PRIVATE_ANONYMOUS = 0x4022, 0x10, 0x21, 0x4022


class Memory:
    """Memory of every kind, with nothing but refusal around it: what overruns one kind meets no page of ours."""

    SHARED, FILE, BIG, SIZE = 1 << 30, 2 << 30, 4 << 30, 16 << 30

    def __init__(self, file: int) -> None:
        self.base: int = _libc.mmap(None, self.SIZE, 0, _RESERVE, -1, 0)
        self._put(self.SHARED, 8 * PAGE, _SHARED_ANONYMOUS)
        self._put(self.FILE, 4 * PAGE, 0x1, file)
        self._put(self.BIG, 64 << 20, _PRIVATE_ANONYMOUS)

    def _put(self, offset: int, length: int, flags: int, fd: int = -1) -> None:
        if _libc.mmap(self.base + offset, length, 3, flags | _FIXED, fd, 0) != self.base + offset:
            raise OSError(ctypes.get_errno(), "mmap")

    def page(self, index: int, kind: str) -> None:
        """Make a page of the first region "rw", "ro", "none" or a "hole"."""
        if kind == "hole":
            _libc.munmap(self.base + index * PAGE, PAGE)
            return
        self._put(index * PAGE, PAGE, _PRIVATE_ANONYMOUS)
        _libc.mprotect(self.base + index * PAGE, PAGE, {"rw": 3, "ro": 1, "none": 0}[kind])

    def close(self) -> None:
        _libc.munmap(self.base, self.SIZE)


class World:
    """One kernel and its one unruly client (with a second process now and then)."""

    def __init__(self, machine: str) -> None:
        self.descriptors = open_descriptors()
        self.kernel = Kernel(machine)
        if "0000:00:10.0" in self.kernel.devices:
            vfio.take(self.kernel, "0000:00:10.0")
        self.nodes = sorted(_paths(self.kernel.files.root, ""))
        self.idle = self.snapshot()
        self.files: list[ModelFile | None] = [None] * SLOTS
        self.stale: list[ModelFile] = []
        self.spare: list[int] = []
        self.maps: list[ModelMapping | None] = [None] * _MAPS
        self.buffers: list[Any] = [self.kernel.buffer(16 * PAGE + _SLACK), None, None]
        self.slices: list[memoryview] = []
        self.memfds = [-1, -1, -1]
        self.client: Any = None
        self.remote: list[Any] = []
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.file.truncate(4 * PAGE)
        self.memory = Memory(self.file.fileno())
        for page in range(ARENA_PAGES):
            self.do_page(page, "rw")
        for page, kind in ((8, "ro"), (9, "ro"), (11, "none"), (13, "hole"), (17, "hole"), (20, "none")):
            self.do_page(page, kind)
        self.pipe, self._pipe_end = os.pipe()
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.sealed, 4 * PAGE)
        fcntl.fcntl(self.sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)

        mm = self.kernel.process.mm
        self._write = mm.write
        mm.write = self._fenced_write  # type: ignore[method-assign]

    def _fenced_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """What is not the client's is Python's own memory, which a wild pointer must not reach: it is not there."""
        end = address + len(data)
        own = [(self.memory.base, self.memory.base + Memory.SIZE)]
        own += [(one._address, one._address + one.length) for one in self.maps if one is not None]
        own += [(one.address, one.end) for one in self.kernel._buffers._buffers]
        if data and end < 1 << 47 and not any(first <= address and end <= last for first, last in own):
            raise KernelError(errno.EFAULT, f"{address:#x} is not the client's")
        self._write(address, data)

    # -- what is there -----------------------------------------------------------------------------------------------

    def contents(self) -> tuple[list[str], list[dict[str, list[int]]], list[list[tuple[int, int]]]]:
        """What the generator asks: of each slot the kind of file, and what its context holds."""
        found: list[dict[str, list[int]]] = []
        areas: list[list[tuple[int, int]]] = []
        for file in self.files:
            ids: dict[str, list[int]] = {}
            mapped: list[tuple[int, int]] = []
            if file is not None:
                try:
                    description = self.kernel.lookup(file.fileno())
                except OSError:
                    description = None
                ctx = description if isinstance(description, Context) else getattr(description, "ctx", None)
                for number, obj in ctx.objects._objects.items() if ctx is not None else ():
                    ids.setdefault(type(obj).__name__, []).append(number)
                    if isinstance(obj, Ioas):
                        mapped += [(area.iova, area.length) for area in obj.iopt.areas.values()]
            found.append(ids)
            areas.append(mapped)
        return [_kind(file.path) if file is not None else "" for file in self.files], found, areas

    def address(self, pointer: Any) -> int:
        if isinstance(pointer, int):
            return pointer & U64
        kind, offset = pointer
        base = {"rw": 0, "ro": 8, "none": 11, "hole": 13, "edge": 13, "none-edge": 11}.get(kind)
        if base is not None:
            return self.memory.base + base * PAGE + (offset if "edge" not in kind else -(offset % PAGE))
        if kind == "buffer":
            chosen = next((one for one in self.buffers if one is not None), None)
            return chosen.address + offset if chosen is not None else 0
        if kind == "bar":
            chosen = next((one for one in self.maps if one is not None), None)
            return chosen._address + offset if chosen is not None else PAGE
        return self.memory.base + {"shared": Memory.SHARED, "file": Memory.FILE, "big": Memory.BIG}[kind] + offset

    def number(self, value: Any) -> int:
        """A field's value: an int, a pointer or a descriptor."""
        if isinstance(value, int):
            return value
        kind, index = value
        if kind == "slot":
            if index < 0:
                open_files = [file for file in self.files if file is not None and file.path == "/dev/iommu"]
                return open_files[0].fileno() if open_files else -1
            file = self.files[index]
            return file.fileno() if file is not None else -1
        if kind == "memfd":
            return self.memfds[index]
        fds = {"pipe": self.pipe, "file_fd": self.file.fileno(), "eventfd": self.eventfd, "sealed": self.sealed}
        if kind in fds:
            return fds[kind]
        return self.address(value)

    # -- carrying out ------------------------------------------------------------------------------------------------

    def run(self, call: list[Any]) -> str:
        """One call; how it ended, in words."""
        name, *args = call
        before = time.thread_time()
        try:
            result = getattr(self, "do_" + name)(*args)
            ended = "done" if result is None else f"= {result}"
        except OSError as error:
            if type(error.errno) is not int or error.errno not in errno.errorcode:
                raise Broken(f"an OSError without an errno: {error!r}") from error
            ended = f"{errno.errorcode[error.errno]}: {getattr(error, 'why', '')}"
        spent = time.thread_time() - before
        if spent > SLOW:
            raise Broken(f"the call took {spent:.1f} s of processor time")
        self.check()
        return ended

    def _file(self, slot: int) -> ModelFile:
        file = self.files[slot]
        if file is None:
            raise OSError(errno.EBADF, "nothing is open there")
        return file

    def _put(self, slot: int, file: ModelFile) -> None:
        old, self.files[slot] = self.files[slot], file
        if old is not None:
            old.close()

    def do_open(self, slot: int, path: str, flags: int) -> None:
        self._put(slot, self.kernel.open(path, flags))

    def do_open_node(self, slot: int, index: int, flags: int, device: bool) -> str:
        nodes = [path for path in self.nodes if path.startswith("/dev/") or not device] or self.nodes
        if device:
            nodes = [path for path in nodes if path != "/dev/iommu"] or nodes
        path = nodes[index % len(nodes)]
        self._put(slot, self.kernel.open(path, flags))
        return path

    def do_raw(self, slot: int, number: int, arg: Any) -> int:
        address = self.number(arg) & U64
        result = self._file(slot).ioctl(number, address)
        self._keep_descriptor(number, address)
        return result

    def do_ioctl(self, slot: int, *rest: Any) -> str:
        return self._issue(self._file(slot), *rest)

    def _issue(
        self, file: Any, name: str, number: int, fields: dict[str, Any], pokes: list[Any], tail: list[Any], place: Any
    ) -> str:
        struct = BY_NAME[name].struct
        assert struct is not None
        arg = struct(**{key: self.number(value) for key, value in fields.items()})
        if name == "IOMMU_IOAS_MAP_FILE" and self._own_socket(arg.fd):
            raise OSError(errno.EBADF, "a context that maps itself never ends, here as there")
        block = bytearray(
            bytes(arg) + b"".join((self.number(word) & 0xFFFFFFFF).to_bytes(4, "little") for word in tail)
        )
        for offset, value in pokes:
            if offset < len(block):
                block[offset] = value
        if place == ["object"]:
            result = file.ioctl(number, block)
        else:
            address = self.address(place)
            self._store(address, bytes(block))
            result = file.ioctl(number, address)
        if file not in self.remote:
            self._keep_descriptor(number, address if place != ["object"] else block)
        return f"{result} {bytes(block[:48]).hex(' ', -4)}"

    def _keep_descriptor(self, number: int, reply: int | bytearray) -> None:
        """A fault queue is a descriptor, and so is an access of the mock driver: use it where a slot is free."""
        where = {IOMMU_FAULT_QUEUE_ALLOC.number: 12, IOMMU_TEST_CMD.number: 16}.get(number & 0xFFFF_FFFF)
        if where is None:
            return
        if isinstance(reply, int):
            reply = bytearray(self.kernel.process.mm.read(reply, where + 4))
        if where == 16 and int.from_bytes(reply[4:8], "little") != IOMMU_TEST_OP_CREATE_ACCESS:
            return
        self.spare.append(int.from_bytes(reply[where : where + 4], "little"))
        free = [slot for slot, old in enumerate(self.files) if old is None]
        if free:
            self.files[free[0]] = self.kernel.adopt(self.spare.pop())

    def _own_socket(self, fd: int) -> bool:
        try:
            return self.kernel.lookup(fd) is not None
        except OSError:
            return False

    def _store(self, address: int, data: bytes) -> None:
        """Put bytes in memory if there is memory, without asking whether."""
        with contextlib.suppress(OSError):
            self.kernel.process.mm.write(address, data)

    def do_read(self, slot: int, count: int) -> int:
        return len(self._file(slot).read(count))

    def do_pread(self, slot: int, count: int, offset: int) -> int:
        return len(self._file(slot).pread(count, offset))

    def do_write(self, slot: int, data: str) -> int:
        return self._file(slot).write(bytes.fromhex(data))

    def do_pwrite(self, slot: int, data: str, offset: int) -> int:
        return self._file(slot).pwrite(bytes.fromhex(data), offset)

    def do_read_to(self, slot: int, pointer: Any, count: int) -> int:
        return self._file(slot).read_to(self.address(pointer), count)

    def do_write_from(self, slot: int, pointer: Any, count: int) -> int:
        return self._file(slot).write_from(self.address(pointer), count)

    def do_poll(self, slot: int, events: int) -> int:
        return self._file(slot).poll(events)

    def do_mmap(self, slot: int, length: int, offset: int, prot: int, flags: int) -> int:
        index = next((index for index, one in enumerate(self.maps) if one is None), 0)
        made = self._file(slot).mmap(length, offset, prot, flags)
        self.do_map_close(index)
        self.maps[index] = made
        return made.length

    def do_map_io(self, index: int, kind: str, offset: int, width: int, value: int) -> int | None:
        mapping = self.maps[index]
        if mapping is None:
            return None
        try:
            if kind == "r":
                return mapping.read(offset, width)
            mapping.write(offset, width, value)
        except ValueError:
            pass  # an access that no processor makes: the door's own refusal
        return None

    def do_map_raw(self, index: int, offset: int, value: int) -> None:
        mapping = self.maps[index]
        if mapping is not None and offset + 4 <= mapping.length:
            mapping.view[offset : offset + 4] = value.to_bytes(4, "little")

    def do_map_close(self, index: int) -> None:
        mapping, self.maps[index] = self.maps[index], None
        if mapping is not None:
            mapping.close()

    def do_dma(self, index: int, iova: int, inside: int, count: int, command: int) -> None:
        mapping = self.maps[index]
        if mapping is None or mapping.length < 0x1000:
            return
        for file in self.files:
            if file is not None and _kind(file.path) == "vfio":
                with contextlib.suppress(OSError):
                    file.pwrite(b"\x06\x01", (7 << 40) + 4)
        source, destination = (inside, iova) if command & 2 else (iova, inside)
        for register, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, command)):
            mapping.write(register, 8, value & U64)

    def do_close(self, slot: int) -> None:
        file, self.files[slot] = self.files[slot], None
        if file is not None:
            file.close()

    def do_store(self, path: str, text: str) -> None:
        with self.kernel.open(path, os.O_WRONLY) as file:
            file.write(text.encode())

    def do_dup(self, slot: int, close: bool) -> None:
        self.spare.append(os.dup(self._file(slot).fileno()))
        if close:
            self.do_close(slot)
        elif len(self.spare) > 4:
            os.close(self.spare.pop(0))

    def do_os_close(self, slot: int) -> None:
        """Behind the model's back; the File goes on being used, and may reach what gets its number next."""
        file = self._file(slot)
        if file in self.stale:
            return
        with contextlib.suppress(OSError):
            os.close(file.fileno())
        self.stale.append(file)
        self.files[slot] = None
        with contextlib.suppress(OSError):
            file.ioctl(0x3B80, 0)

    def do_buffer(self, index: int, length: int) -> None:
        self.do_buffer_close(index, False)
        self.buffers[index] = self.kernel.buffer(length + _SLACK)

    def do_buffer_close(self, index: int, sliced: bool) -> None:
        buffer, self.buffers[index] = self.buffers[index], None
        if buffer is None:
            return
        if sliced:
            self.slices.append(buffer.view[:1])
        with contextlib.suppress(BufferError):
            buffer.close()

    def do_memfd(self, index: int, length: int) -> None:
        if self.memfds[index] >= 0:
            os.close(self.memfds[index])
        self.memfds[index] = os.memfd_create(f"memfd{index}")
        os.ftruncate(self.memfds[index], length)

    def do_truncate(self, index: int, length: int) -> None:
        if self.memfds[index] >= 0:
            os.ftruncate(self.memfds[index], length)

    def do_page(self, page: int, kind: str) -> None:
        self.memory.page(page, kind)

    def do_poke(self, pointer: Any, words: list[int]) -> None:
        self._store(self.address(pointer), b"".join(word.to_bytes(8, "little") for word in words))

    def do_client(self, slot: int, action: str, arg: Any) -> Any:
        if action == "exit":
            if self.client is not None:
                self.client.exit()
            self.client, self.remote = None, []
            return None
        if self.client is None:
            self.client = self.kernel.spawn()
        if action == "give":
            self.remote.append(self.client.receive(self._file(slot)))
        elif action == "open":
            self.remote.append(self.client.open("/dev/iommu"))
        elif action == "rlimit":
            self.client.setrlimit(8, arg, arg)
        elif action == "setuid":
            self.client.setuid(arg & 0xFFFF)
        elif self.remote:
            remote = self.remote[slot % len(self.remote)]
            if arg[0] == "raw":
                return remote.ioctl(arg[2] if arg[2] != IOMMU_FAULT_QUEUE_ALLOC.number else 0, self.number(arg[3]))
            return self._issue(remote, *arg[2:-1], ["object"])
        return None

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Between two calls: no half-made object, and every account equal to the pins it pays for."""
        kernel = self.kernel
        if kernel._depth or kernel.queue:
            raise Broken(f"the kernel was left at depth {kernel._depth} with {len(kernel.queue)} pieces of work")
        pages: dict[int, Pages] = {}
        for ctx in kernel.contexts:
            for number, obj in ctx.objects._objects.items():
                if obj is None:
                    raise Broken(f"id {number} is half-made")
                if obj.users < 1:
                    raise Broken(f"object {number} has {obj.users} users")
                if isinstance(obj, Ioas):
                    self._check_ioas(obj, pages)
        for key, one in pages.items():
            areas = sum(
                area.pages is one
                for ctx in kernel.contexts
                for ioas in ctx.objects.each(Ioas)
                for area in ioas.iopt.areas.values()
            )
            if one.users != areas:
                raise Broken(f"pages {key:#x} have {one.users} users and {areas} areas")
        for mm in {id(one.process.mm): one.process.mm for one in pages.values()}.values():
            for name, modes in (("locked_vm", (2,)),):
                expected = sum(o.npinned for o in pages.values() if o.process.mm is mm and o.account_mode in modes)
                if getattr(mm, name) != expected:
                    raise Broken(f"{name} is {getattr(mm, name)}, the pins are {expected}")

    def _check_ioas(self, ioas: Ioas, pages: dict[int, Pages]) -> None:
        last = -1
        for iova, area in ioas.iopt.areas.items():
            if area.iova != iova or iova <= last or area.last < iova or area.last > U64:
                raise Broken(f"areas of IOAS {ioas.id} overlap at {iova:#x}")
            if area.pinned != bool(ioas.iopt.domains):
                raise Broken(f"the area at {iova:#x} is {'' if area.pinned else 'not '}pinned, "
                             f"with {len(ioas.iopt.domains)} domains")  # fmt: skip
            if any(start <= area.last and end >= iova for start, end, _ in ioas.iopt.reserved):
                raise Broken(f"the area at {iova:#x} lies in a reserved range")
            last = area.last
            pages[id(area.pages)] = area.pages

    def snapshot(self) -> dict[str, Any]:
        """What an idle kernel has."""
        kernel = self.kernel
        machine = kernel.machine
        mm = kernel.process.mm
        groups = {id(device.group): device.group for device in kernel.devices.values() if device.group is not None}
        return {
            "contexts": len(kernel.contexts),
            "open files": len(kernel._descriptors),
            "mappings": len(kernel.mappings) + len(kernel.watched_mappings),
            "table pages": kernel.pages.live,
            "TLB entries": machine.tlb_entries,
            "pinned_vm": mm.pinned_vm,
            "locked_vm": mm.locked_vm,
            "users' locked_vm": {uid: user.locked_vm for uid, user in kernel._users.items() if user.locked_vm},
            "shared files": len(kernel.shared_files),
            "pinned buffers": sum(buffer.pins for buffer in kernel._buffers._buffers),
            "processes": len(kernel._processes),
            # But for the places of clients, which are made at first use and kept.
            "windows": len(kernel.memory._windows) - sum(len(one.mm.places) for one in kernel.processes()),
            "owned groups": sum(group.owner is not None for group in groups.values()),
            "attached groups": sum(len(group.pasid_array) for group in groups.values()),
            "foreign domains": sum(group.domain is not group.default_domain for group in groups.values()),
        }

    def end(self) -> None:
        """Close everything and see that nothing is left."""
        for slot in range(SLOTS):
            self.do_close(slot)
        for fd in self.spare:
            os.close(fd)
        if self.client is not None:
            self.client.exit()
        for index in range(_MAPS):
            self.do_map_close(index)
        with self.kernel.entered():
            pass
        for index in range(3):
            self.do_buffer_close(index, False)
        self.slices.clear()
        left = {name: (value, self.idle[name]) for name, value in self.snapshot().items() if value != self.idle[name]}
        if left:
            raise Broken("left when all is closed (now, before): " + ", ".join(f"{k} {v}" for k, v in left.items()))
        if self.kernel._buffers._buffers:
            raise Broken(f"{len(self.kernel._buffers._buffers)} closed buffers are still there")
        self.kernel.close()
        self.memory.close()
        self.file.close()
        for fd in [*self.memfds, self.pipe, self._pipe_end, self.eventfd, self.sealed]:
            if fd >= 0:
                os.close(fd)
        now = open_descriptors()
        if now.keys() != self.descriptors.keys():
            extra = {fd: what for fd, what in now.items() if fd not in self.descriptors}
            raise Broken(f"descriptors left: {extra}")


def _kind(path: str) -> str:
    if path == "/dev/iommu":
        return "iommu"
    if path.startswith("/dev/vfio"):
        return "vfio"
    return "sysfs" if path.startswith("/sys") else "queue"


def _paths(directory: Directory, prefix: str) -> list[str]:
    found = []
    for name, node in directory.items():
        if isinstance(node, Directory):
            found += _paths(node, f"{prefix}/{name}")
        elif isinstance(node, Special):
            found.append(f"{prefix}/{name}")
    return found
