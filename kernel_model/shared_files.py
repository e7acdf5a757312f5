"""Pages of shared files: memfds, shared anonymous memory, hugetlbfs.

A page of a file is one page however often it is mapped, so it has one physical address, by (device, inode, offset).
Every file with pinned pages owns a window of the physical address space; two mappings of one memfd, or a mapping and an
`IOMMU_IOAS_MAP_FILE`, meet there.

The file is mapped by the model too, so DMA copies directly. Before each access the file's size is asked, because a
truncated mapping would raise SIGBUS; a real pin would have kept the page.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from fakedev.memory import BusAbort, PhysicalMemory
from kernel_model.errors import KernelError
from kernel_model.placement import Placement
from kernel_model.process import PAGE_SIZE


class SharedFile:
    """A file with pinned pages, and its window."""

    def __init__(self, fd: int, window: int) -> None:
        self.fd = fd
        self.window = window
        self.users = 0
        self._map: mmap.mmap | None = None
        self._whole = memoryview(b"")

    def view(self, offset: int, length: int) -> memoryview | None:
        end = offset + length
        size = os.fstat(self.fd).st_size
        if end > (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE:
            raise BusAbort(self.window | offset)
        if end > len(self._whole):
            try:
                self._map = mmap.mmap(self.fd, (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE)
            except OSError:
                return None
            self._whole = memoryview(self._map)
        return self._whole[offset:end]

    def read(self, offset: int, length: int) -> bytes:
        view = self.view(offset, length)
        if view is not None:
            return bytes(view)
        try:
            return os.pread(self.fd, length, offset).ljust(length, b"\0")
        except OSError as error:
            raise BusAbort(self.window | offset) from error

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = self.view(offset, len(data))
        if view is not None:
            view[:] = data
            return
        try:  # a sealed file, or one that this process may only read: what a device writes there is lost
            os.pwrite(self.fd, data, offset)
        except OSError as error:
            raise BusAbort(self.window | offset) from error

    def take(self, fd: int) -> None:
        """Another descriptor for the file: keep the one that can write."""
        if _writes(fd) and not _writes(self.fd):
            self.fd, fd = fd, self.fd
            self._whole = memoryview(b"")
        os.close(fd)

    def close(self) -> None:
        self._whole.release()
        self._map = None
        os.close(self.fd)


class SharedFiles:
    """All files with pinned pages."""

    def __init__(self, memory: PhysicalMemory, placement: Placement) -> None:
        self._memory = memory
        self._files: dict[tuple[int, int], SharedFile] = {}
        self._window_size = size = placement.file_size
        self._free = list(range(placement.first_file + (placement.files - 1) * size, placement.first_file - 1, -size))

    def get(self, key: tuple[int, int], fd: int, end: int) -> SharedFile:
        """The window of the file `key` = (device, inode), used up to byte `end`, one user more; takes over `fd`.

        ENOMEM: limits of the model, 1,024 files at a time and of each 2 TiB, or on an Arm board 8 GiB.
        """
        found = self._files.get(key)
        if end > self._window_size or (found is None and not self._free):
            os.close(fd)
            raise KernelError(errno.ENOMEM, f"the model has no room for {end:#x} bytes of another shared file")
        if found is None:
            found = SharedFile(fd, self._free.pop())
            self._files[key] = found
            self._memory.add_window(found.window, self._window_size, found)
        else:
            found.take(fd)
        found.users += 1
        return found

    def put(self, file: SharedFile) -> None:
        file.users -= 1
        if file.users == 0:
            for key, value in self._files.items():
                if value is file:
                    del self._files[key]
                    break
            self._memory.remove_window(file.window)
            self._free.append(file.window)
            file.close()

    def __len__(self) -> int:
        return len(self._files)


def _writes(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
