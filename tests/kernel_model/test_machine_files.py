"""Kernels on users' own machines: hardware that no driver takes is told in one sentence, at boot."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_model.kernel import Kernel

SMMU = '[[iommu]]\nkind = "smmuv3"\n'
VTD = '[[iommu]]\nkind = "vtd"\n'
EDU = '[[device]]\nkind = "edu"\naddress = "0000:00:10.0"\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (VTD + "features = { sagaw = 0 }\n", "the unit has no address width for its tables, sagaw 0x0"),
        (VTD + "features = { mgaw = 1 }\n", "the unit has no usable address width"),
        (VTD + "features = { qi = 0, ir = 0 }\n", "the driver needs a unit with queued invalidation"),
        (SMMU + "features = { cmdq_log2 = 3 }\n", "a command queue of 8 entries does not hold a batch"),
        (SMMU + "features = { sid_bits = 4 }\n", "stream 0x80 is beyond the stream table"),
        ('ram = "4096 B"\n' + VTD, "the machine's RAM is used up by tables"),
    ],
)
def test_hardware_that_no_driver_takes_is_one_sentence_at_boot(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(text + EDU)
    with pytest.raises(ValueError, match=f"lab.toml: no driver for it: {sentence}") as caught:
        Kernel(str(path))
    assert "\n" not in str(caught.value)
