"""The machines that have names: what their firmware tells, where things are, and what their units say of themselves."""

import pytest

from fakedev.machine import SMMU_BASE
from fakedev.machines.named import MACHINES, machine
from fakedev.memory import BusAbort
from fakedev.smmuv3 import regs

#: IDR0 to IDR5, IIDR and AIDR of `qemu-system-aarch64 -machine virt,iommu=smmuv3` 10.0.2, read over qtest.
QEMU_SMMU = [0x0D44101B, 0x02730010, 0, 0x1414, 0, 0x74, 0, 1]


@pytest.fixture
def box(request):
    made = machine(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("box", ["virt-smmuv3"], indirect=True)
def test_smmu_of_the_arm_board_says_what_qemus_says(box):
    assert [box.mmio.read(SMMU_BASE + offset, 4) for offset in range(regs.IDR0, regs.AIDR + 4, 4)] == QEMU_SMMU


@pytest.mark.parametrize("box", ["virt-smmuv3"], indirect=True)
def test_functions_of_the_arm_board_are_those_of_its_guest(box):
    found = [
        (one.address, one.config_read(0, 4), [hex(one.bar_address(n)) for n in (0, 1, 4)]) for one in box.functions
    ]
    assert found == [
        ("0000:00:00.0", 0x0008_1B36, ["0x0", "0x0", "0x0"]),
        ("0000:00:01.0", 0x1003_1AF4, ["0x1000", "0x10100000", "0x8000000000"]),
        ("0000:00:10.0", 0x11E8_1234, ["0x10000000", "0x0", "0x0"]),
    ]


@pytest.mark.parametrize("box", ["virt-smmuv3-max"], indirect=True)
def test_smmu_with_everything_has_both_stages_and_all_that_devices_ask_for(box):
    idr0 = box.mmio.read(SMMU_BASE + regs.IDR0, 4)
    for bit in (regs.IDR0_S1P, regs.IDR0_S2P, regs.IDR0_ATS, regs.IDR0_PRI, regs.IDR0_MSI, regs.IDR0_SEV):
        assert idr0 & bit
    assert (regs.IDR0_HTTU.get(idr0), regs.IDR0_STALL_MODEL.get(idr0)) == (regs.HTTU_ACCESS_DIRTY, regs.STALL_BOTH)
    assert regs.IDR1_SSIDSIZE.get(box.mmio.read(SMMU_BASE + regs.IDR1, 4)) == 20


@pytest.mark.parametrize("box", sorted(MACHINES), indirect=True)
def test_ram_answers_and_what_lies_around_it_does_not(box):
    memory = box.memory
    assert memory.read(memory.ram_start, 4) == memory.read(memory.ram_end - 4, 4) == bytes(4)
    for address in [memory.ram_end, *([memory.ram_start - 4] if memory.ram_start else [])]:
        with pytest.raises(BusAbort):
            memory.read(address, 4)


@pytest.mark.parametrize("box", sorted(MACHINES), indirect=True)
def test_no_window_is_beyond_what_the_machines_smmus_can_put_out(box):
    sizes = [regs.ADDRESS_SIZES[box.mmio.read(base + regs.IDR5, 4) & 7] for base, _ in box.smmu_units]
    assert all(box.memory.address_bits <= bits for bits in sizes)
