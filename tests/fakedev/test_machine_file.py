"""Machine files: what they build, that the page's example is one, and a sentence for each kind of nonsense."""

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from fakedev.machines.file import MachineFileError, build, load
from fakedev.smmuv3.unit import SmmuV3
from fakedev.vtd.unit import VtdUnit

PAGE = Path(__file__).parents[2] / "docs/machines.md"
IOMMU = '[[iommu]]\nkind = "vtd"\n'


def device(address="0000:00:10.0", kind="edu", more=""):
    return f'[[device]]\nkind = "{kind}"\naddress = "{address}"\n{more}\n'


def bridge(address="0000:00:01.0", buses="[1]", kind="root-port", more=""):
    return f'[[bridge]]\nkind = "{kind}"\naddress = "{address}"\nbuses = {buses}\n{more}\n'


@pytest.fixture
def written(tmp_path):
    """Build a machine from text; close it afterwards."""
    boxes = []

    def write(text):
        path = tmp_path / "lab.toml"
        path.write_text(text, encoding="utf-8")
        boxes.append(load(path))
        return boxes[-1]

    yield write
    for box in boxes:
        box.close()


def test_the_example_of_the_page_is_a_machine(written):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    box = written(text)
    assert (box.name, box.memory.ram_end) == ("lab", 512 << 20)
    assert [function.address for function in box.functions] == [
        "0000:00:01.0",
        "0000:00:10.0",
        "0000:01:00.0",
        "0000:02:00.0",
        "0000:03:00.0",
    ]
    assert box.function("0000:00:10.0").dma.iommu is None
    assert box.function("0000:03:00.0").dma.iommu is box.units[0]
    assert box.units[0].caps.fault_records == 4


def test_an_empty_file_is_memory_and_nothing_else(written):
    box = written("")
    assert (box.name, box.functions, box.units, box.memory.ram_end) == ("lab", [], [], 2 << 30)


def test_registers_get_places_that_do_not_overlap(written):
    box = written(
        IOMMU + device("0000:00:02.0", "dsa") + device(more="bar = 0xc0000000") + device("0000:00:03.0", "inert")
    )
    ranges = sorted(span for function in box.functions for span in function.decoded())
    assert len(ranges) == 4
    assert all(base + size <= other for (base, size), (other, _) in pairwise(ranges))


def test_two_iommus_have_the_functions_that_name_them(written):
    second = '[[iommu]]\nkind = "vtd"\nname = "other"\nbase = 0xfed91000\npreset = "scalable"\n'
    box = written(IOMMU + second + device(more='iommu = "other"') + device("0000:00:11.0", more='iommu = "iommu1"'))
    assert box.vtd_units == [(0xFED9_0000, [0x88]), (0xFED9_1000, [0x80])]
    assert box.units[1].caps.scalable


def test_an_smmu_is_built_with_its_features(written):
    box = written('[[iommu]]\nkind = "smmuv3"\nfeatures = { oas = 40, pri = false, granules = [12, 16] }\n' + device())
    assert isinstance(box.units[0], SmmuV3)
    assert box.smmu_units[0][1] == [0x80]
    assert (box.memory.address_bits, box.memory.ram_start, box.its) == (40, 1 << 30, 0x808_0000)
    assert box.functions[0].bar_address(0) == 0x1000_0000


def test_a_board_without_an_iommu_is_the_one_that_the_file_names(written):
    box = written('board = "virt"\nram = "16 MiB"\n' + device())
    assert (box.memory.ram_start, box.memory.ram_end, box.units) == (1 << 30, (1 << 30) + (16 << 20), [])
    assert box.memory.address_bits == 52


def test_functions_of_one_slot_say_so(written):
    box = written(IOMMU + device(kind="dsa") + device("0000:00:10.1"))
    assert all(function.config_read(0x0E, 1) == 0x80 for function in box.functions)


def test_bus_master_is_on_where_the_firmware_left_it(written):
    box = written(IOMMU + device(more="bus_master = true") + device("0000:00:11.0"))
    assert [function.dma.enabled for function in box.functions] == [True, False]


def test_a_name_is_a_machine_as_before(tmp_path):
    box = build("q35-vtd-legacy")
    assert isinstance(box.units[0], VtdUnit)
    box.close()
    with pytest.raises(ValueError, match="no machine 'toaster'"):
        build("toaster")


NONSENSE = [
    ("name = ", "is not TOML"),
    ("machine = 1", "unknown key 'machine'"),
    ("name = 1", "'name' is a string, not 1"),
    ('ram = "lots"', "'ram' is a number of bytes"),
    ("ram = true", "'ram' is a number of bytes"),
    ("ram = 5", "not a multiple of 4 KiB"),
    ('ram = "4 GiB"', "not a multiple of 4 KiB up to 0x80000000"),
    ("iommu = 1", "'iommu' is a list of tables"),
    ("[[iommu]]", "iommu 1: 'kind' is missing"),
    ('[[iommu]]\nkind = "amd"', "'kind' is \"vtd\" or \"smmuv3\", not 'amd'"),
    (IOMMU + "base = 0x123", "'base' 0x123 is no multiple of 0x1000"),
    (IOMMU + "base = true", "'base' is an integer, not True"),
    (IOMMU + 'name = "none"', "the name 'none' is taken"),
    (IOMMU + IOMMU, "overlap those of iommu1"),
    (IOMMU + 'preset = "fancy"', "no preset 'fancy'; there are legacy, scalable"),
    (IOMMU + "features = { warp = 9 }", "no feature 'warp'"),
    (IOMMU + 'features = { cm = "on" }', "the feature 'cm' is of type int, not 'on'"),
    (IOMMU + "features = { nest = 1 }", "'features': nest needs"),
    ('[[iommu]]\nkind = "smmuv3"\npreset = "legacy"', "no preset 'legacy'; there are everything, qemu"),
    ('board = "pi"', "no board 'pi'; there are pc, virt"),
    ('board = "virt"\n' + IOMMU, "'vtd' is not on this board, which has 'smmuv3'"),
    (IOMMU + '[[iommu]]\nkind = "smmuv3"', "'smmuv3' is not on this board, which has 'vtd'"),
    ('board = "virt"\nram = "2 GiB"', "not a multiple of 4 KiB up to 0x80000000"),
    ('board = "virt"\n' + device(more="bar = 0xc0000000"), "from 0x10000000 to 0x3eff0000"),
    ('[[iommu]]\nkind = "smmuv3"\nfeatures = { oas = 33 }', "output addresses of 33 bits"),
    ('[[device]]\nkind = "edu"', "'address' is as \"0000:00:10.0\""),
    (device("00:10.0"), "'address' is as"),
    (device("0001:00:10.0"), "segment 0"),
    (device("0000:00:20.0"), "'address' is as"),
    (device(kind="toaster"), "device 1 (0000:00:10.0): 'kind' is one of edu"),
    (device(more="colour = 1"), "unknown key 'colour'"),
    (
        device(more='properties = ["dma-can-fly"]'),
        "no property 'dma-can-fly' of the firmware; there are dma-can-",
    ),
    (device(more="properties = 1"), "'properties' is a list, not 1"),
    (device(more="ats = false"), "'ats' is a key of the kind \"dsa\""),
    (device() + device(), "device 2 (0000:00:10.0): device 1 (0000:00:10.0) is there already"),
    (device("0000:00:10.1"), "0000:00:10.1 needs a function 0 in its slot"),
    (device(more='iommu = "dmar9"'), "there is no iommu 'dmar9'; there are none"),
    (device(more="iommu = 1"), "'iommu' is a string, not 1"),
    (IOMMU + '[[iommu]]\nkind = "vtd"\nbase = 0xfed91000\n' + device(), "'iommu' says which: iommu1, iommu2 or none"),
    (device(more="bar = 0x1000"), "'bar' 0x1000 is no multiple of"),
    (device(more="bar = 0x7ff00000"), "'bar' 0x7ff00000 is no multiple of"),
    (device(more="bar = 0xc0000000") + device("0000:00:11.0", more="bar = 0xc0000000"), "overlap those of device 1"),
    (device("0000:03:00.0"), "device 1 (0000:03:00.0): no bridge leads to bus 03"),
    (bridge(kind="tunnel"), "'kind' is one of root-port"),
    (bridge(buses="[]"), "'buses' are the bus behind it and the last one"),
    (bridge(buses='["1"]'), "'buses' are the bus behind it and the last one"),
    (bridge(buses="[2, 1]"), "a bridge from bus 00 to 02-01"),
    (bridge(buses="[1, 300]"), "a bridge from bus 00 to 01-12c"),
    (bridge(more='acs = ["xx"]'), "no access control service 'xx'"),
    (bridge(more="acs = [[1]]"), "no access control service [1]"),
    ('[[iommu]]\nkind = "smmuv3"\nfeatures = { granules = [[1]] }', "'features': "),
    (bridge() + bridge("0000:00:02.0"), "two bridges lead to bus 01"),
    (bridge(buses="[1, 3]") + bridge("0000:00:02.0", "[2, 4]"), "its buses overlap those of bridge 0000:00:01.0"),
    (bridge() + bridge("0000:01:00.0", "[2]", "upstream-port"), "buses to 02 are not behind bridge 0000:00:01.0"),
    (bridge(buses="[1, 2]") + bridge("0000:01:00.0", "[2]"), "a root-port is on bus 00"),
    (bridge(kind="upstream-port"), "an upstream-port is behind a root-port or a downstream-port"),
    (bridge(kind="downstream-port"), "a downstream-port is behind an upstream-port"),
    (bridge(kind="pci", more='acs = ["sv"]'), "'acs' is a key of root and downstream ports"),
    (IOMMU + "base = 0x1000", "its registers at 0x1000 overlap RAM"),
    (IOMMU + "base = 0xfee01000", "its registers at 0xfee01000 overlap interrupts"),
    ('[[iommu]]\nkind = "smmuv3"\nbase = 0x8090000', "its registers at 0x8090000 overlap the GIC's ITS"),
    ("name = " + "[" * 5000, "is nested too deeply"),
]


@pytest.mark.parametrize(("text", "sentence"), NONSENSE, ids=[sentence for _, sentence in NONSENSE])
def test_nonsense_is_one_sentence_that_names_the_file(written, text, sentence):
    with pytest.raises(MachineFileError) as caught:
        written(text)
    message = str(caught.value)
    assert sentence in message
    assert message.count("lab.toml: ") == 1
    assert "\n" not in message


def test_a_file_that_is_not_there_or_no_text_is_one_sentence(tmp_path):
    with pytest.raises(MachineFileError, match="cannot be read: no such file or directory"):
        load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(MachineFileError, match="is not UTF-8"):
        load(tmp_path / "bytes.toml")
    with pytest.raises(MachineFileError, match="cannot be read: is a directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(MachineFileError, match="cannot be read: not a file"):
        load(tmp_path / "pipe.toml")
    with pytest.raises(MachineFileError, match="cannot be read: not a file"):
        load("/dev/zero")
