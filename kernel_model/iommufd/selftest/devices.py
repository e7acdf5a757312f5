"""Operations that make mock devices, after drivers/iommu/iommufd/selftest.c."""

from __future__ import annotations

from kernel_model.errors import KernelError
from kernel_model.iommu.mock.attach import MockDevice
from kernel_model.iommufd.attach import NO_PASID, device_attach, device_detach, device_replace
from kernel_model.iommufd.ctx import Context
from kernel_model.iommufd.device import IommufdDevice, device_bind, device_unbind
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.selftest.operations import TestCommand, operation
from uapi import iommufd_test as abi

_DEVICE_FLAGS = ("MOCK_FLAGS_DEVICE_NO_DIRTY", "MOCK_FLAGS_DEVICE_HUGE_IOVA", "MOCK_FLAGS_DEVICE_PASID")


class Selftest(Object):
    """`struct selftest_obj`: a mock device and its binding, both of which go with it."""

    __slots__ = ("idev", "mock")

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.idev: IommufdDevice | None = None
        self.mock: MockDevice | None = None

    def destroy(self) -> None:
        """iommufd_selftest_destroy(); of what was made so far, when its birth fails."""
        unbound = True
        if self.idev is not None:
            device_detach(self.idev, NO_PASID)
            unbound = device_unbind(self.idev)
            self.idev = None
        if self.mock is not None:
            self.ctx.kernel.mock_iommu.destroy_device(self.mock, unbound)
            self.mock = None


@operation("IOMMU_TEST_OP_MOCK_DOMAIN", "IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS")
def _mock_domain(ucmd: TestCommand) -> None:
    """EINVAL: unknown device flags. Then `device_attach`. EFAULT: the reply. On an error nothing is left."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    sobj = Selftest(ctx)
    try:
        flags = cmd.mock_domain_flags.dev_flags if cmd.op == abi.IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS else 0
        known = ctx.kernel.profile.mask(*_DEVICE_FLAGS)
        sobj.mock = ctx.kernel.mock_iommu.create_device(flags, known)
        sobj.idev = device_bind(ctx, sobj.mock)
        hwpt_id = device_attach(sobj.idev, NO_PASID, cmd.id)
        reply = cmd.mock_domain
        reply.out_hwpt_id, reply.out_stdev_id, reply.out_idev_id = hwpt_id, sobj.id, sobj.idev.id
        ucmd.respond()
    except KernelError:
        ctx.objects.abort(sobj)
        raise
    ctx.objects.finalize(sobj)


@operation("IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE")
def _mock_domain_replace(ucmd: TestCommand) -> None:
    """ENOENT: no such mock device. Then `device_replace`. EFAULT: the reply; the replacement stays."""
    sobj = ucmd.ctx.objects.get(ucmd.cmd.id, Selftest)
    assert sobj.idev is not None
    change = ucmd.cmd.mock_domain_replace
    change.pt_id = device_replace(sobj.idev, NO_PASID, change.pt_id)
    ucmd.respond()
