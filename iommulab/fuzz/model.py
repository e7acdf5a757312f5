"""The model's side of a fuzzing run: a kernel model behind the executor, booted anew where it broke."""

from __future__ import annotations

import contextlib
import os
import traceback
from dataclasses import dataclass

from iommulab.fuzz.doors import POLL_EVENTS, Devices, Mapping
from iommulab.fuzz.executor import Answer, Executor
from iommulab.fuzz.program import Compiled, Program
from kernel_model.door import ModelFile
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU


class ModelDoor:
    """A kernel model in this process, by its descriptors. Exceptions other than OSError come through."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        #: The model's refusals of ioctls, in order, with its own words; None where a call succeeded.
        self.why: list[OSError | None] = []
        self._devices = Devices(kernel)

    def open(self) -> int:
        return self.kernel.open(DEV_IOMMU).fileno()

    def open_device(self, number: int) -> int:
        return self._devices.open(number)

    def _file(self, fd: int) -> ModelFile:
        return ModelFile(self.kernel, fd, "")

    def ioctl(self, fd: int, request: int, address: int) -> int:
        try:
            result = self._file(fd).ioctl(request, address)
        except OSError as error:
            self.why.append(error)
            return -(error.errno or 0)
        self.why.append(None)
        return result

    def read(self, fd: int, count: int) -> bytes | int:
        try:
            return self._file(fd).read(count)
        except OSError as error:
            return -(error.errno or 0)

    def write(self, fd: int, data: bytes) -> int:
        try:
            return self._file(fd).write(data)
        except OSError as error:
            return -(error.errno or 0)

    def pread(self, fd: int, count: int, offset: int) -> bytes | int:
        try:
            return self._file(fd).pread(count, offset)
        except OSError as error:
            return -(error.errno or 0)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        try:
            return self._file(fd).pwrite(data, offset)
        except OSError as error:
            return -(error.errno or 0)

    def poll(self, fd: int) -> int:
        return self._file(fd).poll(POLL_EVENTS)

    def close(self, fd: int) -> int:
        os.close(fd)
        with self.kernel.entered():  # the last close takes effect now, as close(2) returns
            pass
        return 0

    def mmap(self, fd: int, length: int, offset: int, prot: int, flags: int) -> Mapping | int:
        try:
            return self._file(fd).mmap(length, offset, prot, flags)
        except OSError as error:
            return -(error.errno or 0)

    def pinned(self) -> int:
        return self.kernel.status("VmPin")

    def signalled(self) -> None:
        with self.kernel.entered():  # the model notices at its next call, and a read of the eventfd is none
            pass


#: What the model says of itself where a real kernel warns and leaks. A mock device that dies with a PASID attached
#: (iommufd_object_destroy_user() finds another user of the device).
WARNED = ("is destroyed by its holder with",)


@dataclass(frozen=True, slots=True)
class Broken:
    """The model raised what no client may see: the exception, and its traceback."""

    error: str
    trace: str

    @property
    def excused(self) -> bool:
        """Whether a real kernel warns of a bug in itself here, so that there is nothing to compare."""
        return any(text in self.error for text in WARNED)


class ModelSide:
    """Runs programs on the model of a release, on a machine. Context manager."""

    def __init__(self, version: str, machine: str = "mock") -> None:
        self._version = version
        self.machine = machine
        self._boot()

    def _boot(self) -> None:
        self._door = ModelDoor(Kernel(self.machine, self._version))
        self._executor = Executor(self._door)

    def run(self, program: Program, compiled: Compiled) -> Answer | Broken:
        """The model's answer."""
        self._door.why.clear()
        try:
            return self._executor.run(compiled.image, compiled.steps, program.main_first)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.name}"
            broken = Broken(f"{type(error).__name__} in {where}: {error}", traceback.format_exc())
            self._executor.abandon()
            with contextlib.suppress(Exception):  # what is broken may not close
                self._door.kernel.close()
            self._boot()
            return broken

    def reasons(self, program: Program) -> list[str]:
        """The model's words for each ioctl of the program that was run last, "" where it succeeded."""
        told = iter(self._door.why)
        return [str(next(told, None) or "") if call.is_ioctl else "" for call in program.calls]

    def close(self) -> None:
        self._executor.close()
        self._door.kernel.close()

    def __enter__(self) -> ModelSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
