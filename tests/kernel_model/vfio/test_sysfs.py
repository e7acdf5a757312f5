"""The PCI bus of the model: binding and unbinding vfio-pci through sysfs."""

from __future__ import annotations

import errno
import os

import pytest

from kernel_model.kernel import Kernel
from uapi.vfio import VFIO_DEVICE_BIND_IOMMUFD

EDU, OTHER = "0000:00:10.0", "0000:00:03.0"
DEVICES, DRIVER = "/sys/bus/pci/devices", "/sys/bus/pci/drivers/vfio-pci"


def store(kernel: Kernel, path: str, text: str) -> int:
    """The errno of writing an attribute, 0 for success."""
    try:
        with kernel.open(path, os.O_WRONLY) as file:
            file.write(text.encode())
    except OSError as error:
        return error.errno or -1
    return 0


def show(kernel: Kernel, path: str) -> str:
    with kernel.open(path, os.O_RDONLY) as file:
        return file.read(4096).decode()


@pytest.fixture
def kernel():
    with Kernel() as kernel:
        yield kernel


def test_attributes_of_edu(kernel: Kernel) -> None:
    here = f"{DEVICES}/{EDU}"
    assert [show(kernel, f"{here}/{name}") for name in ("vendor", "device", "class", "irq", "driver_override")] == [
        "0x1234\n",
        "0x11e8\n",
        "0x00ff00\n",
        "10\n",
        "(null)\n",
    ]
    assert show(kernel, f"{here}/resource").splitlines()[:2] == [
        "0x00000000fea00000 0x00000000feafffff 0x0000000000040200",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000",
    ]
    with kernel.open(f"{here}/config", os.O_RDONLY) as config:
        assert config.read(4) == b"\x34\x12\xe8\x11"
    group = os.path.basename(kernel.readlink(f"{here}/iommu_group"))
    reserved = show(kernel, f"/sys/kernel/iommu_groups/{group}/reserved_regions")
    assert reserved == "0x00000000fee00000 0x00000000feefffff msi\n"


def test_probe_without_override_does_nothing(kernel: Kernel) -> None:
    assert store(kernel, "/sys/bus/pci/drivers_probe", EDU) == 0
    assert EDU not in kernel.listdir(DRIVER)


def test_probe_of_nothing_is_enodev(kernel: Kernel) -> None:
    assert store(kernel, "/sys/bus/pci/drivers_probe", "0000:00:1e.0") == errno.ENODEV


def test_override_can_be_taken_back(kernel: Kernel) -> None:
    store(kernel, f"{DEVICES}/{EDU}/driver_override", "vfio-pci")
    assert show(kernel, f"{DEVICES}/{EDU}/driver_override") == "vfio-pci\n"
    store(kernel, f"{DEVICES}/{EDU}/driver_override", "\n")
    assert show(kernel, f"{DEVICES}/{EDU}/driver_override") == "(null)\n"


def test_bind_needs_the_override_and_happens_once(kernel: Kernel) -> None:
    assert store(kernel, f"{DRIVER}/bind", EDU) == errno.ENODEV
    store(kernel, f"{DEVICES}/{EDU}/driver_override", "vfio-pci")
    assert store(kernel, f"{DRIVER}/bind", EDU) == 0
    assert store(kernel, f"{DRIVER}/bind", EDU) == errno.EBUSY


def test_nodes_take_the_lowest_free_number(kernel: Kernel) -> None:
    for address in (EDU, OTHER):
        store(kernel, f"{DEVICES}/{address}/driver_override", "vfio-pci")
        store(kernel, "/sys/bus/pci/drivers_probe", address)
    assert kernel.listdir(f"{DEVICES}/{EDU}/vfio-dev") == ["vfio0"]
    assert kernel.listdir(f"{DEVICES}/{OTHER}/vfio-dev") == ["vfio1"]
    assert store(kernel, f"{DRIVER}/unbind", EDU) == 0
    assert kernel.listdir("/dev/vfio/devices") == ["vfio1"]
    store(kernel, "/sys/bus/pci/drivers_probe", EDU)
    assert kernel.listdir(f"{DEVICES}/{EDU}/vfio-dev") == ["vfio0"]


def test_unbind_of_what_is_not_bound_is_enodev(kernel: Kernel) -> None:
    assert store(kernel, f"{DRIVER}/unbind", EDU) == errno.ENODEV


def test_unbind_of_an_open_device_is_refused(kernel: Kernel) -> None:
    store(kernel, f"{DEVICES}/{EDU}/driver_override", "vfio-pci")
    store(kernel, "/sys/bus/pci/drivers_probe", EDU)
    with kernel.open("/dev/iommu") as iommu, kernel.open("/dev/vfio/devices/vfio0") as device:
        VFIO_DEVICE_BIND_IOMMUFD(device, iommufd=iommu.fileno())
        assert store(kernel, f"{DRIVER}/unbind", EDU) == errno.EBUSY
    assert store(kernel, f"{DRIVER}/unbind", EDU) == 0
    assert kernel.listdir("/dev/vfio/devices") == []


def test_functions_of_one_group_are_owned_together(kernel: Kernel) -> None:
    """0000:00:1f.2 and 0000:00:1f.3 cannot be told apart by the IOMMU."""
    first, second = "0000:00:1f.2", "0000:00:1f.3"
    for address in (first, second):
        store(kernel, f"{DEVICES}/{address}/driver_override", "vfio-pci")
        store(kernel, "/sys/bus/pci/drivers_probe", address)
    with (
        kernel.open("/dev/iommu") as iommu,
        kernel.open("/dev/iommu") as other,
        kernel.open("/dev/vfio/devices/vfio0") as one,
        kernel.open("/dev/vfio/devices/vfio1") as two,
    ):
        assert VFIO_DEVICE_BIND_IOMMUFD(one, iommufd=iommu.fileno()).out_devid == 1
        with pytest.raises(PermissionError):
            VFIO_DEVICE_BIND_IOMMUFD(two, iommufd=other.fileno())
        assert VFIO_DEVICE_BIND_IOMMUFD(two, iommufd=iommu.fileno()).out_devid == 2


def test_paths_of_an_arm_board_are_those_of_its_device_tree() -> None:
    """As the arm64 guest of 7.3.4 shows them."""
    with Kernel("virt-smmuv3") as kernel:
        here = f"{DEVICES}/{EDU}"
        bridge = "devices/platform/4010000000.pcie/pci0000:00"
        smmu = "smmu3.0x0000000009050000"
        assert kernel.listdir("/sys/class/iommu") == [smmu]
        assert kernel.readlink(f"/sys/class/iommu/{smmu}") == f"../../devices/platform/9050000.smmuv3/iommu/{smmu}"
        assert kernel.readlink(f"/sys/class/iommu/{smmu}/device") == "../../../9050000.smmuv3"
        assert kernel.readlink(here) == f"../../../{bridge}/{EDU}"
        assert kernel.readlink(f"{here}/iommu") == f"../../../9050000.smmuv3/iommu/{smmu}"
        assert kernel.readlink(f"{here}/iommu_group") == "../../../../../kernel/iommu_groups/2"
        assert (
            kernel.readlink(f"/sys/class/iommu/{smmu}/devices/{EDU}") == f"../../../../4010000000.pcie/pci0000:00/{EDU}"
        )
        assert show(kernel, f"{here}/resource").startswith("0x0000000010000000 0x00000000100fffff 0x0000000000040200\n")
        assert show(kernel, "/sys/kernel/iommu_groups/2/reserved_regions") == (
            "0x0000000008000000 0x00000000080fffff msi\n"
        )


def test_line_of_an_arm_boards_function_gets_its_number_with_the_driver() -> None:
    with Kernel("virt-smmuv3") as kernel:
        here = f"{DEVICES}/{EDU}"
        function = kernel.machine.function(EDU)
        assert (show(kernel, f"{here}/irq"), function.config[0x3C]) == ("0\n", 0)
        assert store(kernel, f"{here}/driver_override", "vfio-pci") == 0
        assert store(kernel, "/sys/bus/pci/drivers_probe", EDU) == 0
        assert (show(kernel, f"{here}/irq"), function.config[0x3C]) == ("21\n", 21)
