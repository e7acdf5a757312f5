"""A second reader of the tables, written from the manuals and sharing nothing with fakedev but memory.

It knows one request, no caches and no flags updates: either where it goes, or the record that it leaves. Levels are the
manual's here: 3 holds pages.
"""

from __future__ import annotations

F_WALK_EABT, F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x0B, 0x10, 0x11, 0x12, 0x13
F_CD_FETCH, C_BAD_CD = 0x09, 0x0A
CD, TT, IN = 0, 1, 2


class Fault(Exception):
    """number, s2, class, ipa or fetch address."""


class Stage:
    """One stage's tables: granule and input size in bits, output bits, root, the manual's start level."""

    def __init__(self, granule, bits, output, root, start):
        self.granule, self.bits, self.output, self.root, self.start = granule, bits, output, root, start


def descriptors(stage, address, load):
    """The descriptors on the way, as (level, item): up to the first that is no table. Raises Fault parts by `load`."""
    stride = stage.granule - 3
    table, level = stage.root, stage.start
    while True:
        shift = stage.granule + stride * (3 - level)
        width = stage.bits - shift if level == stage.start else stride
        item = load(table + 8 * ((address >> shift) % (1 << width)))
        yield level, shift, item
        if level == 3 or item & 3 != 3:
            return
        table = item & (1 << 48) - (1 << stage.granule)
        level += 1


def block_allowed(granule, level):
    return (granule, level) in {(12, 1), (12, 2), (14, 2), (16, 2)}


def walk(stage, address, load):
    """(output, leaf, tables on the way); raises Fault(number, None)."""
    tables = []
    for level, shift, item in descriptors(stage, address, load):
        kind = item & 3
        page = level == 3 and kind == 3
        block = kind == 1 and level < 3 and block_allowed(stage.granule, level)
        if not page and not block and not (kind == 3 and level < 3):
            raise Fault(F_TRANSLATION)
        low = shift if block else stage.granule
        base = item & (1 << 48) - (1 << low)
        if base >> stage.output:
            raise Fault(F_ADDR_SIZE)
        if page or block:
            if not item >> 10 & 1:
                raise Fault(F_ACCESS)
            return base | address & (1 << shift) - 1, item, tables
        tables.append(item)
    raise AssertionError


def stage1_allows(leaf, tables, write, execute, privileged):
    """Direct permissions of EL1 and EL0 (DDI 0487, D8.4)."""
    read_only = leaf >> 7 & 1 or any(item >> 62 & 1 for item in tables)
    el0 = leaf >> 6 & 1 and not any(item >> 61 & 1 for item in tables)
    uxn = leaf >> 54 & 1 or any(item >> 60 & 1 for item in tables)
    pxn = leaf >> 53 & 1 or any(item >> 59 & 1 for item in tables)
    if execute:
        if privileged:
            return not pxn and not (el0 and not read_only)
        return not uxn
    if not privileged and not el0:
        return False
    return not (write and read_only)


def stage2_allows(leaf, write, execute, privileged):
    """S2AP and XN[1:0] with FEAT_XNX."""
    if execute:
        return {0: True, 1: not privileged, 2: False, 3: bool(privileged)}[leaf >> 53 & 3]
    return bool(leaf >> (7 if write else 6) & 1)


class Oracle:
    """`load` is a load of memory that raises LookupError; `first` and `second` are stages or None."""

    def __init__(self, load, first, second, cd_address=None):
        self.load, self.first, self.second, self.cd_address = load, first, second, cd_address

    def _second(self, ipa, klass, write=False, execute=False, privileged=False):
        stage = self.second
        if stage is None:
            return ipa
        if ipa >> stage.bits:
            raise Fault(F_TRANSLATION, 1, klass, ipa & -4096)
        where = None

        def load(pa):
            nonlocal where
            where = pa
            return self.load(pa)

        try:
            pa, leaf, _ = walk(stage, ipa, load)
        except LookupError:
            raise Fault(F_WALK_EABT, 1, klass, where) from None
        except Fault as fault:
            raise Fault(fault.args[0], 1, klass, ipa & -4096) from None
        if not stage2_allows(leaf, write, execute, privileged):
            raise Fault(F_PERMISSION, 1, klass, ipa & -4096)
        return pa

    def request(self, address, write, execute=False, privileged=False):
        """The physical address. Raises Fault."""
        if self.first is None:
            return self._second(address, IN, write, execute, privileged)
        pa = self._second(self.cd_address, CD)
        try:
            cd = self.load(pa)
        except LookupError:
            raise Fault(F_CD_FETCH, 0, CD, pa) from None
        if not cd >> 31 & 1:  # stage 2 led elsewhere
            raise Fault(C_BAD_CD, 0, CD, 0)
        if address >> self.first.bits:
            raise Fault(F_TRANSLATION, 0, IN, 0)
        where = None

        def load(ipa):
            nonlocal where
            where = self._second(ipa, TT)
            return self.load(where)

        try:
            ipa, leaf, tables = walk(self.first, address, load)
        except LookupError:
            raise Fault(F_WALK_EABT, 0, TT, where) from None
        except Fault as fault:
            if len(fault.args) > 1:
                raise
            raise Fault(fault.args[0], 0, IN, 0) from None
        if not stage1_allows(leaf, tables, write, execute, privileged):
            raise Fault(F_PERMISSION, 0, IN, 0)
        return self._second(ipa, IN, write, execute, privileged)
