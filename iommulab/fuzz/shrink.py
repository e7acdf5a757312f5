"""A smaller program with the same kind of difference.

Delta debugging: cut what comes after the first difference, drop calls in ever smaller pieces, then make the arguments
plain, as long as both sides still differ. Each candidate is run on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from iommulab.fuzz.program import Call, Program, without

#: Says whether a candidate still shows the difference.
Test = Callable[[Program], bool]


def shrink(program: Program, differs: Test, budget: int = 400) -> Program:
    """The smallest program found with at most `budget` runs."""
    left = budget

    def holds(candidate: Program) -> bool:
        nonlocal left
        if left <= 0:
            return False
        left -= 1
        return differs(candidate)

    size = max(len(program.calls) // 2, 1)
    while True:
        start = len(program.calls)
        before = len(program.calls)
        while start > 0:  # from the end: what comes late depends on what came early
            start -= size
            piece = set(range(max(start, 0), start + size))
            candidate = without(program, piece)
            if candidate.calls and holds(candidate):
                program = candidate
        if size == 1 and len(program.calls) == before:
            break
        size = max(size // 2, 1)
    for index in range(len(program.calls)):
        plain = False
        while not plain:
            plain = True
            for call in _plainer(program.calls[index]):
                candidate = Program([*program.calls[:index], call, *program.calls[index + 1 :]], program.main_first)
                if holds(candidate):
                    program, plain = candidate, False
                    break
    if program.main_first and holds(Program(program.calls)):
        program = Program(program.calls)
    return program


def _plainer(call: Call) -> Iterator[Call]:
    """The call with one thing left out or made smaller; each chain of these ends."""
    if call.arg is not None and call.is_ioctl:
        yield replace(call, arg=None)
    for name, value in call.fields.items():
        rest = {key: other for key, other in call.fields.items() if key != name}
        if call.is_ioctl:
            yield replace(call, fields=rest)
        if isinstance(value, int):
            for simple in (4096, 0x1000000, 1, value & ~0xFFF, value & (value - 1)):
                if simple < value:
                    yield replace(call, fields=call.fields | {name: simple})
        elif isinstance(value, str) and value[0] == "&" and "+" in value and not value.endswith("+0x0"):
            yield replace(call, fields=call.fields | {name: value.partition("+")[0] + "+0x0"})
