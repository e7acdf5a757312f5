"""Address spaces: MAP, MAP_FILE, COPY, UNMAP, ranges, options, accesses, and the VFIO calls that do the same."""

from __future__ import annotations

import os
import struct

from iommulab.fuzz.maker import Maker
from iommulab.fuzz.memory import MEMFD, NULL_FD, PAGE, REGIONS
from iommulab.fuzz.program import Call, Value
from iommulab.fuzz.world import Access, Area, Ioas
from uapi import iommufd as abi
from uapi import iommufd_test as mock

U64_MAX = (1 << 64) - 1
APERTURE = int(mock.MOCK_APERTURE_START)


class MappingActions(Maker):
    """Actions on an IOAS."""

    def new_ioas(self) -> None:
        call = self.sure("IOMMU_IOAS_ALLOC") if self.world.aligned else self.add("IOMMU_IOAS_ALLOC")
        if call is None:
            return
        ioas = Ioas(call + "out_ioas_id", self.world.aligned)
        self.world.ioas.append(ioas)
        if ioas.aligned:
            self.sure("IOMMU_OPTION", option_id=1, object_id=ioas.ref, val64=0)

    def _ioas(self) -> Ioas:
        ioas = self.world.pick(self.world.ioas)
        while ioas is None:
            self.new_ioas()
            ioas = self.world.pick(self.world.ioas)
        return ioas

    def place(self, ioas: Ioas) -> int:
        """An IOVA to map at: in the mock's aperture mostly."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.06 and ioas.areas:
            known = rng.choice(ioas.areas)
            if isinstance(known.iova, int):
                return (known.iova + rng.choice((0, known.length, known.length - PAGE, -PAGE, 2048))) & U64_MAX
        if kind < (0.09 if ioas.domain else 0.12):
            return rng.choice((0, PAGE, APERTURE - PAGE, (1 << 31) - PAGE, 1 << 31, 1 << 40, U64_MAX - PAGE + 1, 12345))
        return (
            APERTURE
            + rng.randrange(rng.choice((40, 512))) * PAGE
            + (rng.choice((0, 0, 0, 2048, 512)) if not ioas.aligned else 0)
        )

    def piece(self, ioas: Ioas, bad: bool = True) -> tuple[str, int, bool]:
        """Memory to map: address, length, whether it may be written."""
        rng = self.rng
        name = rng.choices(("buf", "tail", "ro", "file", "hole", "none"), (62, 12, 10, 10, bad * 1.5, bad))[0]
        pages = REGIONS[name][1]
        length = rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 8, 12)) * PAGE
        offset = rng.randrange(pages) * PAGE
        if offset + length > pages * PAGE and not self.coin(0.1):
            length = pages * PAGE - offset
        if not ioas.aligned and self.coin(0.2):
            offset += rng.choice((2048, 2048, 512, 1, 4095))
            length = rng.choice((length, length - 2048, 2048, 512, length - 1)) or 2048
        return f"&{name}+{offset:#x}", length, name in ("buf", "tail", "file")

    def map(self, ioas: Ioas | None = None) -> None:
        ioas = ioas or self._ioas()
        va, length, may_write = self.piece(ioas)
        flags = self.rng.choice((6, 6, 6, 6, 4, 2)) if may_write or self.coin(0.1) else 4
        iova = 0
        if self.coin(0.65):
            flags |= int(abi.IOMMU_IOAS_MAP_FIXED_IOVA)
            iova = self.place(ioas)
        call = self.add("IOMMU_IOAS_MAP", flags=flags, ioas_id=ioas.ref, user_va=va, length=length, iova=iova)
        if call is not None:
            ioas.areas.append(Area(iova if flags & 1 else call + "iova", length, va, bool(flags & 2)))

    def map_file(self) -> None:
        ioas = self._ioas()
        pages = REGIONS["file"][1]
        start = self.rng.randrange(pages) * PAGE + (0 if ioas.aligned else self.rng.choice((0, 0, 0, 2048, 100)))
        length = min(self.rng.choice((1, 1, 2, 4, 16)) * PAGE, pages * PAGE - start)
        length += self.rng.choice((0, 0, 0, 0, 0, PAGE, 1))
        flags = 6 if self.coin(0.8) else 4
        iova = 0
        if self.coin(0.6):
            flags |= 1
            iova = self.place(ioas)
        fd = MEMFD if self.coin(0.95) else self.rng.choice((NULL_FD, -1 & 0xFFFFFFFF, 950))
        call = self.add(
            "IOMMU_IOAS_MAP_FILE", flags=flags, ioas_id=ioas.ref, fd=fd, start=start, length=length, iova=iova
        )
        if call is not None:
            where = f"&file+{start:#x}" if fd == MEMFD else ""
            ioas.areas.append(Area(iova if flags & 1 else call + "iova", length, where, bool(flags & 2)))

    def use_dmabuf(self) -> None:
        """Make, map or revoke a dma-buf, where the kernel hands them out."""
        if not self.dmabuf:
            return
        known = self.world.pick(self.world.dmabufs)
        if known is None or self.coin(0.2):
            length = self.rng.choice((1, 2, 4, 4)) * PAGE - self.rng.choice((0, 0, 1))
            call = self.add("IOMMU_TEST_OP_DMABUF_GET", length=length, open_flags=os.O_CLOEXEC | os.O_RDWR)
            if call is not None:
                self.world.dmabufs.append((call + "result_fd", (length + PAGE - 1) // PAGE * PAGE))
            return
        fd, size = known
        if self.coin(0.3):
            self.add("IOMMU_TEST_OP_DMABUF_REVOKE", dmabuf_fd=fd, revoked=int(self.coin(0.6)))
            return
        ioas, flags, iova = self._ioas(), self.rng.choice((6, 6, 4)), 0
        if self.coin(0.6):
            flags |= 1
            iova = self.place(ioas)
        start = self.rng.choice((0, 0, 0, PAGE, 2048))
        length = max(1, self.rng.choice((size - start, size - start, PAGE, size)))
        more: dict[str, Value] = {"fd": fd, "start": start, "length": length, "iova": iova}
        call = self.add("IOMMU_IOAS_MAP_FILE", flags=flags, ioas_id=ioas.ref, **more)
        if call is not None:
            ioas.areas.append(Area(iova if flags & 1 else call + "iova", length, "", bool(flags & 2)))

    def copy(self) -> None:
        source, target = self.world.pick([ioas for ioas in self.world.ioas if ioas.areas]) or self._ioas(), self._ioas()
        area = self.world.pick(source.areas)
        if area is None:
            return
        skip, length = self.part(area, source.aligned and target.aligned)
        flags = self.rng.choice((4, 6, 6, 2)) if area.write or self.coin(0.15) else 4
        iova = 0
        if self.coin(0.6):
            flags |= 1
            iova = self.place(target)
        start = self.inside(area, skip)
        call = self.add(
            "IOMMU_IOAS_COPY",
            flags=flags,
            dst_ioas_id=target.ref,
            src_ioas_id=source.ref,
            length=length,
            dst_iova=iova,
            src_iova=start,
        )
        if call is not None:
            va = area.va if not skip else ""
            target.areas.append(Area(iova if flags & 1 else call + "dst_iova", length, va, bool(flags & 2)))

    def part(self, area: Area, aligned: bool) -> tuple[int, int]:
        """A piece of an area: how far in, how long. Only areas with a known IOVA can be entered."""
        rng = self.rng
        if not isinstance(area.iova, int) or self.coin(0.5):
            return 0, area.length if self.coin(0.85) else max(area.length - (PAGE if aligned else 512), 1)
        step = PAGE if aligned or self.coin(0.7) else rng.choice((2048, 512, 1))
        skip = rng.randrange(0, area.length, step)
        return skip, max(1, rng.choice((area.length - skip, min(PAGE, area.length - skip), area.length)))

    @staticmethod
    def inside(area: Area, skip: int) -> Value:
        return (area.iova + skip) & U64_MAX if isinstance(area.iova, int) else area.iova

    def unmap(self) -> None:
        ioas = self._ioas()
        area = self.world.pick(ioas.areas)
        if area is None or self.coin(0.08):
            whole = self.coin(0.7)
            self.add("IOMMU_IOAS_UNMAP", ioas_id=ioas.ref, iova=0, length=U64_MAX if whole else 1 << 48)
            ioas.areas.clear()
            return
        start, length = self.inside(area, 0), area.length
        kind = self.rng.random()
        if kind < 0.15 and isinstance(start, int):  # around it, and what is beside it
            start, length = max(start - 8 * PAGE, 0), length + 16 * PAGE
        elif kind < 0.25:
            length = max(length - PAGE, 1)
        elif kind < 0.3 and isinstance(start, int):
            start += PAGE
        call = self.add("IOMMU_IOAS_UNMAP", ioas_id=ioas.ref, iova=start, length=length)
        if call is not None and kind >= 0.3:
            ioas.areas.remove(area)

    def iova_ranges(self) -> None:
        room = self.rng.choice((0, 1, 2, 8, 8))
        self.add(
            "IOMMU_IOAS_IOVA_RANGES",
            ioas_id=self._ioas().ref,
            num_iovas=room,
            allowed_iovas=f">{room * 16}" if room else 0,
        )

    def allow_iovas(self) -> None:
        count = self.rng.choice((0, 1, 1, 2, 3))
        data = b""
        for _ in range(count):
            start = (
                self.rng.choice((0, APERTURE, APERTURE + 0x100000, 0x1000, 1 << 32)) + self.rng.randrange(4) * 0x10000
            )
            last = start + self.rng.choice((0, 1, 0xFFF, 0xFFFF, 0xFFFF, 0x7FFFFF))
            data += struct.pack("<QQ", start, last)
        self.add(
            "IOMMU_IOAS_ALLOW_IOVAS",
            ioas_id=self._ioas().ref,
            num_iovas=count,
            allowed_iovas="*" + data.hex() if data else 0,
        )

    def reserve(self) -> None:
        start = self.place(self._ioas())
        length = self.rng.choice((1, PAGE, PAGE, PAGE, 4 * PAGE, 3, 1 << 30))
        self.add("IOMMU_TEST_OP_ADD_RESERVED", id=self._ioas().ref, start=start, length=length)

    def option(self) -> None:
        kind = self.rng.random()
        if kind < 0.3:
            self.add("IOMMU_OPTION", option_id=0, op=self.rng.randrange(2), val64=self.rng.randrange(2))
        elif kind < 0.6 or self.world.aligned:
            self.add("IOMMU_OPTION", option_id=1, op=1, object_id=self._ioas().ref)
        else:
            self.add("IOMMU_OPTION", option_id=1, op=0, object_id=self._ioas().ref, val64=self.rng.randrange(2))

    def change_process(self) -> None:
        self.add("IOMMU_IOAS_CHANGE_PROCESS")

    def get_pa(self) -> None:
        ioas = self._ioas()
        area = self.world.pick(ioas.areas)
        iova = self.inside(area, 0) if area is not None else PAGE
        self.add("IOMMU_IOAS_NOIOMMU_GET_PA", ioas_id=ioas.ref, iova=iova, length=PAGE)

    def create_access(self, ioas: Ioas | None = None, pins: bool | None = None) -> None:
        ioas = ioas or self._ioas()
        pins = self.coin(0.7) if pins is None else pins
        call = self.add("IOMMU_TEST_OP_CREATE_ACCESS", id=ioas.ref, flags=int(pins))
        if call is not None:
            self.world.accesses.append(Access(call + "out_access_fd", ioas, pins))

    def _access(self, pins: bool | None = None) -> Access | None:
        """An access, of this kind mostly, on an IOAS where something is mapped if there is one."""
        fitting = [access for access in self.world.accesses if pins is None or access.pins == pins or self.coin(0.1)]
        if not fitting:
            ioas = self.world.pick([ioas for ioas in self.world.ioas if ioas.areas]) or self._ioas()
            self.create_access(ioas, pins)
            fitting = self.world.accesses
        return self.world.pick(fitting)

    def access_pages(self) -> None:
        access = self._access(pins=True)
        area = self.world.pick(access.ioas.areas) if access is not None else None
        if access is None or area is None:
            return
        skip, length = self.part(area, self.coin(0.7))
        flags = self.rng.choice((0, 1)) if area.write else int(self.coin(0.1))
        uptr: Value = 0
        if area.va and self.coin(0.4):
            name, _, offset = area.va.partition("+")
            uptr = f"{name}+{int(offset, 0) + skip:#x}"
        call = self.add(
            "IOMMU_TEST_OP_ACCESS_PAGES",
            id=access.fd,
            iova=self.inside(area, skip),
            length=length,
            uptr=uptr,
            flags=flags,
        )
        if call is not None:
            access.items.append(call + "out_access_pages_id")

    def check_refs(self) -> None:
        page = self.rng.randrange(40)
        self.add(
            "IOMMU_TEST_OP_MD_CHECK_REFS",
            uptr=f"&buf+{page * PAGE:#x}",
            length=PAGE * self.rng.choice((0, 1, 1, 2)),
            refs=self.rng.choice((0, 0, 1, 2)),
        )

    def access_rw(self) -> None:
        access = self._access()
        area = self.world.pick(access.ioas.areas) if access is not None else None
        if access is None or area is None:
            return
        skip, length = self.part(area, False)
        length = min(length, self.rng.choice((1, 8, 64, 5000)))
        flags = self.rng.choice((0, 1, 4, 5))
        uptr: Value = f">{min(length, 512)}" if not flags & 1 and length <= 512 else "&tail+0x100"
        if flags & 1 and length <= 64:
            uptr = "*" + self.rng.randbytes(length).hex()
        self.add(
            "IOMMU_TEST_OP_ACCESS_RW",
            id=access.fd,
            iova=self.inside(area, skip),
            length=length,
            uptr=uptr,
            flags=flags,
        )

    def access_release(self) -> None:
        access = self._access()
        if access is None:
            return
        kind = self.rng.random()
        if kind < 0.5 and (access.items or self.coin(0.2)):
            item: Value = self.rng.choice(access.items) if access.items else self.rng.randrange(3)
            self.add("IOMMU_TEST_OP_DESTROY_ACCESS_PAGES", id=access.fd, access_pages_id=item)
        elif kind < 0.75:
            ioas = self._ioas()
            if self.add("IOMMU_TEST_OP_ACCESS_REPLACE_IOAS", id=access.fd, ioas_id=ioas.ref) is not None:
                access.ioas = ioas
        else:
            self.calls.append(Call("close", {"fd": access.fd}))
            self.world.accesses.remove(access)
