"""The faults, thirty and more: see `tests.faults.table` for what each field is, and docs/faults.md for the table."""

from __future__ import annotations

from tests.faults.iommufd import IOMMUFD_FAULTS
from tests.faults.smmuv3 import SMMUV3_FAULTS
from tests.faults.table import Fault
from tests.faults.vtd import VTD_FAULTS

FAULTS: list[Fault] = [*VTD_FAULTS, *SMMUV3_FAULTS, *IOMMUFD_FAULTS]
