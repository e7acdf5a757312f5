"""Second readers of page tables, written from the manuals' figures and sharing nothing with `fakedev/pgtable`.

Each takes `load(pa)`, which gives a word or None where nothing answers, and says what the hardware makes of an address:
an `Answer`. Levels are the manual's own names. `updates` are the words that the hardware stores, by address.
"""

from typing import NamedTuple


class Answer(NamedTuple):
    what: str  # mapped, absent, reserved, too wide, no access flag, no answer
    level: object
    pa: int = 0
    size: int = 0
    rights: frozenset = frozenset()  # of r w x, and R W X for privileged requests
    updates: tuple = ()


def bits(word, high, low):
    return word >> low & (1 << high - low + 1) - 1


def bit(word, n):
    return word >> n & 1


def wants(request, rights):
    return all(letter in rights for letter in request)


# -- Arm, DDI 0487 D8 ----------------------------------------------------------------------------------------------

# Which address bits index a table of each level (D8.2, "Translation table lookup properties").
ARM_INDEX = {
    4: {0: (47, 39), 1: (38, 30), 2: (29, 21), 3: (20, 12)},
    16: {0: (47, 47), 1: (46, 36), 2: (35, 25), 3: (24, 14)},
    64: {1: (51, 42), 2: (41, 29), 3: (28, 16)},
}
# The level of the first lookup of stage 1 by TxSZ.
ARM_START = {
    4: [(16, 24, 0), (25, 33, 1), (34, 42, 2), (43, 48, 3)],
    16: [(16, 16, 0), (17, 27, 1), (28, 38, 2), (39, 48, 3)],
    64: [(12, 21, 1), (22, 34, 2), (35, 47, 3)],
}
ARM_S2_START = {4: {0: 2, 1: 1, 2: 0, 3: 3}, 16: {0: 3, 1: 2, 2: 1}, 64: {0: 3, 1: 2, 2: 1}}
ARM_BLOCK_LEVELS = {4: {1, 2}, 16: {2}, 64: {2}}
# Entries that a contiguous hint joins, by level.
ARM_CONTIGUOUS = {4: {1: 16, 2: 16, 3: 16}, 16: {2: 32, 3: 128}, 64: {1: 1, 2: 32, 3: 32}}


def arm_start(granule, txsz):
    return next(level for low, high, level in ARM_START[granule] if low <= txsz <= high)


def _arm(load, table, address, start, c, request, judge):
    granule, txsz, size = c["granule"], c["txsz"], c["oas"]
    wide = c.get("lpa", False)
    blocks = ARM_BLOCK_LEVELS[granule] | ({1} if granule == 64 and wide else set())
    page_shift = {4: 12, 16: 14, 64: 16}[granule]
    tables = []
    level = start
    while True:
        high, low = ARM_INDEX[granule][level]
        if level == start:
            high = 63 - txsz
        where = table + 8 * bits(address, high, low)
        word = load(where)
        if word is None:
            return Answer("no answer", level)
        kind = bits(word, 1, 0)
        if kind in (0, 2) or (kind == 1 and (level == 3 or level not in blocks)):
            return Answer("absent", level)
        shift = page_shift if kind == 3 else low
        out = bits(word, 47, shift) << shift
        if granule == 64 and wide:
            out |= bits(word, 15, 12) << 48
        if out >> size:
            return Answer("too wide", level)
        if kind == 3 and level != 3:
            tables.append(word)
            table = out
            level += 1
            continue
        updates = []
        new = word
        if not bit(word, 10):
            if c.get("ha"):
                new |= 1 << 10
            elif not c.get("affd"):
                return Answer("no access flag", level)
        rights, dirtied = judge(word, tables)
        if "w" in request.lower() and wants(request, rights) and c.get("ha") and c.get("hd") and bit(word, 51):
            new = dirtied(new)
        if new != word:
            updates.append((where, new))
        extent = 1 << low
        pa = out | address & (extent - 1)
        if bit(word, 52) and extent * ARM_CONTIGUOUS[granule][level] <= 1 << 64 - txsz:
            extent *= ARM_CONTIGUOUS[granule][level]
        return Answer("mapped", level, pa, extent, frozenset(rights), tuple(updates))


def arm_stage1(load, table, address, c, request="", start=None):
    """D8.4: AP[2:1], UXN, PXN, the tables' limits; `c` is the configuration."""

    def judge(word, tables):
        ap = bits(word, 7, 6)
        uxn, pxn = bit(word, 54), bit(word, 53)
        writable_by_hardware = c.get("ha") and c.get("hd") and bit(word, 51)
        if writable_by_hardware:
            ap &= 1
        if c.get("hierarchical", True):
            for above in tables:
                limit = bits(above, 62, 61)
                if limit & 2:
                    ap |= 2
                if limit & 1 and not c.get("one"):
                    ap &= 2
                uxn |= bit(above, 60)
                pxn |= bit(above, 59)
        rights = set()
        if c.get("one"):
            rights |= set("rR") | (set() if ap & 2 else set("wW"))
            if not uxn and not (c.get("wxn") and "w" in rights):
                rights |= set("xX")
            return rights, lambda new: new & ~(1 << 7)
        # Table D8-63, "Data access permissions for stage 1 of a regime with EL0".
        rights |= {0: set("RW"), 1: set("RWrw"), 2: set("R"), 3: set("Rr")}[ap]
        if not uxn and not (c.get("wxn") and "w" in rights):
            rights.add("x")
        if not pxn and "w" not in rights and not (c.get("wxn") and "W" in rights):
            rights.add("X")
        if c.get("pan") and ap & 1:
            rights -= set("RW")
        return rights, lambda new: new & ~(1 << 7)

    return _arm(load, table, address, arm_start(c["granule"], c["txsz"]) if start is None else start, c, request, judge)


def arm_stage2(load, table, address, c, request=""):
    """D8.4.3: S2AP, XN[1:0]; the root's level by SL0."""

    def judge(word, tables):
        s2ap = bits(word, 7, 6)
        if c.get("ha") and c.get("hd") and bit(word, 51):
            s2ap |= 2
        rights = {0: set(), 1: set("rR"), 2: set("wW"), 3: set("rRwW")}[s2ap]
        xn = bits(word, 54, 53)
        if c.get("xnx"):
            rights = rights | {0: set("xX"), 1: set("x"), 2: set(), 3: set("X")}[xn]
        elif not xn & 2:
            rights = rights | set("xX")
        return rights, lambda new: new | 1 << 7

    return _arm(load, table, address, ARM_S2_START[c["granule"]][c["sl0"]], c, request, judge)


# -- VT-d second stage, 3.7 and 9.8 --------------------------------------------------------------------------------

SS_NAMES = {5: "SS-PML5E", 4: "SS-PML4E", 3: "SS-PDPE", 2: "SS-PDE", 1: "SS-PTE"}
X86_INDEX = {5: (56, 48), 4: (47, 39), 3: (38, 30), 2: (29, 21), 1: (20, 12)}


def vtd_second_stage(load, table, address, c, request=""):
    haw, ssade = c.get("haw", 52), c.get("ssade", False)
    readable = writable = True
    updates = []
    for n in range(c["levels"], 0, -1):
        name = SS_NAMES[n]
        high, low = X86_INDEX[n]
        where = table + 8 * bits(address, high, low)
        word = load(where)
        if word is None:
            return Answer("no answer", n, updates=tuple(updates))
        if not bits(word, 1, 0):
            return Answer("absent", n, updates=tuple(updates))
        ps = bit(word, 7)
        supported = {"SS-PDPE": c.get("gib", True), "SS-PDE": c.get("mib", True)}.get(name, False)
        leaf = n == 1 or ps
        reserved = haw < 52 and bits(word, 51, haw)
        if n > 1 and ps:
            reserved = reserved or not supported or bits(word, low - 1, 12)
        if not leaf:
            reserved = reserved or bit(word, 11) or bit(word, 62)
        else:
            reserved = (
                reserved or (not c.get("sc", True) and bit(word, 11)) or (not c.get("dt", True) and bit(word, 62))
            )
        if reserved:
            return Answer("reserved", n, updates=tuple(updates))
        readable = readable and bit(word, 0)
        writable = writable and bit(word, 1)
        new = word | 1 << 8 if ssade else word
        if leaf:
            rights = (set("rRxX") if readable else set()) | (set("wW") if writable else set())
            if ssade and "w" in request.lower() and wants(request, rights):
                new |= 1 << 9
            if new != word:
                updates.append((where, new))
            out = bits(word, 51, low) << low
            return Answer("mapped", n, out | bits(address, low - 1, 0), 1 << low, frozenset(rights), tuple(updates))
        if new != word:
            updates.append((where, new))
        table = bits(word, 51, 12) << 12
    raise AssertionError


def x86_first_stage(load, table, address, c, request=""):
    """3.6: P, R/W, U/S, WPE, A, EA, D."""
    haw = c.get("haw", 52)
    user = writable = True
    disabled = False
    updates = []
    for n in range(c["levels"], 0, -1):
        high, low = X86_INDEX[n]
        where = table + 8 * bits(address, high, low)
        word = load(where)
        if word is None:
            return Answer("no answer", n, updates=tuple(updates))
        if not bit(word, 0):
            return Answer("absent", n, updates=tuple(updates))
        ps = bit(word, 7)
        reserved = haw < 52 and bits(word, 51, haw)
        if n in (4, 5):
            reserved = reserved or ps
        if n == 3 and ps:
            reserved = reserved or not c.get("gib", True) or bits(word, 29, 13)
        if n == 2 and ps:
            reserved = reserved or bits(word, 20, 13)
        if reserved:
            return Answer("reserved", n, updates=tuple(updates))
        writable = writable and bit(word, 1)
        user = user and bit(word, 2)
        disabled = disabled or (c.get("xd", False) and bit(word, 63))
        new = word | 1 << 5 | (1 << 10 if c.get("eafe") else 0)
        if n == 1 or ps:
            rights = {"R"}
            if writable or not c.get("wpe", True):
                rights.add("W")
            if user:
                rights.add("r")
                if writable:
                    rights.add("w")
            if not disabled:
                rights |= set("xX")
            if "w" in request.lower() and wants(request, rights):
                new |= 1 << 6
            if new != word:
                updates.append((where, new))
            out = bits(word, 51, low) << low
            return Answer("mapped", n, out | bits(address, low - 1, 0), 1 << low, frozenset(rights), tuple(updates))
        if new != word:
            updates.append((where, new))
        table = bits(word, 51, 12) << 12
    raise AssertionError


# -- AMD, 48882 2.2.3 ----------------------------------------------------------------------------------------------

AMD_INDEX = {1: (20, 12), 2: (29, 21), 3: (38, 30), 4: (47, 39), 5: (56, 48), 6: (63, 57)}


def amd_host(load, table, address, c, request=""):
    mode = c["levels"]
    readable = writable = True
    updates = []
    while True:
        high, low = AMD_INDEX[mode]
        where = table + 8 * bits(address, high, low)
        word = load(where)
        if word is None:
            return Answer("no answer", mode, updates=tuple(updates))
        if not bit(word, 0):
            return Answer("absent", mode, updates=tuple(updates))
        nl = bits(word, 11, 9)
        beyond = c.get("oas", 52) < 52 and bits(word, 51, c["oas"])
        readable = readable and bit(word, 61)
        writable = writable and bit(word, 62)
        new = word | 1 << 5 if c.get("ad") else word
        if nl in (0, 7):
            if nl == 0:
                size = 1 << low
                if mode == 6 or (low > 12 and bits(word, low - 1, 12)):
                    return Answer("reserved", mode, updates=tuple(updates))
            else:
                ones = 0
                while bit(word, 12 + ones):
                    ones += 1
                size = 1 << 13 + ones
                if not low < 13 + ones < low + 9:
                    return Answer("reserved", mode, updates=tuple(updates))
            if beyond or bits(word, 58, 52):
                return Answer("reserved", mode, updates=tuple(updates))
            rights = (set("rRxX") if readable else set()) | (set("wW") if writable else set())
            if c.get("ad") and "w" in request.lower() and wants(request, rights):
                new |= 1 << 6
            if new != word:
                updates.append((where, new))
            base = (bits(word, 51, 12) << 12) // size * size
            return Answer("mapped", mode, base + address % size, size, frozenset(rights), tuple(updates))
        if nl >= mode or beyond or bits(word, 60, 52):
            return Answer("reserved", mode, updates=tuple(updates))
        if new != word:
            updates.append((where, new))
        # The address bits of the levels that are skipped must be zero.
        if bits(address, low - 1, AMD_INDEX[nl][0] + 1) if low - 1 > AMD_INDEX[nl][0] else 0:
            return Answer("absent", mode, updates=tuple(updates))
        table = bits(word, 51, 12) << 12
        mode = nl
