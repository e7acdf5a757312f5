"""Long random walks through config space and SET_IRQS: each step's answer must be the real kernel's.

The walks are the same every time. What 7.3.4 answered is kept as digests of ten steps each, in `WALKS`, so a difference
is found within ten steps. `python -m conformance.test_vfio_walks`, run as root where
/dev/iommu and an edu device are, prints new digests.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import edu_functions
from conformance.drivers.vfio import CONFIG_REGION, REGION_SHIFT, VfioDevice, irq_set
from uapi.backend import DEV_IOMMU
from uapi.linux import LinuxBackend
from uapi.vfio import VFIO_DEVICE_SET_IRQS, VFIO_PCI_MSI_IRQ_INDEX

pytestmark = [pytest.mark.needs("iommu", "root", "vfio_cdev"), pytest.mark.since("7.3")]

CONFIG = CONFIG_REGION << REGION_SHIFT
STEPS = 600
#: Behind the MSI capability: what a walk leaves there, nothing resets.
GAP = range(0x4E, 0x100)


def config_walk(device: VfioDevice, seed: int) -> Iterator[str]:
    """Random reads and writes of up to 8 bytes, most of them in the header and at MSI, some beyond the end."""
    chance = random.Random(seed)
    for step in range(STEPS):
        if step == STEPS // 2:
            device.signal_on(VFIO_PCI_MSI_IRQ_INDEX, [-1])
        offset = chance.choice((chance.randrange(0x40), chance.randrange(0x3C, 0x54), chance.randrange(0x104)))
        width = chance.choice((1, 2, 3, 4, 4, 4, 8))
        try:
            if chance.random() < 0.5:
                done = device.file.pwrite(chance.randbytes(width), CONFIG + offset)
                yield f"write {offset:#x} {width} = {done}"
            else:
                yield f"read {offset:#x} {width} = {device.file.pread(width, CONFIG + offset).hex()}"
        except OSError as error:
            yield f"{offset:#x} {width} = {errno.errorcode[error.errno or 0]}"
        if step % 10 == 9:
            yield f"all = {device.file.pread(0x100, CONFIG).hex()}"
    device.file.pwrite(bytes(len(GAP)), CONFIG + GAP.start)


def irq_walk(device: VfioDevice, seed: int) -> Iterator[str]:
    """Random SET_IRQS, most of them nearly right, with three eventfds, a file that is none and bad descriptors."""
    chance = random.Random(seed)
    eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    plain = os.memfd_create("iommulab")
    try:
        for _ in range(STEPS):
            flags = chance.choice((1, 2, 4, 4)) | chance.choice((8, 16, 32, 32, 32))
            if chance.random() < 0.05:
                flags ^= 1 << chance.randrange(8)
            index = chance.choice((0, 0, 1, 1, 2, 3, 4, 5))
            start, count = chance.choice((0, 0, 0, 0, 1)), chance.choice((0, 1, 1, 1, 1, 2))
            choice = chance.randrange(8)
            fd = (*eventfds, eventfds[0], plain, -1, -2, 0x7FFFFFFF)[choice]
            data = struct.pack("<i", fd) if flags & 4 else bytes([chance.choice((0, 1, 255))])
            data = data * count if chance.random() < 0.95 else data[:-1]
            try:
                answer = str(VFIO_DEVICE_SET_IRQS.raw(device.file, irq_set(flags, index, start, count, data)))
            except OSError as error:
                answer = errno.errorcode[error.errno or 0]
            counts = [_count(eventfd) for eventfd in eventfds]
            yield f"{flags:#x} {index} {start}+{count} {choice} = {answer} {counts}"
    finally:
        for fd in (*eventfds, plain):
            os.close(fd)


def _count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def digests(lines: list[str]) -> str:
    """Four hex digits for each ten lines."""
    blocks = ("\n".join(lines[at : at + 10]) for at in range(0, len(lines), 10))
    return "".join(hashlib.sha256(block.encode()).hexdigest()[:4] for block in blocks)


#: What Linux 7.3.4 answered, by walk and seed.
WALKS = {
    "config_walk 1": (
        "9163a699c7d476de637a5a038903ae83d766ea5454fcf6081feac45227167b21d522d1a2d8b0e4bca61d0527aaa89d3d"
        "561d3b5ff6ce23dc1acfa805a6a911e758b07c35b7bd7a5b0ed91dad6bb98c83c47495da2bb8d60603af8565c1c2583c"
        "df7c133798afecdcf0794ce1457b2c469c9a0e1ee7812ffc021418f5b511cfd47f768069"
    ),
    "config_walk 2": (
        "3a41947e4476e1cfc24146b3aa34cf5e64d3f9e83fa9945559b9fb3080e0f07e9e20ef2729d8d6cd5aec55914e90d539"
        "8f494d5c95cd808495a56e8102bebc86ba332f9d5bc3160335d56dc79da212bc82ca23057f6e8cf93714eeb61b26d907"
        "297a251f7791df1c460d60e670ea76c72be9de22df2955348d8c3fcbb78464d4d8646c6a"
    ),
    "irq_walk 1": (
        "7201ae5ce0e3f3646c78616919feddbf54735fdb06a514cd82b79be3634196b829de7266a67762aba0dbbc8b7332bb13"
        "933644437d0949139a5b46822f10b3f37c77144de219c77b459886417072a43d6a9bd220795fbe415d7c90e6b3120ad8"
        "f08ad4378b16e58d4eb51caee08c9e32b4dc5f1a97424fa2"
    ),
    "irq_walk 2": (
        "c7df04564b76c872e9744eedbe7e5d890b6b0566b608188ab126809949f94d74fd52e06284edd5cd0a0890bbffd897fe"
        "43f190d99ff395f1ca8c3e3a166189cae9ef420fe57f7bde433fa75ade4fcaa25fd6fe114824c3b008bafc9cb8ce6d0f"
        "05f2c98f2dff66ac4f699b9cd2651e530996f2e0b78bf1e8"
    ),
}


@pytest.mark.parametrize(("walk", "seed"), [(config_walk, 1), (config_walk, 2), (irq_walk, 1), (irq_walk, 2)])
def test_walk_answers_as_the_real_kernel_does(device: VfioDevice, walk: object, seed: int) -> None:
    name = f"{walk.__name__} {seed}"  # type: ignore[attr-defined]
    lines = list(walk(device, seed))  # type: ignore[operator]
    found, wanted = digests(lines), WALKS[name]
    for at in range(0, len(wanted), 4):
        if found[at : at + 4] != wanted[at : at + 4]:
            first = at // 4 * 10
            pytest.fail(f"steps {first} to {first + 9} differ:\n" + "\n".join(lines[first : first + 10]))
    assert len(found) == len(wanted)


def _print_digests() -> None:
    kernel = LinuxBackend()
    with kernel.open(DEV_IOMMU) as iommu:
        for walk in (config_walk, irq_walk):
            for seed in (1, 2):
                with VfioDevice(kernel, edu_functions(kernel)[0]) as device:
                    device.bind(iommu)
                    print(f'    "{walk.__name__} {seed}": "{digests(list(walk(device, seed)))}",')


if __name__ == "__main__":
    _print_digests()
