"""Long random walks through config space, SET_IRQS and iommufd's objects: each answer must be the real kernel's.

The walks are the same every time. What 7.3.4 answered is kept as digests of ten steps each, in `WALKS`, so a difference
is found within ten steps. `python -m conformance.test_vfio_walks`, run as root where
/dev/iommu and an edu device are, prints new digests.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from conformance.drivers.edu import edu_functions
from conformance.drivers.vfio import CONFIG_REGION, REGION_SHIFT, VfioDevice, irq_set
from conformance.layout import Layout, find_layout
from conformance.steps import (
    NOWHERE,
    PAGE,
    allow_iovas,
    copy,
    destroy,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_user,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import DEV_IOMMU
from uapi.iommufd import IOMMU_HWPT_ALLOC, IOMMU_OPTION_HUGE_PAGES
from uapi.linux import LinuxBackend
from uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_ATTACH_PASID,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_PASID,
    VFIO_DEVICE_SET_IRQS,
    VFIO_PCI_MSI_IRQ_INDEX,
)

pytestmark = [pytest.mark.needs("iommu", "root", "vfio_cdev"), pytest.mark.since("7.3")]


class Walk(Protocol):
    """One of the walks below."""

    __name__: str

    def __call__(self, device: VfioDevice, seed: int, layout: Layout, /) -> Iterator[str]: ...


CONFIG = CONFIG_REGION << REGION_SHIFT
STEPS = 600
PCI_INTERRUPT_LINE = 0x3C
#: Behind the MSI capability: what a walk leaves there, nothing resets.
GAP = range(0x4E, 0x100)


def config_walk(device: VfioDevice, seed: int, _layout: Layout) -> Iterator[str]:
    """Random reads and writes of up to 8 bytes, most of them in the header and at MSI, some beyond the end."""
    chance = random.Random(seed)
    _attach(device)
    device.config_write(PCI_INTERRUPT_LINE, 1, 0)  # firmware's business, or the number of the kernel's interrupt
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
            yield f"{offset:#x} {width} = -{error.errno}"
        if step % 10 == 9:
            yield f"all = {device.file.pread(0x100, CONFIG).hex()}"
    device.file.pwrite(bytes(len(GAP)), CONFIG + GAP.start)


def irq_walk(device: VfioDevice, seed: int, _layout: Layout) -> Iterator[str]:
    """Random SET_IRQS, most of them nearly right, with three eventfds, a file that is none and bad descriptors."""
    chance = random.Random(seed)
    _attach(device)
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
                answer = f"-{error.errno}"
            counts = [_count(eventfd) for eventfd in eventfds]
            yield f"{flags:#x} {index} {start}+{count} {choice} = {answer} {counts}"
    finally:
        for fd in (*eventfds, plain):
            os.close(fd)


def _attach(device: VfioDevice) -> None:
    """To an IOAS of its own: on Arm the doorbell of MSIs has to be mapped there."""
    assert device.iommu is not None
    device.attach(ioas_alloc(device.iommu))


def _count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def _object_calls(
    device: VfioDevice, address: int, one: int, other: int, iova: int, length: int
) -> dict[str, Callable[[], object]]:
    """What a step of `object_walk` may do, by name."""
    iommu = device.iommu
    assert iommu is not None
    return {
        "ioas_alloc": lambda: ioas_alloc(iommu),
        "destroy": lambda: destroy(iommu, one),
        "hwpt_alloc": lambda: IOMMU_HWPT_ALLOC(iommu, dev_id=1, pt_id=one).out_hwpt_id,
        "hwpt_alloc for pasids": lambda: IOMMU_HWPT_ALLOC(iommu, dev_id=1, pt_id=one, flags=8).out_hwpt_id,
        "hwpt_alloc with faults": lambda: IOMMU_HWPT_ALLOC(iommu, dev_id=other, pt_id=one, flags=4).out_hwpt_id,
        "attach": lambda: device.attach(one),
        "attach again": lambda: device.attach(other),
        "detach": device.detach,
        "attach pasid": lambda: (
            VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=other, pt_id=one).pt_id
        ),
        "detach pasid": lambda: (
            VFIO_DEVICE_DETACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_DETACH_PASID, pasid=other).pasid
        ),
        "map": lambda: map_user(iommu, one, address, length, iova),
        "map anywhere": lambda: map_user(iommu, one, address, length),
        "map nothing": lambda: map_user(iommu, one, NOWHERE, length, iova),
        "copy": lambda: copy(iommu, one, other, iova, length),
        "unmap": lambda: unmap(iommu, one, iova, length),
        "unmap all": lambda: unmap_all(iommu, one),
        "ranges": lambda: iova_ranges(iommu, one),
        "alignment": lambda: iova_alignment(iommu, one),
        "allow": lambda: allow_iovas(iommu, one, [(iova, iova + length)]),
        "huge pages off": lambda: option_set(iommu, IOMMU_OPTION_HUGE_PAGES, other & 1, one),
    }


def object_walk(device: VfioDevice, seed: int, layout: Layout) -> Iterator[str]:
    """Random births, attachments, mappings and deaths, with ids that are mostly there."""
    chance = random.Random(seed)
    memory = device.kernel.buffer(
        2 << 20
    )  # so large a buffer has the same alignment everywhere, and so automatic IOVAs
    for _ in range(STEPS):
        one, other = chance.choices(range(9), k=2)
        window, end = layout.msi_start, layout.last + 1
        iova = chance.choice((0, PAGE, 3 * PAGE, window - PAGE, window, 1 << 39, end - PAGE, end, 100))
        length = chance.choice((PAGE, PAGE, 2 * PAGE, 4 * PAGE, 100))
        calls = _object_calls(device, memory.address, one, other, iova, length)
        name = chance.choice(list(calls))
        try:
            answer = str(calls[name]())
        except OSError as error:
            answer = f"-{error.errno}"
        yield f"{name} {one} {other} {iova:#x}+{length:#x} = {answer}"
    memory.close()


def digests(lines: list[str]) -> str:
    """Four hex digits for each ten lines."""
    blocks = ("\n".join(lines[at : at + 10]) for at in range(0, len(lines), 10))
    return "".join(hashlib.sha256(block.encode()).hexdigest()[:4] for block in blocks)


def name_of(walk: str, seed: int, layout: Layout) -> str:
    """Of a walk in WALKS: answers to `object_walk` have the machine's aperture and window in them, those to
    `config_walk` where its firmware or its kernel put the BAR, which goes with the window.
    """
    if walk == "irq_walk":
        return f"{walk} {seed}"
    if walk == "config_walk":
        return f"{walk} {seed} {layout.msi_start:#x}"
    return f"{walk} {seed} {layout.last:#x} {layout.msi_start:#x}"


#: What Linux 7.3.4 answered, by walk and seed.
WALKS = {
    "config_walk 1 0x8000000": (
        "91632428a0a06073ff0d421fa16b4ea95037a1d2b495f608de9fefba27167b2113f7d1a2d8b0e4bca61d052764e59d3d"
        "561d3b5ff6ce23dc1acfa805a6a911e716797c35b7bd7a5b0ed91dad6bb98c83c47495da2bb8d606f81e8565c1c2583c"
        "8877133798afecdcf0794ce1457b2c46d7d70e1ee7812ffc021418f5b511cfd47f768069"
    ),
    "config_walk 1 0xfee00000": (
        "9163a699c7d476de637a5a038903ae832f3dea5454fcf6081feac45227167b2113f7d1a2d8b0e4bca61d052764e59d3d"
        "561d3b5ff6ce23dc1acfa805a6a911e716797c35b7bd7a5b0ed91dad6bb98c83c47495da2bb8d606f81e8565c1c2583c"
        "8877133798afecdcf0794ce1457b2c46d7d70e1ee7812ffc021418f5b511cfd47f768069"
    ),
    "config_walk 2 0x8000000": (
        "3a41685d6a8054eb696653cbd68298c95b1d4e3c2943f1d2481f5e3ab752828b34253769d3ad7efff2c527b84e900fb1"
        "467896213a5f723f95a56e8102bebc86ba332f9d5bc3160335d5239d9da212bc82ca50507f6eb3103714eeb61b26d907"
        "d740251f7791df1c460d0d95dc8276c72be9de22df2955348d8c3fcbb784e688d8646c6a"
    ),
    "config_walk 2 0xfee00000": (
        "3a41fe9261b638f8c24146b3aa34cf5e64d3f9e83fa9f1d259b9fb3080e0f07e9e20ef2729d8d6cd5aec55914e90d539"
        "8f494d5c95cd808495a56e8102bebc86ba332f9d5bc3160335d5239d9da212bc82ca50507f6eb3103714eeb61b26d907"
        "d740251f7791df1c460d0d95dc8276c72be9de22df2955348d8c3fcbb784e688d8646c6a"
    ),
    "irq_walk 1": (
        "be701494fd8e1655dc06cfccea618266e10a6f638953237f442d8479d746b30ba556bebe566abe3dd4fdd2ea1bf8af61"
        "c22b6c08c11cea2c62ed112432e6dd4cb3b61fba3d971bf65bef5ba4832a847706b85f906a17b573cb21550c9e99a4b3"
        "85c7528cc8731e6852144311bbdd29555442ea783f4d158d"
    ),
    "irq_walk 2": (
        "7d51d07c626a1bb1dc5af3592a424d12dd95d62ccdf3d143c78524acf48efd270e1187c8f8fb5396edb7c06eaf358793"
        "9c17cdb9b8a562a756beadcf5fb03670262fce6b9232ca3b2ddadb4693bcd571f9a4e6286eead2d0a8efbd1e518f607b"
        "72e8266c1f74a4e0aca8d9bdc77cc1ab8d4376df920ae8ef"
    ),
    "object_walk 1 0xffffffffffff 0x8000000": (
        "4195e8327706d234ac34b0b06513612c60ee5b77ec2a5aa87c623668db164ef14f7eddc27932b307fb52015ad13e4faa"
        "167dab4e7e71fd094d5b472a5f22d8be734f242b3ee5bcf0df5b855315e81533974fabd7db1d59e3681ee00f11ef2cc3"
        "de9c019bca292ad0e6a09abe0f9005bf25ca672be869115a"
    ),
    "object_walk 1 0xffffffffffff 0xfee00000": (
        "2ea27ca5ddfae5f28b3f8d8f1ee48d6d5f341619a4927c07b541bf2182ebd22670390a3417718c0c7b6dacd3d392029b"
        "cf8bab4eb0d52f651dea95a594ef4add734ff8b40e471569d6c34a602337153368e734ba04d97888a8f72c42a1ca6a12"
        "b7629becf8272ad096072301a306dbebba52887cb5eb2f2a"
    ),
    "object_walk 2 0xffffffffffff 0x8000000": (
        "cb607042eeb975258980246dbb8e700b6ff40a6cdf2dea7bc4b998bcbcfe5f4e55e9ad86ed94f547aa71615710930eaa"
        "a305c3393b3b93cb1486433558b96ffe8f26e89ce12ebc9eb858c6a07707abcce6b25c077805cf174fbfa41719ec30bc"
        "e4df2d758cb5d2de501db479240b53d3e5c4917ea1b18223"
    ),
    "object_walk 2 0xffffffffffff 0xfee00000": (
        "da1c30a6c9220e331d4955b499d7db956ff43c67599aea7b9306895955768de8afe3dce2ca7e216ff929d07bf5bd6dac"
        "9b64681aca6c7a05021b3a23a8ef51bb91f5e89ce56bd2439716988141450ecc992d23667f211be9cde3a4171707e02c"
        "5d3241d06e9c9604d6e84c7eebbfa1132a80917ef58f2746"
    ),
    "object_walk 1 0x7fffffffffff 0xfee00000": (
        "c0619efc12358303f420ec5f1ee40777ad2f72e9f0fa28c260ddab9b531bd226b65714877b8f338d168e41f3e92e029b"
        "cf8b757e6c5fe406956848aa472a20c2f24929d86d24dde13de7797c8b6c4b1795024cec50c7e059a8f775f76de445f3"
        "b762ecd66160839ee99c0096a306f1862b0fce87dd33c48a"
    ),
    "object_walk 2 0x7fffffffffff 0xfee00000": (
        "d768ebadc9220e33792a38b97cefd71e9253b5c823db9d8fba53e39ac7e9adaaafe3598681e8c3ee511474dff5bd98b0"
        "aca6328ba77a6f2ae7d8e521bda0a25792e340c18e67931d971653de0722ae27596b8c459d811be9cde3bc587eff0098"
        "9c01b02b3ff964144c1e335a5546cb952a80fdff1d90d92e"
    ),
}


@pytest.mark.parametrize(
    ("walk", "seed"),
    [(config_walk, 1), (config_walk, 2), (irq_walk, 1), (irq_walk, 2), (object_walk, 1), (object_walk, 2)],
)
def test_walk_answers_as_the_real_kernel_does(device: VfioDevice, layout: Layout, walk: Walk, seed: int) -> None:
    name = name_of(walk.__name__, seed, layout)
    if name not in WALKS:
        pytest.skip("no real kernel's answers with this aperture and window")
    lines = list(walk(device, seed, layout))
    found, wanted = digests(lines), WALKS[name]
    for at in range(0, len(wanted), 4):
        if found[at : at + 4] != wanted[at : at + 4]:
            first = at // 4 * 10
            pytest.fail(f"steps {first} to {first + 9} differ:\n" + "\n".join(lines[first : first + 10]))
    assert len(found) == len(wanted)


def _print_digests() -> None:
    kernel = LinuxBackend()
    layout = find_layout(kernel)
    assert layout is not None
    walks: tuple[Walk, ...] = (config_walk, irq_walk, object_walk)
    for walk in walks:
        for seed in (1, 2):
            with kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, edu_functions(kernel)[0]) as device:
                device.bind(iommu)
                print(f'    "{name_of(walk.__name__, seed, layout)}": "{digests(list(walk(device, seed, layout)))}",')


if __name__ == "__main__":
    _print_digests()
