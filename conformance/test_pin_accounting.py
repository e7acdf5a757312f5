"""Who pays for pinned pages: the three modes, their limits, and what shares a pin.

Mirrors iopt_pages_update_pinned() and its kin in drivers/iommu/iommufd/pages.c. The mode is latched when MAP is
called: NONE with CAP_IPC_LOCK, else USER or, after OPTION RLIMIT_MODE 1, MM. The charge comes with the pin, so a
domain must be there: a HWPT of edu, attached to nothing. The client that maps is a second process, so that nothing
of this one's memory shows in its VmPin and VmLck, and so that it can give up rights.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.steps import (
    PAGE,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    map_file,
    map_user,
    memfd,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Client, File, RemoteFile
from uapi.iommufd import IOMMU_HWPT_ALLOC, IOMMU_OPTION_RLIMIT_MODE

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

KIB = PAGE // 1024
CAP_IPC_LOCK = 14
NONE, USER, MM = "none", "user", "mm"
MODES = pytest.mark.parametrize("mode", [NONE, USER, MM])
LIMITED = pytest.mark.parametrize("mode", [USER, MM])
IOVA = 0x10_0000


class Payer:
    """A client with 64 pages, the context it was given, and what it is charged."""

    def __init__(self, client: Client, iommu: File, mode: str, limit: int | None = None) -> None:
        self.client = client
        self.iommu: RemoteFile = client.receive(iommu)
        self.memory = client.allocate(64 * PAGE)
        if limit is not None:
            self.limit(limit)
        if mode != NONE:
            client.drop_capabilities(CAP_IPC_LOCK)

    def limit(self, pages: int) -> None:
        """Lower RLIMIT_MEMLOCK."""
        self.client.setrlimit(resource.RLIMIT_MEMLOCK, pages * PAGE, pages * PAGE)

    def map(self, ioas: int, pages: int, iova: int = IOVA, first: int = 0) -> int:
        return map_user(self.iommu, ioas, self.memory + first * PAGE, pages * PAGE, iova=iova)

    def charged(self) -> tuple[int, int]:
        """Pages in VmPin and in VmLck."""
        return self.client.status("VmPin") // KIB, self.client.status("VmLck") // KIB


@pytest.fixture
def mode(iommu: File) -> str:
    """Overridden by parametrize."""
    return NONE


@pytest.fixture
def device(mode: str, iommu: File, cdev: VfioDevice) -> VfioDevice:
    """The bound device. RLIMIT_MODE can be set only before anything exists."""
    option_set(iommu, IOMMU_OPTION_RLIMIT_MODE, int(mode == MM))
    cdev.bind(iommu)
    return cdev


@pytest.fixture
def client(kernel: Backend) -> Iterator[Client]:
    with kernel.spawn() as client:
        yield client


@pytest.fixture
def hwpt(device: VfioDevice, iommu: File, ioas: int) -> int:
    return hwpt_alloc(iommu, device.devid, ioas)


def locked(mode: str, pages: int) -> tuple[int, int]:
    """What `Payer.charged` is for so many pages."""
    return pages, pages if mode == MM else 0


@MODES
@pytest.mark.usefixtures("hwpt")
def test_pinned_pages_are_charged_until_they_are_unmapped(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode)
    seen = [payer.charged()]
    payer.map(ioas, 10)
    seen.append(payer.charged())
    payer.map(ioas, 5, iova=2 * IOVA)
    seen.append(payer.charged())
    unmap(iommu, ioas, IOVA, 10 * PAGE)
    seen.append(payer.charged())
    unmap_all(iommu, ioas)
    seen.append(payer.charged())
    assert seen == [locked(mode, pages) for pages in (0, 10, 15, 5, 0)]


@MODES
def test_lazy_map_is_charged_when_the_domain_comes_and_until_it_goes(
    device: VfioDevice, iommu: File, ioas: int, client: Client, mode: str
) -> None:
    payer = Payer(client, iommu, mode)
    payer.map(ioas, 10)
    assert payer.charged() == (0, 0)
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    assert payer.charged() == locked(mode, 10)
    destroy(iommu, hwpt)
    assert payer.charged() == (0, 0)


@MODES
def test_second_domain_costs_nothing(device: VfioDevice, iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode)
    payer.map(ioas, 10)
    hwpts = [hwpt_alloc(iommu, device.devid, ioas) for _ in range(3)]
    assert payer.charged() == locked(mode, 10)
    for hwpt in hwpts[:2]:
        destroy(iommu, hwpt)
        assert payer.charged() == locked(mode, 10)
    destroy(iommu, hwpts[2])
    assert payer.charged() == (0, 0)


@MODES
@pytest.mark.usefixtures("hwpt")
def test_two_maps_of_one_address_are_charged_twice(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode)
    payer.map(ioas, 10)
    payer.map(ioas, 10, iova=2 * IOVA)
    assert payer.charged() == locked(mode, 20)


@MODES
@pytest.mark.usefixtures("hwpt")
def test_copy_shares_the_charge(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode)
    payer.map(ioas, 10)
    copy(iommu, ioas, ioas, IOVA, 10 * PAGE, dst_iova=2 * IOVA)
    copy(iommu, ioas, ioas, IOVA + PAGE, 3 * PAGE, dst_iova=3 * IOVA)
    seen = [payer.charged()]
    unmap(iommu, ioas, IOVA, 10 * PAGE)
    seen.append(payer.charged())
    unmap(iommu, ioas, 2 * IOVA, 10 * PAGE)
    seen.append(payer.charged())
    unmap(iommu, ioas, 3 * IOVA, 3 * PAGE)
    seen.append(payer.charged())
    assert seen == [locked(mode, pages) for pages in (10, 10, 3, 0)]


@MODES
@pytest.mark.usefixtures("hwpt")
def test_parts_of_a_lazy_area_are_charged_as_they_are_pinned(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode)
    lazy = ioas_alloc(iommu)
    payer.map(lazy, 32)
    seen = []
    for first, pages, iova in ((0, 4, 0), (8, 4, 0x10000), (2, 8, 0x20000)):
        copy(iommu, ioas, lazy, IOVA + first * PAGE, pages * PAGE, dst_iova=iova)
        seen.append(payer.charged())
    assert seen == [locked(mode, pages) for pages in (4, 8, 12)]


@MODES
def test_charge_is_the_mappers_not_the_one_that_pins(
    device: VfioDevice, kernel: Backend, iommu: File, ioas: int, client: Client, mode: str
) -> None:
    payer = Payer(client, iommu, mode)
    payer.map(ioas, 10)
    with kernel.spawn() as other:
        IOMMU_HWPT_ALLOC(other.receive(iommu), dev_id=device.devid, pt_id=ioas)
        assert (other.status("VmPin"), payer.charged()) == (0, locked(mode, 10))


@MODES
@pytest.mark.usefixtures("hwpt")
@pytest.mark.since("6.13")
def test_pages_of_a_memfd_are_charged_too(kernel: Backend, iommu: File, ioas: int, mode: str) -> None:
    """This process maps, with every right: VmPin alone moves."""
    before = kernel.status("VmPin")
    with memfd(8 * PAGE) as fd:
        map_file(iommu, ioas, fd, 0, 8 * PAGE, iova=IOVA)
    assert kernel.status("VmPin") - before == 8 * KIB
    unmap_all(iommu, ioas)
    assert kernel.status("VmPin") == before


@pytest.mark.usefixtures("hwpt")
def test_cap_ipc_lock_knows_no_limit(iommu: File, ioas: int, client: Client) -> None:
    payer = Payer(client, iommu, NONE, limit=0)
    payer.map(ioas, 10)
    assert payer.charged() == (10, 0)


@pytest.mark.parametrize("mode", [MM])
@pytest.mark.usefixtures("hwpt")
def test_cap_ipc_lock_wins_over_the_mode_of_the_context(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, NONE, limit=0)
    payer.map(ioas, 10)
    assert payer.charged() == (10, 0)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_limit_may_be_reached_but_not_passed(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode, limit=16)
    payer.map(ioas, 16)
    with fails(errno.ENOMEM):
        payer.map(ioas, 1, iova=2 * IOVA, first=16)
    assert payer.charged() == locked(mode, 16)
    unmap_all(iommu, ioas)
    payer.map(ioas, 1, iova=2 * IOVA, first=16)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_map_over_the_limit_is_enomem_and_leaves_nothing(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode, limit=16)
    with fails(errno.ENOMEM):
        payer.map(ioas, 17)
    assert payer.charged() == (0, 0)
    assert unmap_all(iommu, ioas) == 0
    payer.map(ioas, 16)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_no_limit_at_all_is_enomem_for_one_page(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode, limit=0)
    with fails(errno.ENOMEM):
        payer.map(ioas, 1)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_bad_memory_comes_before_the_limit(iommu: File, ioas: int, client: Client, mode: str) -> None:
    """The charge is made once all pages are pinned."""
    payer = Payer(client, iommu, mode, limit=0)
    client.free(payer.memory, 64 * PAGE)
    with fails(errno.EFAULT):
        payer.map(ioas, 4)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_limit_counts_an_address_as_often_as_it_is_mapped(iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode, limit=16)
    payer.map(ioas, 10)
    with fails(errno.ENOMEM):
        payer.map(ioas, 10, iova=2 * IOVA)
    copy(iommu, ioas, ioas, IOVA, 10 * PAGE, dst_iova=2 * IOVA)
    assert payer.charged() == locked(mode, 10)


@LIMITED
def test_domain_over_the_limit_is_enomem_and_is_undone(
    device: VfioDevice, iommu: File, ioas: int, client: Client, mode: str
) -> None:
    payer = Payer(client, iommu, mode, limit=16)
    payer.map(ioas, 10)
    payer.map(ioas, 10, iova=2 * IOVA)
    with fails(errno.ENOMEM):
        hwpt_alloc(iommu, device.devid, ioas)
    assert payer.charged() == (0, 0)
    unmap(iommu, ioas, IOVA, 10 * PAGE)
    hwpt_alloc(iommu, device.devid, ioas)
    assert payer.charged() == locked(mode, 10)


@LIMITED
def test_limit_is_looked_up_at_the_pin(device: VfioDevice, iommu: File, ioas: int, client: Client, mode: str) -> None:
    payer = Payer(client, iommu, mode)
    payer.map(ioas, 10)
    payer.limit(9)
    with fails(errno.ENOMEM):
        hwpt_alloc(iommu, device.devid, ioas)


@LIMITED
def test_mode_is_latched_at_the_map(device: VfioDevice, iommu: File, ioas: int, client: Client, mode: str) -> None:
    """What was mapped with CAP_IPC_LOCK stays free when the right is gone."""
    payer = Payer(client, iommu, NONE, limit=4)
    payer.map(ioas, 10)
    client.drop_capabilities(CAP_IPC_LOCK)
    hwpt_alloc(iommu, device.devid, ioas)
    assert payer.charged() == (10, 0)
    with fails(errno.ENOMEM):
        payer.map(ioas, 5, iova=2 * IOVA)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_user_mode_adds_up_over_the_clients_of_a_user_and_mm_does_not(
    kernel: Backend, iommu: File, ioas: int, client: Client, mode: str
) -> None:
    first = Payer(client, iommu, mode, limit=16)
    first.map(ioas, 10)
    with kernel.spawn() as other:
        second = Payer(other, iommu, mode, limit=16)
        if mode == USER:
            with fails(errno.ENOMEM):
                second.map(ioas, 10, iova=2 * IOVA)
            second.map(ioas, 6, iova=2 * IOVA)
        else:
            second.map(ioas, 10, iova=2 * IOVA)
        unmap_all(iommu, ioas)
        assert (first.charged(), second.charged()) == ((0, 0), (0, 0))


@pytest.mark.parametrize("mode", [USER])
@pytest.mark.usefixtures("hwpt")
def test_user_mode_counts_each_user_alone(kernel: Backend, iommu: File, ioas: int, client: Client, mode: str) -> None:
    Payer(client, iommu, mode, limit=16).map(ioas, 10)
    with kernel.spawn() as other:
        second = Payer(other, iommu, mode, limit=16)
        other.setuid(65534)
        second.map(ioas, 16, iova=2 * IOVA)
        unmap_all(iommu, ioas)


@LIMITED
@pytest.mark.usefixtures("hwpt")
def test_charge_of_a_client_that_exits_stays_with_its_user(
    kernel: Backend, iommu: File, ioas: int, client: Client, mode: str
) -> None:
    Payer(client, iommu, mode, limit=16).map(ioas, 10)
    client.exit()
    with kernel.spawn() as other:
        second = Payer(other, iommu, mode, limit=16)
        if mode == USER:
            with fails(errno.ENOMEM):
                second.map(ioas, 10, iova=2 * IOVA)
        unmap(iommu, ioas, IOVA, 10 * PAGE)
        second.map(ioas, 10, iova=2 * IOVA)
        unmap_all(iommu, ioas)


@MODES
def test_closing_everything_gives_everything_back(kernel: Backend, cdev: VfioDevice, client: Client, mode: str) -> None:
    with kernel.open("/dev/iommu") as iommu:
        option_set(iommu, IOMMU_OPTION_RLIMIT_MODE, int(mode == MM))
        cdev.bind(iommu)
        ioas = ioas_alloc(iommu)
        cdev.attach(ioas)
        payer = Payer(client, iommu, mode)
        payer.map(ioas, 10)
        payer.iommu.close()
    assert payer.charged() == locked(mode, 10)
    cdev.close()
    assert payer.charged() == (0, 0)
