"""The machines that programs are made for, and who makes them."""

from __future__ import annotations

import random

from iommulab.fuzz.generator import Generator
from iommulab.fuzz.program import Program
from iommulab.fuzz.smmuv3_actions import Smmuv3Generator
from iommulab.fuzz.vtd_actions import VtdGenerator, VtdPairGenerator

#: Programs of one seed are independent of each other.
_MIX = 0x9E3779B97F4A7C15

GENERATORS: dict[str, type[Generator]] = {
    "mock": Generator,
    "q35-vtd-legacy": VtdGenerator,
    "q35-vtd": VtdGenerator,
    "q35-vtd-fs": VtdGenerator,
    "q35-vtd-multifunction": VtdPairGenerator,
    "virt-smmuv3": Smmuv3Generator,
}


def generate(seed: int, number: int, calls: int = 30, dmabuf: bool = False, machine: str = "mock") -> Program:
    """Program `number` of a seed for a machine: `calls` calls, and questions after them. `dmabuf`: with dma-bufs."""
    return GENERATORS[machine](random.Random((seed * _MIX + number) % (1 << 64)), dmabuf).program(calls)
