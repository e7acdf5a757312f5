"""For people: the way of a request without PASID through the tables of legacy mode, as they are in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fakedev.dma import READ, WRITE
from fakedev.pgtable.walker import explain, loader
from fakedev.vtd import faults

if TYPE_CHECKING:
    from fakedev.vtd.unit import VtdUnit


def explain_legacy(unit: VtdUnit, rid: int, address: int) -> list[str]:
    """The steps, a line each; and where a cache holds something else."""
    context = unit.read_context(rid)
    cached = unit.contexts.get(rid)
    lines = []
    if cached is not None and (cached.did, cached.root, cached.reason) != (
        context.did if not context.reason else cached.did,
        context.root,
        context.reason,
    ):
        lines.append(f"the context cache still holds domain {cached.did:#x}, table {cached.root:#x}")
    if context.reason:
        return [*lines, f"context entry: {faults.REASONS[context.reason]}"]
    if context.pass_through:
        return [*lines, f"context entry: domain {context.did:#x}, pass-through"]
    lines.append(f"context entry: domain {context.did:#x}, {context.top_level + 1} levels from {context.root:#x}")
    run = unit.tlb.lookup(context.did, address)
    if run is not None:
        allowed = "".join(name for bit, name in ((READ, "R"), (WRITE, "W")) if run[3] & bit) or "nothing"
        lines.append(f"IOTLB: iova {run[0]:#x}-{run[1] - 1:#x} at {run[0] + run[2]:#x}, allows {allowed}")
    return lines + explain(unit.format, loader(unit.memory), context.root, context.top_level, address)
