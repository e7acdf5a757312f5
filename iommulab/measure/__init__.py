"""What `iommulab bench` measures, and how a call is timed.

Every figure is the best of several rounds, in microseconds a call: the best is what the code costs when nothing else
runs. `client` has the figures that one client of any backend sees: the same functions run on the real kernel and on the
model, in the same place, so that their ratio says something. `dma` is DMA on the model beside the physical limit.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
EDU = (0x1234, 0x11E8)
#: Area counts of the scaling figures.
AREA_COUNTS = (10, 1_000, 100_000, 1_000_000)

Figures = dict[str, float]


def best(call: Callable[[], object], *, seconds: float, rounds: int = 5) -> float:
    """Microseconds a call: the best round. A round lasts about `seconds` / `rounds`."""
    call()
    number = 1
    while True:
        took = _time(call, number)
        if took > seconds / rounds / 4 or number >= 1 << 20:
            break
        number *= 4
    number = max(1, int(number * seconds / rounds / max(took, 1e-9)))
    return min(_time(call, number) for _ in range(rounds)) / number * 1e6


def _time(call: Callable[[], object], number: int) -> float:
    gc.disable()
    try:
        begin = time.perf_counter()
        for _ in range(number):
            call()
        return time.perf_counter() - begin
    finally:
        gc.enable()
