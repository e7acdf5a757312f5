"""The mock driver's header, which ships no history: checked against the compiler's facts where they lie."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest

from uapi import iommufd, iommufd_test, registry
from uapi.layout import exists, layout_at, sizes_at, value_at

FACTS = Path(__file__).parents[3] / "shared" / "uapi-facts"


def facts(name: str) -> dict:
    path = FACTS / name
    if not path.is_file():
        pytest.skip(f"{name}, the compiler's facts of the 7.3 kernel source, is not here")
    return json.loads(path.read_text())


def test_mock_driver_abi_equals_the_compilers_facts() -> None:
    expected = facts("iommufd_test-7.3.json")
    structs, constants = registry.structs(registry.TEST_HEADER), registry.constants(registry.TEST_HEADER)
    assert structs.keys() == expected["structs"].keys()
    assert {name: c.value for name, c in constants.items() if exists(c, "7.3")} == {
        name: row["value"] for name, row in expected["constants"].items()
    }
    for name, row in expected["structs"].items():
        layout = layout_at(structs[name])
        assert (layout.size, layout.align) == (row["size"], row["align"])
        assert [(m.name, m.offset, m.size) for m in layout.members] == [
            (m["name"], m["offset"], m["size"]) for m in row["fields"]
        ]
        for member, wanted in zip(layout.members, row["fields"], strict=True):
            check_members(member.members, wanted.get("fields", []))


def check_members(members, wanted) -> None:
    assert [(m.name, m.offset, m.size) for m in members] == [(w["name"], w["abs_offset"], w["size"]) for w in wanted]
    for member, row in zip(members, wanted, strict=True):
        check_members(member.members, row.get("fields", []))


def test_mock_driver_abi_of_6_12_is_that_of_its_header() -> None:
    """Read in the source of 6.12.95 and 6.12.117; the sizes are the compiler's."""
    values = {name: value_at(one, "6.12") for name, one in registry.constants(registry.TEST_HEADER).items()}
    there = {name: value for name, value in values.items() if value is not None}
    operations = [name for name in there if name.startswith("IOMMU_TEST_OP_")]
    assert [there[name] for name in operations] == list(range(1, 16))
    assert operations[-1] == "IOMMU_TEST_OP_TRIGGER_IOPF"
    flags = {name: value for name, value in there.items() if name.startswith("MOCK_FLAGS_DEVICE")}
    assert flags == {"MOCK_FLAGS_DEVICE_NO_DIRTY": 1, "MOCK_FLAGS_DEVICE_HUGE_IOVA": 2}
    assert len(there) == 33
    structs = {name: one for name, one in registry.structs(registry.TEST_HEADER).items() if exists(one, "6.12")}
    assert {name: layout_at(one, "6.12").size for name, one in structs.items()} == {
        "iommu_test_cmd": 72,
        "iommu_test_hw_info": 8,
        "iommu_hwpt_selftest": 4,
        "iommu_hwpt_invalidate_selftest": 8,
    }
    assert sizes_at(iommufd_test.IOMMU_TEST_CMD, "6.12") == (68, 72)


def test_minimum_sizes_equal_the_kernel_sources() -> None:
    for name, row in facts("iommufd_min_size-7.3.json").items():
        ioctl = getattr(iommufd, name, None) or getattr(iommufd_test, name)
        assert (ioctl.min_size, ioctl.size, ioctl.last) == (
            row["min_size"],
            row["full_size"],
            row["last_required_field"],
        )


def test_test_command_reaches_the_unions_members() -> None:
    command = iommufd_test.iommu_test_cmd(size=72, op=iommufd_test.IOMMU_TEST_OP_MOCK_DOMAIN)
    command.mock_domain.out_stdev_id = 7
    assert command.mock_domain_flags.out_stdev_id == 7
    assert ctypes.sizeof(command) == 72
