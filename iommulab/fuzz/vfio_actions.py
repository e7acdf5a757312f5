"""A VFIO device by itself: open, close, what it says of itself, its regions, its interrupts, and what it does."""

from __future__ import annotations

from typing import Any

from conformance.drivers.vfio import CONFIG_REGION, PCI_COMMAND, REGION_SHIFT
from iommulab.fuzz.generator import Generator
from iommulab.fuzz.memory import MEMFD, NULL_FD, PAGE
from iommulab.fuzz.program import MAIN_FD, Call, Value
from iommulab.fuzz.spoil import spoil
from iommulab.fuzz.world import Device, DeviceFile
from uapi import vfio

#: The features of which an ordinary PCI function has all.
LOW_POWER = (3, 4, 5)
#: Answers there are numbers of this machine: where BAR 0 lies, what line the firmware gave to the interrupt.
CHANCE = ((0x10, 0x14), (0x3C, 0x3D))


class VfioActions(Generator):
    """Actions on an open device."""

    #: How many devices the machine has.
    devices = 1

    def on(self, file: DeviceFile, name: str, **fields: Value) -> str | None:
        """An ioctl of a device, perhaps spoiled; "@N." to refer to it, or None where it was spoiled."""
        call = self.sure(name, **fields)
        self.calls[-1].file = file.fd
        return None if self.coin(self.spoiled) and spoil(self.calls[-1], self.world) else call

    def open_device(self) -> DeviceFile:
        """Open a device; now and then one more than there are."""
        number = self.devices if self.coin(0.02) else self.rng.randrange(self.devices)
        self.calls.append(Call("open", {"device": number} if number else {}))
        file = DeviceFile(f"@{len(self.calls) - 1}.fd")
        self.world.files.append(file)
        return file

    def bind(self, file: DeviceFile | None = None) -> DeviceFile:
        """Bind a device to the iommufd."""
        file = file or self.open_device()
        more: dict[str, Value] = {}
        if self.coin(0.04):
            more = {"flags": int(vfio.VFIO_DEVICE_BIND_FLAG_TOKEN), "token_uuid_ptr": "*" + "00" * 16}
        target: Value = MAIN_FD
        if self.coin(0.03):  # to another context, where the program's ids mean something else
            self.calls.append(Call("open", {"device": -1}))
            target = f"@{len(self.calls) - 1}.fd"
        call = self.on(file, "VFIO_DEVICE_BIND_IOMMUFD", iommufd=target, argsz=self.rng.choice((16, 24, 24)), **more)
        if call is not None and not more and file.device is None:
            file.device = Device("", call + "out_devid", 0)
            self.world.devices.append(file.device)
        return file

    def _file(self, bound: bool = True) -> DeviceFile:
        """An open device, bound mostly."""
        files = [file for file in self.world.files if file.device is not None or not bound]
        if not files or self.coin(0.02):
            return self.world.pick(self.world.files) or self.bind()
        return files[-1] if self.coin(0.5) else self.rng.choice(files)

    def open_again(self) -> None:
        """A second file of the device, or a device that was closed before."""
        if len(self.world.files) < 3:
            self.bind(self.open_device() if self.coin(0.5) else self._file(bound=False))

    def close_device(self) -> None:
        file = self.world.pick(self.world.files)
        if file is None:
            return
        self.calls.append(Call("close", {"fd": file.fd}))
        self.world.files.remove(file)
        if file.device in self.world.devices:
            self.world.devices.remove(file.device)

    # -- what it says of itself ----------------------------------------------------------------------------------------

    def device_info(self) -> None:
        self.on(self._file(), "VFIO_DEVICE_GET_INFO", argsz=self.rng.choice((16, 20, 24, 24, 64)))

    def region_info(self) -> None:
        index = self.rng.choice((0, 0, 1, 5, 6, 7, 7, 8, 9, 100))
        self.on(self._file(), "VFIO_DEVICE_GET_REGION_INFO", argsz=self.rng.choice((32, 32, 40, 64)), index=index)

    def irq_info(self) -> None:
        self.on(self._file(), "VFIO_DEVICE_GET_IRQ_INFO", argsz=16, index=self.rng.choice((0, 0, 1, 1, 2, 3, 4, 5, 9)))

    def hot_reset_info(self) -> None:
        self.on(self._file(), "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", argsz=self.rng.choice((12, 12, 16, 28, 64)))

    def reset(self) -> None:
        name = "VFIO_DEVICE_PCI_HOT_RESET" if self.coin(0.2) else "VFIO_DEVICE_RESET"
        if name == "VFIO_DEVICE_RESET":
            self.calls.append(Call(name, {}, file=self._file().fd))
        else:
            self.on(self._file(), name, argsz=12)

    def feature(self) -> None:
        """Probe, read or set a feature; not DMA_BUF, which the model has not."""
        rng = self.rng
        kind = rng.choice((1 << 16, 1 << 17, 1 << 18, 1 << 18, 3 << 17, 5 << 16, 3 << 16, 0))
        number = rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 9, 3, 4, 5, 5, 10, 12, 13, 14, 100))
        if number in LOW_POWER and self.coin(0.6):
            kind = 1 << 17
        more: dict[str, Value] = {f"data{place}": rng.choice((0, 0, 1, 1, 2, 1 << 32)) for place in range(2)}
        if number == vfio.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP and self.coin(0.7):
            # An eventfd that nobody reads: when the device wakes up is chance.
            self.calls.append(Call("eventfd"))
            more = {"data0": f"@{len(self.calls) - 1}.fd"}
        self.on(
            self._file(),
            "VFIO_DEVICE_FEATURE",
            argsz=rng.choice((8, 12, 16, 16, 24, 24, 40)),
            flags=kind | number,
            **more,
        )

    # -- regions -------------------------------------------------------------------------------------------------------

    def read_region(self) -> None:
        """pread of configuration space or BAR 0, not where the answer would be chance."""
        rng = self.rng
        count = rng.choice((1, 2, 4, 4, 4, 8, 3, 16, 64))
        if self.coin(0.75):
            region, place = (
                CONFIG_REGION,
                rng.choice((rng.randrange(0x40), rng.randrange(0x40, 0x60), 0xFC, 0xFE, 0x100)),
            )
            for start, end in CHANCE:
                if place < end and place + count > start:
                    place = end
            for start, _ in CHANCE:
                if place < start < place + count:
                    count = start - place
        else:
            region = rng.choice((0, 0, 0, 1, 6, 8, 9, 200))
            place = rng.choice((0, 0, 0, 0x200, 0x1000, 0xFFFFC, 0x100000 - 2, 0x100000))
            # What is behind the identification remembers earlier programs.
            count = rng.choice((1, 2, 4, 4)) if place == 0 else rng.choice((1, 2, 4, 8, 4))
        self._read(self._file(), region, place, count)

    def _read(self, file: DeviceFile, region: int, place: int, count: int) -> None:
        self.calls.append(Call("pread", {"fd": file.fd, "count": count, "offset": region << REGION_SHIFT | place}))

    def _write(self, file: DeviceFile, region: int, place: int, data: bytes) -> None:
        offset = region << REGION_SHIFT | place
        self.calls.append(Call("pwrite", {"fd": file.fd, "data": "*" + data.hex(), "offset": offset}))

    def write_region(self) -> None:
        """pwrite of configuration space: what VFIO keeps, passes on or throws away; then what is there."""
        rng = self.rng
        count = rng.choice((1, 2, 2, 4, 4, 3))
        place = rng.choice((4, 4, 4, 6, 0xC, 0xD, 0x14, 0x30, 0x3C, 0x40, 0x42, 0x44, 0x48, 0x4C, rng.randrange(0x50)))
        data = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4), b"\6\4\0\0"))[:count]
        file = self._file()
        self._write(file, CONFIG_REGION, place, data)
        if not any(place < end and place + count > start for start, end in CHANCE):
            self._read(file, CONFIG_REGION, place, count)

    def enable(self, file: DeviceFile | None = None) -> None:
        """Memory and bus master on; or one of them."""
        value = self.rng.choice((6, 6, 6, 6, 6, 2, 4, 0x406))
        self._write(file or self._file(), CONFIG_REGION, PCI_COMMAND, value.to_bytes(2, "little"))

    def mmap_region(self) -> None:
        """Map a region until the end."""
        rng = self.rng
        region, place = rng.choice((0, 0, 0, 0, 1, 6, 7, 8, 9)), rng.choice((0, 0, 0, PAGE, 0xFF000, 0x100000))
        length = rng.choice((PAGE, PAGE, 0x100000, 0x100000 - PAGE, 0x100000 + PAGE))
        fields = {"offset": region << REGION_SHIFT | place, "length": length}
        fields |= {"prot": rng.choice((3, 3, 1)), "flags": rng.choice((1, 1, 1, 1, 1, 2))}
        self.calls.append(Call("mmap", fields | {"fd": self._file().fd}))

    def ioeventfd(self) -> None:
        """A store to BAR 0 whenever an eventfd is signalled: to a register that nothing is read from."""
        rng = self.rng
        size = rng.choice((1, 2, 4, 4, 4, 8, 3))
        fd: Value = self._eventfd() if self.coin(0.85) else rng.choice((0xFFFFFFFF, NULL_FD, MEMFD))
        place = rng.choice((4, 4, 4, 0x200, 6, 0xFFFFC, 0x100000))
        more: dict[str, Value] = {"offset": rng.choice((0, 0, 0, 0, 1, 7)) << REGION_SHIFT | place, "fd": fd}
        self.on(self._file(), "VFIO_DEVICE_IOEVENTFD", argsz=32, flags=size, data=rng.choice((0, 1, 1, 77)), **more)

    def eventfd_write(self) -> None:
        """Signal it."""
        self.calls.append(Call("write", {"fd": self._eventfd(), "words": [1, 0]}))

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def _eventfd(self) -> str:
        if not self.world.eventfds or (len(self.world.eventfds) < 3 and self.coin(0.3)):
            self.calls.append(Call("eventfd"))
            self.world.eventfds.append(f"@{len(self.calls) - 1}.fd")
        return self.rng.choice(self.world.eventfds)

    def set_irqs(self, index: int | None = None) -> None:
        """VFIO_DEVICE_SET_IRQS: eventfds, loop back by NONE and BOOL, masks."""
        rng = self.rng
        index = rng.choice((0, 0, 0, 1, 1, 1, 1, 4, 4, 2, 3)) if index is None else index
        start, count, kind, action = 0, 1, 4, 32
        what = rng.random()
        if what < 0.15:  # off
            kind, count = 1, 0
        elif what < 0.3:  # loop back
            kind = rng.choice((1, 2))
        elif what < 0.45:  # masks, by eventfd too
            kind, action = rng.choice((1, 2, 4)), rng.choice((8, 16))
        elif what < 0.55:
            kind, action = rng.choice((1, 2, 4)), rng.choice((8, 16, 32))
            start, count = rng.choice((0, 0, 1)), rng.choice((0, 1, 2))
        more: dict[str, Any] = {}
        size = 20
        if kind == 2:
            size += count
            more = {"data0": rng.choice((0, 1, 0x0101, 1))} if count else {}
        elif kind == 4:
            size += 4 * count
            for place in range(count):
                odd: tuple[Value, ...] = (0xFFFFFFFF, NULL_FD, MEMFD)
                more[f"data{place}"] = self._eventfd() if self.coin(0.85) else rng.choice(odd)
        file = self._file()
        self.on(
            file, "VFIO_DEVICE_SET_IRQS", argsz=size, flags=kind | action, index=index, start=start, count=count, **more
        )

    def eventfd_read(self) -> None:
        """How often it was signalled."""
        fd = self._eventfd()
        if self.coin(0.8):
            self.calls.append(Call("read", {"fd": fd, "count": 8}))
        else:
            self.calls.append(Call("poll", {"fd": fd}))

    # -- what it does --------------------------------------------------------------------------------------------------

    def edu_irq(self) -> None:
        file = self._file()
        self.calls.append(Call("edu_irq", {"fd": file.fd, "bits": self.rng.choice((1, 2, 0x80, 0xFFFFFFFF))}))
        for fd in self.world.eventfds:
            self.calls.append(Call("read", {"fd": fd, "count": 8}))

    def edu_liveness(self) -> None:
        self.calls.append(Call("edu_liveness", {"fd": self._file().fd, "value": self.rng.getrandbits(32)}))

    def edu_copy(self, file: DeviceFile | None = None) -> None:
        """DMA between what is mapped where the device is attached, or where nothing is."""
        file = file or self._file()
        areas = file.ioas.areas if file.ioas is not None else []
        if (not areas and self.coin(0.9)) or sum(call.name == "edu_copy" for call in self.calls) >= 3:
            return
        count = self.rng.choice((1, 8, 64, 512, 2048, PAGE, PAGE))
        places: list[Value] = []
        for _ in range(2):
            area = self.world.pick(areas)
            if area is None or self.coin(0.12):
                places.append(self.rng.choice((0, PAGE, 0x12345, 1 << 39, 1 << 48, (1 << 64) - PAGE)))
                continue
            skip = self.rng.choice((0, 0, 0, 8, 100, PAGE - 64, PAGE, 2 * PAGE, -8, -PAGE))
            places.append(self.inside(area, skip))
        self.calls.append(Call("edu_copy", {"fd": file.fd, "source": places[0], "target": places[1], "count": count}))
