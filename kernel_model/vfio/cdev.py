"""The VFIO character device: /dev/vfio/devices/vfioN.

Mirrors drivers/vfio/device_cdev.c and the file operations in vfio_main.c. A descriptor answers EINVAL to everything but
BIND until it is bound. The file lives while a descriptor or a mapping of it does; then the device is closed.
"""

from __future__ import annotations

import ctypes
import errno

from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, MappedRegion, SystemCall
from kernel_model.iommufd.ctx import Context, ctx_from_fd
from kernel_model.vfio.device import VfioDevice
from kernel_model.vfio.feature import device_feature
from uapi.behaviours import has
from uapi.cstruct import offsetofend
from uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_ATTACH_PASID,
    VFIO_DEVICE_BIND_FLAG_TOKEN,
    VFIO_DEVICE_BIND_IOMMUFD,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_PASID,
    VFIO_DEVICE_FEATURE,
    vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd,
    vfio_device_detach_iommufd_pt,
)

_BIND, _ATTACH, _DETACH = (
    ioctl.number for ioctl in (VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT)
)
_FEATURE = VFIO_DEVICE_FEATURE.number
_OUT_DEVID = offsetofend(vfio_device_bind_iommufd, "out_devid") - 4
_PT_ID = offsetofend(vfio_device_attach_iommufd_pt, "pt_id") - 4


class VfioMapping:
    """A mapping of a device: it holds the file."""

    def __init__(self, file: VfioDeviceFile, region: MappedRegion) -> None:
        self._file = file
        self._region = region
        self.read = region.read
        self.write = region.write

    def unmapped(self) -> None:
        self._region.unmapped()
        self._file.put()


class VfioDeviceFile(FileDescription):
    """`struct vfio_device_file`: one open of the node."""

    def __init__(self, device: VfioDevice) -> None:
        self.device = device
        self.ctx: Context | None = None
        self._position = 0
        self._holders = 1
        release = device.kernel.release
        self._bind_copies_struct = has(release, "bind-copies-struct")
        self._has_pasids = has(release, "attach-pasid")

    # -- file operations ---------------------------------------------------------------------------------------------

    def ioctl(self, call: SystemCall, request: int, arg: int) -> int:
        if request == _BIND:
            return self._bind(call, arg)
        self._check_access()
        if request == _ATTACH:
            return self._attach(call, arg)
        if request == _DETACH:
            return self._detach(call, arg)
        if request == _FEATURE:
            return device_feature(self.device, call, arg)
        return self.device.ioctl(call, request, arg)

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        self._check_access()
        data = self.device.read(count, self._position if offset is None else offset)
        if offset is None:
            self._position += len(data)
        return data

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        self._check_access()
        done = self.device.write(data, self._position if offset is None else offset)
        if offset is None:
            self._position += done
        return done

    def mmap(self, call: SystemCall, length: int, offset: int, prot: int, flags: int) -> MappedRegion:
        self._check_access()
        mapping = VfioMapping(self, self.device.mmap(length, offset, flags))
        self._holders += 1
        return mapping

    def release(self) -> None:
        self.put()

    def put(self) -> None:
        """One descriptor or mapping less; the last one unbinds."""
        self._holders -= 1
        if self._holders == 0:
            self._unbind()

    def _check_access(self) -> None:
        if self.ctx is None:
            raise KernelError(errno.EINVAL, "the descriptor is not bound to an iommufd")

    # -- BIND --------------------------------------------------------------------------------------------------------

    def _bind(self, call: SystemCall, arg: int) -> int:
        """vfio_df_ioctl_bind_iommufd().

        EFAULT, EINVAL, E2BIG: the struct and its flags. EINVAL: this descriptor is bound. EFAULT, EINVAL: the token.
        EBADF, EBADFD: the iommufd. Then `VfioDevice.open`. EFAULT for the reply, with nothing bound.
        """
        bind = self._copy_bind(call, arg)
        flags = VFIO_DEVICE_BIND_FLAG_TOKEN if self._bind_copies_struct else 0
        if bind.iommufd < 0 or bind.flags & ~flags:
            raise KernelError(errno.EINVAL, f"iommufd {bind.iommufd}, flags {bind.flags:#x}")
        if self.ctx is not None:
            raise KernelError(errno.EINVAL, "the descriptor is bound already")
        token = None
        if bind.flags & VFIO_DEVICE_BIND_FLAG_TOKEN:
            token = bytes(call.copy_from_user(bind.token_uuid_ptr, 16))
        self.device.match_token_uuid(token)
        ctx = ctx_from_fd(call, bind.iommufd)
        devid = self.device.open(ctx)
        try:
            call.copy_to_user(arg + _OUT_DEVID, bytes(ctypes.c_uint32(devid)))
        except KernelError:
            self.device.close()
            raise
        ctx.get()
        self.ctx = ctx
        self.device.cdev_opened = True
        return 0

    def _copy_bind(self, call: SystemCall, arg: int) -> vfio_device_bind_iommufd:
        minimum = _OUT_DEVID + 4
        size = call.get_u32(arg)
        if size < minimum:
            raise KernelError(errno.EINVAL, f"argsz {size} is less than {minimum}")
        known = ctypes.sizeof(vfio_device_bind_iommufd) if self._bind_copies_struct else minimum
        if size > known and self._bind_copies_struct:
            call.check_zeroed(arg + known, size - known)
        size = min(size, known)
        bind = vfio_device_bind_iommufd()
        memoryview(bind).cast("B")[:size] = call.copy_from_user(arg, size)
        return bind

    def _unbind(self) -> None:
        """vfio_df_unbind_iommufd()."""
        if self.ctx is None:
            return
        self.device.close()
        ctx, self.ctx = self.ctx, None
        ctx.put()
        self.device.cdev_opened = False

    # -- ATTACH, DETACH ----------------------------------------------------------------------------------------------

    def _attach(self, call: SystemCall, arg: int) -> int:
        """vfio_df_ioctl_attach_pt().

        EFAULT, EINVAL: the struct. Then the errnos of `device_attach` or `device_replace`. A reply that cannot be
        written is EFAULT and detaches the device's own requests, even where a PASID was attached.
        """
        attach = vfio_device_attach_iommufd_pt()
        self._copy(call, arg, attach, "pt_id", VFIO_DEVICE_ATTACH_PASID)
        if attach.flags & VFIO_DEVICE_ATTACH_PASID:
            hwpt_id = self.device.pasid_attach_ioas(attach.pasid, attach.pt_id)
        else:
            hwpt_id = self.device.attach_ioas(attach.pt_id)
        try:
            call.copy_to_user(arg + _PT_ID, bytes(ctypes.c_uint32(hwpt_id)))
        except KernelError:
            self.device.detach_ioas()
            raise
        return 0

    def _detach(self, call: SystemCall, arg: int) -> int:
        """vfio_df_ioctl_detach_pt(). EFAULT, EINVAL: the struct. Otherwise success."""
        detach = vfio_device_detach_iommufd_pt()
        self._copy(call, arg, detach, "flags", VFIO_DEVICE_DETACH_PASID)
        if detach.flags & VFIO_DEVICE_DETACH_PASID:
            self.device.pasid_detach_ioas(detach.pasid)
        else:
            self.device.detach_ioas()
        return 0

    def _copy(
        self,
        call: SystemCall,
        arg: int,
        cmd: vfio_device_attach_iommufd_pt | vfio_device_detach_iommufd_pt,
        last: str,
        pasid_flag: int,
    ) -> None:
        """Read `cmd` up to `last`, and its pasid if the flag says so. EFAULT; EINVAL: argsz, unknown flags."""
        minimum = offsetofend(type(cmd), last)
        block = memoryview(cmd).cast("B")
        block[:minimum] = call.copy_from_user(arg, minimum)
        if cmd.argsz < minimum:
            raise KernelError(errno.EINVAL, f"argsz {cmd.argsz} is less than {minimum}")
        if cmd.flags & ~(pasid_flag if self._has_pasids else 0):
            raise KernelError(errno.EINVAL, f"flags {cmd.flags:#x}")
        if cmd.flags & pasid_flag:
            end = offsetofend(type(cmd), "pasid")
            if cmd.argsz < end:
                raise KernelError(errno.EINVAL, f"argsz {cmd.argsz} leaves no room for a PASID")
            block[minimum:end] = call.copy_from_user(arg + minimum, end - minimum)
