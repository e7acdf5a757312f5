"""The emulation beside the manuals' lists: all of it is there, or in docs/hardware.md as what is not; never both."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fakedev.memory import PhysicalMemory
from fakedev.smmuv3.regs import Features
from fakedev.smmuv3.unit import SmmuV3
from fakedev.vtd import descriptors, faults, features
from fakedev.vtd.unit import VtdUnit
from tests.fakedev import manuals

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hardware.md").read_text()


def listed(heading: str) -> set[str]:
    """What the first cells of the table under a heading name, between backticks."""
    start = PAGE.index(f"\n### {heading}\n")
    section = PAGE[start : PAGE.index("\n##", start + 5)]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def hexadecimal(words: set[str]) -> set[int]:
    """The numbers of "27h" and "100h-118h"; a range is of those that the manual has."""
    found = set()
    for word in words:
        first, _, last = word.replace("h", "").partition("-")
        found |= set(range(int(first, 16), int(last or first, 16) + 1))
    return found


@pytest.fixture
def vtd():
    memory = PhysicalMemory(1 << 20)
    has_all = replace(features.SCALABLE, plmr=1, phmr=1, fro=0xF0, iro=0xE8)
    yield VtdUnit(memory, has_all.cap, has_all.ecap, send_interrupt=lambda *_: None)
    memory.close()


@pytest.fixture
def smmu():
    memory = PhysicalMemory(1 << 20)
    yield SmmuV3(memory, Features(), send_interrupt=lambda *_: None)
    memory.close()


# ---------------------------------------------------------------------------------------------------------------- VT-d


def test_vtd_capabilities_lie_where_the_manual_has_them():
    for register, fields in enumerate((manuals.VTD_CAP, manuals.VTD_ECAP)):
        ours = {
            name: (low + bits - 1, low) for name, (which, low, bits) in features._LAYOUT.items() if which == register
        }
        assert ours == fields


def test_vtd_capabilities_that_no_unit_may_have():
    assert listed("Capabilities of VT-d") == set(features.ABSENT)
    for name in features.ABSENT:
        with pytest.raises(ValueError, match=f"{name} (is not emulated|needs)"):
            features.Features(**{name: 1})


def test_vtd_registers(vtd):
    at = {register.offset for register in vtd.registers.by_name.values()}
    where_capabilities_say = {0xE80, 0xE88, *range(0xF00, 0xF80, 8)}
    assert at - where_capabilities_say <= manuals.VTD_REGISTERS
    missing = hexadecimal(listed("Registers of VT-d")) & manuals.VTD_REGISTERS
    assert manuals.VTD_REGISTERS - at == missing


def test_vtd_descriptors():
    ours = {value for name, value in vars(descriptors).items() if name.endswith("_TYPE") and name != "PRQ_TYPE"}
    assert manuals.VTD_DESCRIPTORS - ours == hexadecimal(listed("Descriptors of VT-d"))
    assert ours <= manuals.VTD_DESCRIPTORS


def test_vtd_fault_reasons():
    ours = set(faults.REASONS)
    assert ours <= manuals.VTD_REASONS
    assert manuals.VTD_REASONS - ours == hexadecimal(listed("Fault reasons of VT-d"))


def test_vtd_fault_reasons_are_all_in_use():
    names = {name for name, value in vars(faults).items() if isinstance(value, int) and name.isupper()}
    names -= {"UNTRANSLATED", "TRANSLATION", "TRANSLATED", "READ", "WRITE", "EXECUTE", "PRIVILEGED", "NO_PASID"}
    assert names == {name for name in names if name in used("vtd", "faults")}


# -------------------------------------------------------------------------------------------------------------- SMMUv3


def used(folder: str, module: str) -> set[str]:
    """The names of a module of constants that the other modules of its folder mention."""
    found = set()
    for path in (ROOT / "fakedev" / folder).glob("*.py"):
        if path.stem == module:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Name):
                found.add(node.id)
    return found


def test_smmu_commands(smmu):
    ours = {opcode: manuals.SMMU_COMMANDS[opcode] for opcode in smmu._commands._table}
    assert set(manuals.SMMU_COMMANDS.values()) - set(ours.values()) == listed("Commands of SMMUv3")


def test_smmu_events():
    mentioned = used("smmuv3", "events")
    never = {name for name in manuals.SMMU_EVENTS.values() if name not in mentioned}
    assert never == listed("Events of SMMUv3")


def test_smmu_identification():
    everything = [
        Features(sev=True, vax52=True, small_tables=True, oas=52, arch_minor=4),
        Features(stall_model=2, httu=1, bbm=1),
    ]
    never = set()
    for name, fields in manuals.SMMU_IDENTIFICATION.items():
        value = 0
        for one in everything:
            value |= getattr(one, name.lower(), 0)
        for field, (high, low) in fields.items():
            if not value >> low & (1 << high - low + 1) - 1:
                never.add(f"{name}.{field}")
        known = sum((1 << high - low + 1) - 1 << low for high, low in fields.values())
        assert not value & ~known
    assert never == listed("Identification of SMMUv3")


def test_smmu_registers(smmu):
    ours = {register.offset: register.name for register in smmu.registers.by_name.values()}
    assert ours.items() <= manuals.SMMU_REGISTERS.items()
    assert set(manuals.SMMU_REGISTERS.values()) - set(ours.values()) == listed("Registers of SMMUv3")
