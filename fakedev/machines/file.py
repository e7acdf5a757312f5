"""Machines from TOML files: users' own topologies.

`load(path)` builds one; `build(name)` takes a path that ends in ".toml", or a name of `fakedev.machines.named`. What a
file may say is in docs/machines.md and in the tables below; whatever is wrong with it is a `MachineFileError`, one
sentence that names the file, the table and what would be right.

Left out: functions in other PCI segments, RAM elsewhere than from 0.
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from fakedev.bridge import ACS_ALL, KINDS, PciBridge
from fakedev.dma import MSI_END, MSI_START
from fakedev.endpoints.dsa import MMIO_SIZE as DSA_MMIO_SIZE
from fakedev.endpoints.dsa import PORTALS_SIZE, Dsa
from fakedev.endpoints.edu import BAR_SIZE as EDU_BAR_SIZE
from fakedev.endpoints.edu import Edu
from fakedev.endpoints.hostile import Hostile
from fakedev.endpoints.iommu_testdev import BAR_SIZE as TESTDEV_BAR_SIZE
from fakedev.endpoints.iommu_testdev import IommuTestdev
from fakedev.machine import SMMU_BASE, VTD_BASE, VTD_LEGACY_CAP, VTD_LEGACY_ECAP, Machine
from fakedev.machines import virt
from fakedev.machines.named import machine
from fakedev.memory import ADDRESS_BITS, LOW_RAM_LIMIT, PhysicalMemory
from fakedev.pci import MEM32, Bar, PciFunction, rid_of
from fakedev.pcie import PCI_EXP_TYPE_ENDPOINT, PCI_EXP_TYPE_RC_END
from fakedev.smmuv3.regs import QEMU_VIRT
from fakedev.smmuv3.regs import Features as SmmuFeatures
from fakedev.smmuv3.unit import SmmuV3
from fakedev.vtd.features import SCALABLE
from fakedev.vtd.features import Features as VtdFeatures
from fakedev.vtd.unit import VtdUnit

Table: TypeAlias = dict[str, Any]
Unit: TypeAlias = VtdUnit | SmmuV3

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MACHINE_KEYS = {"name", "board", "ram", "kernel_arguments", "iommu", "device", "bridge"}
_IOMMU_KEYS = {"name", "kind", "base", "preset", "features"}
_DEVICE_KEYS = {"kind", "address", "iommu", "bar", "bus_master", "properties", "ats"}
#: What the firmware may say of a device.
_PROPERTIES = ("dma-can-stall", "canwbs")
_BRIDGE_KEYS = {"kind", "address", "buses", "iommu", "acs"}
#: Where ports of PCI Express are: behind which kinds of bridges, and in words.
_PLACES: dict[str, tuple[tuple[str | None, ...], str]] = {
    "root-port": ((None,), "a root-port is on bus 00"),
    "upstream-port": (("root-port", "downstream-port"), "an upstream-port is behind a root-port or a downstream-port"),
    "downstream-port": (("upstream-port",), "a downstream-port is behind an upstream-port"),
}
_ACS_BITS = {"sv": 1, "tb": 2, "rr": 4, "cr": 8, "uf": 0x10, "dt": 0x40}


@dataclass(frozen=True)
class _Board:
    """What lies where around the IOMMUs: RAM, the BARs that the file gives no address, the doorbell of MSIs."""

    iommu: str
    ram_start: int
    ram: str
    bars_start: int
    bars_end: int
    its: int | None = None
    host_bridge: str = ""

    @property
    def bars_low(self) -> int:
        """Below are no BARs."""
        return LOW_RAM_LIMIT if self.its is None else self.bars_start


_BOARDS = {
    "pc": _Board("vtd", 0, "2 GiB", 0xC000_0000, 0xFEC0_0000),
    "virt": _Board("smmuv3", virt.RAM_START, "1 GiB", virt.BARS, virt.BARS_END, virt.ITS_BASE, virt.HOST_BRIDGE),
}


class MachineFileError(ValueError):
    """What is wrong with a machine file, in one sentence."""


class _Where:
    """A table of the file, for messages."""

    def __init__(self, file: str, what: str = "") -> None:
        self.file = file
        self.what = what

    def error(self, text: str) -> MachineFileError:
        return MachineFileError(f"{self.file}: {self.what + ': ' if self.what else ''}{text}")

    def keys(self, table: Table, known: set[str], needed: tuple[str, ...] = ()) -> None:
        for key in table:
            if key not in known:
                raise self.error(f"unknown key {key!r}; there are {', '.join(sorted(known))}")
        for key in needed:
            if key not in table:
                raise self.error(f"{key!r} is missing")

    def get(self, table: Table, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, of the right type (a bool is no int)."""
        value = table.get(key, default)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        names = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "a table"}
        raise self.error(f"{key!r} is {names[kind]}, not {value!r}")

    def tables(self, table: Table, key: str) -> list[Table]:
        found = table.get(key, [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self.error(f"{key!r} is a list of tables, each of which begins with [[{key}]]")
        return found


def build(name: str) -> Machine:
    """A new machine: of a file if `name` ends in ".toml", else of that name. ValueError, MachineFileError."""
    return load(name) if name.endswith(".toml") else machine(name)


def load(path: str | Path) -> Machine:
    """The machine that the file at `path` describes. MachineFileError for whatever is wrong with it."""
    where = _Where(str(path))
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
            raise where.error("cannot be read: not a file")  # a pipe or a device might never end
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise where.error(f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise where.error("is not UTF-8") from error
    except RecursionError as error:
        raise where.error("is nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        raise where.error(f"is not TOML: {str(error)[0].lower()}{str(error)[1:]}") from error
    where.keys(table, _MACHINE_KEYS)
    name = where.get(table, "name", str, Path(path).stem)
    arguments = where.get(table, "kernel_arguments", str, "")
    # Everything is looked at before memory is taken.
    plan = _Plan(where, table)
    board = plan.board
    try:
        memory = PhysicalMemory(plan.ram, board.ram_start, address_bits=plan.address_bits)
    except ValueError as error:
        raise where.error(f"'ram': {error}") from error
    box = Machine(name, memory, arguments, its=board.its, host_bridge=board.host_bridge)
    try:
        plan.furnish(box)
    except BaseException:
        box.close()
        raise
    return box


def _ram(where: _Where, value: object) -> int:
    if isinstance(value, str):
        number, _, unit = value.partition(" ")
        if number.isdecimal() and unit in _UNITS:
            return int(number) * _UNITS[unit]
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise where.error(f"'ram' is a number of bytes, or as \"512 MiB\", up to {LOW_RAM_LIMIT >> 30} GiB, not {value!r}")


class _Plan:
    """A file that has been read: what to add to a machine, in which order."""

    def __init__(self, where: _Where, table: Table) -> None:
        self._where = where
        self._units: dict[str, Callable[[Machine], Unit]] = {}
        self._functions: list[tuple[_Where, Table, bool]] = []
        self.board = self._board(table)
        self.ram = _ram(where, table.get("ram", self.board.ram))
        #: What is taken of the address space: from, to, whose. Registers come on top.
        its = self.board.its
        self._bases = [
            (self.board.ram_start, self.board.ram_start + self.ram, "RAM"),
            (MSI_START, MSI_END, "interrupts") if its is None else (its, its + virt.ITS_SIZE, "the GIC's ITS"),
        ]
        #: Of physical addresses that every unit can put out.
        self.address_bits = ADDRESS_BITS
        self._next_bar = self.board.bars_start
        for number, one in enumerate(where.tables(table, "iommu"), 1):
            self._iommu(number, one)
        for key in ("bridge", "device"):
            for number, one in enumerate(where.tables(table, key), 1):
                place = f" ({one['address']})" if isinstance(one.get("address"), str) else ""
                self._functions.append((_Where(where.file, f"{key} {number}{place}"), one, key == "bridge"))

    def _board(self, table: Table) -> _Board:
        """The board that the file names, else the one that its first IOMMU belongs on."""
        first = next(iter(self._where.tables(table, "iommu")), {})
        name = self._where.get(table, "board", str, "virt" if first.get("kind") == "smmuv3" else "pc")
        if name not in _BOARDS:
            raise self._where.error(f"no board {name!r}; there are {', '.join(_BOARDS)}")
        return _BOARDS[name]

    def _iommu(self, number: int, table: Table) -> None:
        where = _Where(self._where.file, f"iommu {number}")
        where.keys(table, _IOMMU_KEYS, ("kind",))
        name = where.get(table, "name", str, f"iommu{number}")
        if name in self._units or name == "none":
            raise where.error(f"the name {name!r} is taken")
        kind = where.get(table, "kind", str)
        changes = where.get(table, "features", dict, {})
        preset = where.get(table, "preset", str)
        if kind == "vtd":
            size, base = 0x1000, where.get(table, "base", int, VTD_BASE)
            presets = {"legacy": VtdFeatures.of(VTD_LEGACY_CAP, VTD_LEGACY_ECAP), "scalable": SCALABLE}
            features = self._features(where, presets.get(preset or "legacy"), preset, list(presets), changes)
            self._units[name] = lambda box: box.add_vtd(base, features.cap, features.ecap)
        elif kind == "smmuv3":
            size, base = 0x20000, where.get(table, "base", int, SMMU_BASE)
            if isinstance(changes.get("granules"), list):
                changes = {**changes, "granules": tuple(changes["granules"])}
            known = {"everything": SmmuFeatures(), "qemu": QEMU_VIRT}
            chosen = self._features(where, known.get(preset or "everything"), preset, list(known), changes)
            self.address_bits = min(self.address_bits, chosen.oas)
            self._units[name] = lambda box: box.add_smmu(base, chosen)
        else:
            raise where.error(f'\'kind\' is "vtd" or "smmuv3", not {kind!r}')
        if kind != self.board.iommu:
            raise where.error(f"{kind!r} is not on this board, which has {self.board.iommu!r}")
        aligned = min(size, 0x10000)
        if base % aligned or not 0 <= base < 1 << 52:
            raise where.error(f"'base' {base:#x} is no multiple of {aligned:#x} below 2**52")
        for other, end, whose in self._bases:
            if base < end and other < base + size:
                raise where.error(f"its registers at {base:#x} overlap {whose}")
        self._bases.append((base, base + size, f"those of {name}"))

    def _features(self, where: _Where, start: Any, preset: str | None, presets: list[str], changes: Table) -> Any:
        if start is None:
            raise where.error(f"no preset {preset!r}; there are {', '.join(presets)}")
        known_fields = {field.name: type(getattr(start, field.name)) for field in fields(start)}
        for key, value in changes.items():
            if key not in known_fields:
                raise where.error(f"no feature {key!r}; there are {', '.join(sorted(known_fields))}")
            if type(value) is not known_fields[key]:
                raise where.error(f"the feature {key!r} is of type {known_fields[key].__name__}, not {value!r}")
        try:
            return replace(start, **changes)
        except (ValueError, TypeError) as error:
            raise where.error(f"'features': {error}") from error

    # -- functions ---------------------------------------------------------------------------------------------------

    def furnish(self, box: Machine) -> None:
        """Add units, bridges and devices to an empty machine."""
        units = {name: add(box) for name, add in self._units.items()}
        seen: dict[str, _Where] = {}
        slots = self._slots()
        made: list[tuple[_Where, Table, PciFunction]] = []
        # Registers with a place of their own come first; the others go around them.
        for where, table, is_bridge in sorted(self._functions, key=lambda one: "bar" not in one[1]):
            where.keys(table, _BRIDGE_KEYS if is_bridge else _DEVICE_KEYS, ("kind", "address"))
            address = where.get(table, "address", str)
            if address in seen:
                raise where.error(f"{seen[address].what} is there already")
            seen[address] = where
            try:
                function = self._bridge(where, table) if is_bridge else self._device(where, table)
            except MachineFileError:
                raise
            except ValueError as error:
                raise where.error(str(error)) from error
            if len(slots[address[:-2]]) > 1:
                function.set_multifunction()
            made.append((where, table, function))
        # A bridge comes before what is behind it.
        for where, table, function in sorted(made, key=lambda one: (one[2].rid >> 8, one[2].rid)):
            if any(other.secondary == function.secondary for other in box.functions if function.secondary):
                raise where.error(f"two bridges lead to bus {function.secondary:02x}")
            box.add(function, self._unit_of(where, table, units), self._properties(where, table))
            above = box.root.upstream(function)
            if function.rid >> 8 and not above:
                raise where.error(f"no bridge leads to bus {function.rid >> 8:02x}")
            if isinstance(function, PciBridge):
                self._fits(where, table["kind"], function, above, box)

    def _fits(self, where: _Where, kind: str, bridge: PciBridge, above: list[PciFunction], box: Machine) -> None:
        """MachineFileError for a bridge that can be nowhere, or not there."""
        parent = above[0].address if above else None
        parents = {one["address"]: one["kind"] for _, one, is_bridge in self._functions if is_bridge}
        if kind in _PLACES and parents.get(parent or "") not in _PLACES[kind][0]:
            raise where.error(_PLACES[kind][1])
        if above and bridge.subordinate > above[0].subordinate:
            raise where.error(f"buses to {bridge.subordinate:02x} are not behind bridge {parent}")
        for other in box.functions:
            beside = isinstance(other, PciBridge) and other is not bridge and other not in above
            if beside and bridge.secondary <= other.subordinate and other.secondary <= bridge.subordinate:
                raise where.error(f"its buses overlap those of bridge {other.address}")

    def _slots(self) -> dict[str, set[str]]:
        slots: dict[str, set[str]] = {}
        for where, table, _ in self._functions:
            address = where.get(table, "address", str, "")
            try:
                rid_of(address)
            except ValueError:
                raise where.error("'address' is as \"0000:00:10.0\": segment 0, bus, device, function") from None
            slots.setdefault(address[:-2], set()).add(address)
        for slot, addresses in slots.items():
            if f"{slot}.0" not in addresses:
                raise self._where.error(f"{min(addresses)} needs a function 0 in its slot, or no scan finds it")
        return slots

    def _unit_of(self, where: _Where, table: Table, units: dict[str, Unit]) -> Unit | None:
        name = where.get(table, "iommu", str)
        if name == "none" or (name is None and not units):
            return None
        if name is None:
            if len(units) > 1:
                raise where.error(f"'iommu' says which: {', '.join(units)} or none")
            return next(iter(units.values()))
        if name not in units:
            raise where.error(f"there is no iommu {name!r}; there are {', '.join([*units, 'none'])}")
        return units[name]

    def _properties(self, where: _Where, table: Table) -> list[str]:
        names: list[str] = where.get(table, "properties", list, [])
        for name in names:
            if name not in _PROPERTIES:
                raise where.error(f"no property {name!r} of the firmware; there are {', '.join(_PROPERTIES)}")
        return names

    def _bridge(self, where: _Where, table: Table) -> PciBridge:
        kind = where.get(table, "kind", str)
        if kind not in KINDS:
            raise where.error(f"'kind' is one of {', '.join(KINDS)}, not {kind!r}")
        buses = where.get(table, "buses", list)
        if not buses or len(buses) > 2 or not all(type(bus) is int for bus in buses):
            raise where.error("'buses' are the bus behind it and the last one: [1] or [1, 4]")
        acs = ACS_ALL
        if "acs" in table:
            if kind not in ("root-port", "downstream-port"):
                raise where.error("'acs' is a key of root and downstream ports")
            names = where.get(table, "acs", list)
            unknown = [name for name in names if not isinstance(name, str) or name not in _ACS_BITS]
            if unknown:
                raise where.error(f"no access control service {unknown[0]!r}; there are {', '.join(_ACS_BITS)}")
            acs = sum(_ACS_BITS[name] for name in set(names))
        return PciBridge(table["address"], *buses, kind=kind, acs=acs)

    def _device(self, where: _Where, table: Table) -> PciFunction:
        kind, address = where.get(table, "kind", str), table["address"]
        command = 0x103 | (4 if where.get(table, "bus_master", bool, False) else 0)
        express = PCI_EXP_TYPE_ENDPOINT if rid_of(address) >> 8 else PCI_EXP_TYPE_RC_END
        if "ats" in table and kind != "dsa":
            raise where.error("'ats' is a key of the kind \"dsa\"")
        if kind == "edu":
            return Edu(address, self._bar(where, table, EDU_BAR_SIZE), 10, command)
        if kind == "iommu-testdev":
            return IommuTestdev(address, self._bar(where, table, TESTDEV_BAR_SIZE), command)
        if kind == "dsa":
            first = self._bar(where, table, max(DSA_MMIO_SIZE, PORTALS_SIZE) * 2)
            ats = where.get(table, "ats", bool, True)
            return Dsa(address, first, first + PORTALS_SIZE, command=command, ats=ats, kind=express)
        if kind == "hostile":
            return Hostile(address, kind=express, command=command)
        if kind == "inert":
            return PciFunction(
                address,
                (0x1B36, 0x0001),
                0xFF0000,
                bars=[Bar(4096, MEM32)],
                addresses=[self._bar(where, table, 4096)],
                command=command,
            )
        raise where.error(f"'kind' is one of edu, iommu-testdev, dsa, hostile, inert, not {kind!r}")

    def _bar(self, where: _Where, table: Table, size: int) -> int:
        """Where the device's registers are: what the file says, else the next free place."""
        base = where.get(table, "bar", int)
        if base is None:
            base = -(-self._next_bar // size) * size
            while any(base < end and other < base + size for other, end, _ in self._bases):
                base += size
            self._next_bar = base + size
        low, end = self.board.bars_low, self.board.bars_end
        if base % size or not low <= base <= end - size:
            raise where.error(f"'bar' {base:#x} is no multiple of {size:#x} from {low:#x} to {end:#x}")
        for other, end, whose in self._bases:
            if base < end and other < base + size:
                raise where.error(f"its registers at {base:#x} overlap {whose}")
        self._bases.append((base, base + size, f"those of {where.what}"))
        return int(base)
