"""Random tables of both stages against an oracle that knows pages only; random invalidations against one that knows
what may be stale."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fakedev.caching import caching
from fakedev.dma import NO_PASID, PRIVILEGED, READ, WRITE, DmaAbort, TranslationFault
from fakedev.tlp import PageRequest
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, regs
from tests.fakedev.vtd.rig import DID, DIRECTORY, FIRST, PASID, PASIDS, QUEUE, RID, ROOT, SECOND, Rig

F, S, N = entries.PGTT_FIRST, entries.PGTT_SECOND, entries.PGTT_NESTED
PAGES = 8
OUT = 0x60_0000

one_first = st.one_of(st.none(), st.tuples(st.integers(0, PAGES - 1), st.sampled_from([1, 3, 5, 7])))
one_second = st.one_of(st.none(), st.tuples(st.integers(0, PAGES - 1), st.sampled_from([0, 1, 2, 3])))


def wanted(pgtt, first, second, page, access, wpe):
    """(output page or None, fault reason or None) by the rules of 3.6.1, 3.7.1 and 3.8.1."""
    write, privileged = access & WRITE, access & PRIVILEGED
    if pgtt != S:
        if first[page] is None:
            return None, 0x71
        page, bits = first[page]
        if not privileged and not bits & 4:
            return None, 0x81
        if write and not bits & 2 and (not privileged or wpe):
            return None, 0x85
        if pgtt == F:
            return page, None
    found = second[page]
    if found is None or not found[1]:
        return None, 0x79
    page, bits = found
    if not bits & (2 if write else 1):
        return None, 0x85 if write else 0x86
    return page, None


def fresh(pgtt, first, second, wpe, dirty):
    rig = Rig()
    flags_2 = entries.PASID_SRE | (entries.PASID_WPE if wpe else 0)
    rig.tables(pgtt, flags_2=flags_2, dirty=dirty and pgtt != F)
    if pgtt == N:
        rig.map_guest()
    write_first(rig, pgtt, first)
    write_second(rig, pgtt, second)
    rig.start()
    return rig


def write_first(rig, pgtt, first):
    for page, item in enumerate(first):
        target = 0 if item is None else item[0] << 12
        base = OUT if pgtt == F else 0x1F_0000
        rig.map_first(page << 12, base + target, 0 if item is None else item[1])


def write_second(rig, pgtt, second):
    if pgtt == F:
        return
    base = 0 if pgtt == S else 0x1F_0000
    for page, item in enumerate(second):
        rig.map_second(
            base + (page << 12), OUT + (0 if item is None else item[0] << 12), 0 if item is None else item[1]
        )


def got(rig, page, access, pasid=PASID):
    """What the unit makes of it: as `wanted`."""
    rig.clear()
    try:
        run = rig.unit.translate(rig.dma, pasid, (page << 12) + 8, 4, access)
    except TranslationFault:
        return None, rig.record()["reason"]
    assert run[0] <= (page << 12) + 8 < run[1]
    return ((page << 12) + run[2] - OUT) >> 12, None


@settings(max_examples=40, deadline=None)
@given(
    pgtt=st.sampled_from([F, S, N]),
    first=st.lists(one_first, min_size=PAGES, max_size=PAGES),
    second=st.lists(one_second, min_size=PAGES, max_size=PAGES),
    wpe=st.booleans(),
    dirty=st.booleans(),
    requests=st.lists(
        st.tuples(st.integers(0, PAGES - 1), st.sampled_from([READ, WRITE, READ | PRIVILEGED, WRITE | PRIVILEGED])),
        min_size=1,
        max_size=12,
    ),
    way=st.sampled_from(["always", "never", "random:1"]),
)
def test_every_kind_of_table_gives_what_its_pages_say(pgtt, first, second, wpe, dirty, requests, way):
    rig = fresh(pgtt, first, second, wpe, dirty)
    rig.box.set_caching(caching(way))
    written = set()
    for page, access in requests:
        expected = wanted(pgtt, first, second, page, access, wpe)
        assert got(rig, page, access) == expected
        if access & WRITE and expected[0] is not None:
            written.add(page)
    if pgtt != S:
        assert {n for n in range(PAGES) if rig.load(FIRST[3] + 8 * n) & 0x40} == written
    elif dirty:
        assert {n for n in range(PAGES) if rig.load(SECOND[3] + 8 * n) & 0x200} == written
    rig.close()


INVALIDATIONS = st.sampled_from(["global", "domain", "page", "pasid", "pasid page", "other domain", "other pasid"])


@settings(max_examples=40, deadline=None)
@given(
    pgtt=st.sampled_from([F, S, N]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("map"), st.integers(0, PAGES - 1), st.integers(0, PAGES - 1)),
            st.tuples(st.just("read"), st.integers(0, PAGES - 1), st.sampled_from([NO_PASID, PASID])),
            st.tuples(INVALIDATIONS, st.integers(0, PAGES - 1), st.sampled_from([0, PASID])),
        ),
        max_size=40,
    ),
    tables=st.booleans(),
)
def test_what_is_read_is_stale_until_the_right_invalidation_and_never_after(pgtt, steps, tables):
    """Every page is mapped all the time; a read gives what was mapped when it was cached."""
    mapped = dict.fromkeys(range(PAGES), 0)
    cached = {}
    full = [(0, 7)] * PAGES
    rig = fresh(pgtt, full, [(n, 3) for n in range(PAGES)] if pgtt == N else [(0, 3)] * PAGES, True, False)
    if tables:
        rig.box.set_caching(caching("always"))
    for what, page, other in steps:
        if what == "map":
            mapped[page] = other
            if pgtt == S:
                rig.map_second(page << 12, OUT + (other << 12))
            else:
                rig.map_first(page << 12, (OUT if pgtt == F else 0x1F_0000) + (other << 12))
        elif what == "read":
            expected = cached.setdefault((other, page), mapped[page])
            assert got_cached(rig, page, other) == expected
        else:
            rig.submit(descriptor(what, page, other))
            cached = {key: value for key, value in cached.items() if not takes(what, pgtt, page, other, *key)}
    rig.close()


def got_cached(rig, page, pasid):
    run = rig.unit.translate(rig.dma, pasid, page << 12, 4, READ)
    return ((page << 12) + run[2] - OUT) >> 12


def descriptor(what, page, pasid):
    return {
        "global": qi.iotlb(0, 0, 0, qi.GLOBAL),
        "domain": qi.iotlb(DID, 0, 0, qi.DOMAIN),
        "page": qi.iotlb(DID, page << 12, 0, qi.SELECTIVE),
        "pasid": qi.pasid_iotlb(DID, pasid, 0, 0, qi.PIOTLB_PASID),
        "pasid page": qi.pasid_iotlb(DID, pasid, page << 12, 0, qi.PIOTLB_PAGES),
        "other domain": qi.iotlb(DID + 1, 0, 0, qi.DOMAIN),
        "other pasid": qi.pasid_iotlb(DID, PASID + 1, 0, 0, qi.PIOTLB_PASID),
    }[what]


def takes(what, pgtt, page, pasid, cached_pasid, cached_page):
    """Tables 23 and 24."""
    mine = (0 if cached_pasid == NO_PASID else cached_pasid) == pasid
    if what == "page":
        return pgtt != S or cached_page == page
    if what == "pasid page":
        return pgtt != S and mine and cached_page == page
    return {"global": True, "domain": True, "pasid": mine}.get(what, False)


@settings(max_examples=80, deadline=None)
@given(
    words=st.lists(st.integers(0, (1 << 64) - 1), min_size=8, max_size=8),
    keep=st.integers(0, 255),
    address=st.integers(0, (1 << 64) - 4),
    access=st.sampled_from([READ, WRITE]),
)
def test_no_pasid_entry_breaks_the_unit(words, keep, address, access):
    """Whatever the words are, a request is translated or refused with a reason of table 30."""
    rig = Rig()
    rig.tables(S)
    words[0] &= ~entries.ENTRY_FPD
    good = [rig.load(PASIDS + 64 * PASID + 8 * n) for n in range(8)]
    rig.words(
        PASIDS + 64 * PASID, [g if keep >> n & 1 else w for n, (g, w) in enumerate(zip(good, words, strict=True))]
    )
    rig.start()
    try:
        rig.unit.translate(rig.dma, PASID, address, 4, access)
    except TranslationFault:
        assert rig.record()["reason"] in {0x5A, 0x5B, 0x59, 0x71, 0x70, 0x72, 0x73, 0x74, 0x80} | set(range(0x75, 0x88))
        assert rig.record()["sid"] == RID
    rig.close()


@settings(max_examples=40, deadline=None)
@given(
    mode=st.integers(0, 3),
    width=st.sampled_from([0, regs.IQA_DW]),
    queue=st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    ),
)
def test_any_queue_ends_at_its_tail_or_with_an_error(mode, width, queue):
    rig = Rig(mode=mode)
    rig.tables(S)
    rig.start()
    rig.set(regs.IQA, QUEUE | width, 8)
    step = 32 if width else 16
    for n, (kind, low, high, keep) in enumerate(queue):
        # Half of them nearly right: few bits beside the type.
        low, high = (low & 0x3F_FFFF_0030, high & -4096) if keep else (low, high)
        rig.words(QUEUE + step * n, (low & ~0xE0F | kind, high & (1 << 64) - 1, 0, 0)[: step // 8])
    rig.set(regs.IQT, step * len(queue))
    stopped = rig.reg(regs.FSTS) & (regs.FSTS_IQE | regs.FSTS_ITE)
    assert bool(stopped) == (rig.reg(regs.IQH, 8) != rig.reg(regs.IQT, 8))
    if stopped == regs.FSTS_IQE:
        # 0: the status of a wait descriptor has no place, which the manual leaves open.
        assert rig.reg(regs.IQERCD, 8) & 0xF in range(8)
    rig.close()


@settings(max_examples=60, deadline=None)
@given(
    junk=st.lists(st.tuples(st.integers(0, 8 * 4096 // 8 - 1), st.integers(0, (1 << 64) - 1)), max_size=60),
    mode=st.sampled_from([0, 1]),
    requests=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1 << 60), st.sampled_from([NO_PASID, PASID, 0, 0xFFFFF])),
        min_size=1,
        max_size=10,
    ),
)
def test_no_tables_break_the_unit(junk, mode, requests):
    """Words strewn over the tables: each kind of request is answered or aborted."""
    rig = Rig(mode=mode)
    rig.tables(N)
    rig.map_guest()
    rig.map_first(0x3000, 0x4000)
    for where, value in junk:
        rig.word((ROOT, DIRECTORY, FIRST[0], SECOND[0])[where % 4] + where // 4 * 8, value)
    rig.start()
    for kind, address, pasid in requests:
        try:
            if kind == 0:
                rig.dma.read(address, 4, pasid=pasid)
            elif kind == 1:
                rig.dma.request_translation(address & -4096, READ | WRITE, pasid)
            elif kind == 2:
                rig.dma.read_translated(address, 4, pasid)
            else:
                rig.dma.send_page_request(PageRequest(RID, pasid, address & -4096, READ, 1, True))
        except DmaAbort:
            pass
        rig.unit.explain(RID, address, pasid)
    rig.close()
