"""The selected PCI register names against this host's own header, by its preprocessor."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from uapi import pci_regs
from uapi.headers import HeaderError, compiler

NAMES = {name: value for name, value in vars(pci_regs).items() if name.startswith("PCI_")}
HEADER = Path("/usr/include/linux/pci_regs.h")


def test_every_name_that_the_hosts_header_has_has_its_value() -> None:
    if not HEADER.is_file():
        pytest.skip("this host has no linux/pci_regs.h: install linux-libc-dev")
    try:
        command = [compiler(), "-E", "-P", "-xc", "-"]
    except HeaderError as error:
        pytest.skip(str(error))
    source = "#include <linux/pci_regs.h>\n" + "".join(f'"@" "{name}" {name}\n' for name in NAMES)
    out = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, text in re.findall(r'"@" "(\w+)" (.+)', out):
        if text != name:
            number = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)[uUlL]+\b", r"\1", text)
            found[name] = eval(number, {"__builtins__": {}})
    assert len(found) > 0.9 * len(NAMES), "the selection and the host's header hardly overlap"
    assert found == {name: NAMES[name] for name in found}


def test_an_extended_capability_header_comes_apart() -> None:
    header = 0x14810018
    assert (pci_regs.ext_cap_id(header), pci_regs.ext_cap_version(header), pci_regs.ext_cap_next(header)) == (
        0x18,
        1,
        0x148,
    )
